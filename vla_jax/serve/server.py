"""Policy server: openpi's websocket + msgpack wire, so existing robot clients work unmodified.

On connection the server sends the policy's metadata (one binary frame); after that every binary
request (an observation) gets one binary reply (actions). A problem is a text frame with one
paragraph, then close code 1011; other clients are not disturbed. A connection owns one seat, the
policy's history for it; RoboArena's "reset" endpoint empties it, see `engine.Seat`.

The same port answers `POST /act` (see `rest`), `GET /healthz` with 200 and `GET /metrics` in
Prometheus' format. The policy is compiled before the port is bound.
"""

import asyncio
import contextlib
import http
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed, ProtocolError
from websockets.frames import CloseCode, Frame, Opcode
from websockets.http11 import Request, Response
from websockets.protocol import State
from websockets.server import ServerProtocol

from vla_jax.inference import protocol
from vla_jax.serve import metrics, msgpack_numpy, rest
from vla_jax.serve.drain import Drain
from vla_jax.serve.engine import Engine, PolicyFailedError, Seat, ShuttingDownError
from vla_jax.serve.front import Connection, FrontDoor
from vla_jax.serve.options import ServerOptions

__all__ = ["PolicyServer", "ServerOptions", "background", "check_port", "run", "uri_of"]

log = logging.getLogger(__name__)

MAX_FRAGMENTS = 1024  # of one message; no client of this wire makes more than one


class RequestError(ValueError):
    """A request the server cannot act on; the message goes to the client."""


# What goes to a client as a text frame, and how it is counted.
_REASONS: dict[type[Exception], str] = {
    RequestError: "malformed",
    msgpack_numpy.WireError: "malformed",
    protocol.ObservationError: "observation",
    PolicyFailedError: "policy",
    ShuttingDownError: "shutdown",
}


class PolicyServer:
    """One policy behind one port; see the module's docstring for the protocol."""

    def __init__(self, policy: protocol.Policy, options: ServerOptions) -> None:
        self._options = options
        self._engine = Engine(policy, options.max_wait)
        self._drain = Drain()
        adapter = rest.RestAdapter(self._engine, options, self._drain)
        self._door = FrontDoor(adapter, options, self._engine.metrics)
        self._metadata = msgpack_numpy.pack(policy.metadata)

    async def run(self, ready: Callable[[str], None], stop: asyncio.Event) -> None:
        """Warm up, listen, call `ready(uri)`, serve until `stop` is set, then leave in good order.

        Requests that are there by then are answered, for `options.drain_timeout` at most.

        Raises:
            OSError: if the port cannot be bound.
        """
        options = self._options
        try:
            await self._engine.warmup()
            async with (
                self._engine.running(),
                serve(
                    self._handle,
                    options.host,
                    options.port,
                    compression=None,  # images barely shrink and every request would wait for it
                    max_size=options.max_message_bytes,
                    max_queue=2,  # a client waits for its reply; more would only hold memory
                    open_timeout=options.open_timeout,
                    close_timeout=options.open_timeout,
                    ping_interval=options.ping_interval,
                    ping_timeout=options.ping_timeout,
                    process_request=self._process_request,
                    create_connection=self._connect,  # type: ignore[arg-type]
                ) as server,
            ):
                ready(uri_of(options.host, _port_of(server)))
                await stop.wait()
                await self._finish(server)
                self._door.close()
        finally:
            self._engine.close()

    async def _finish(self, server: Server) -> None:
        server.server.close()  # nobody new
        late = await self._drain.finish(self._options.drain_timeout)
        if late:
            log.warning("%d requests are not computed in time; their clients are told", late)
            self._engine.abandon()
            # Seconds for the refusals to be sent.
            await self._drain.finish(1.0)

    def _connect(self, default: ServerProtocol, *args: Any, **kwargs: Any) -> Connection:
        def websocket() -> ServerConnection:
            limit = self._options.max_message_bytes
            # websockets cannot be told which protocol to make, so the one it made is replaced.
            return ServerConnection(
                _Protocol(max_size=limit, logger=default.logger), *args, **kwargs
            )

        return Connection(self._door, websocket)

    def _process_request(self, connection: ServerConnection, request: Request) -> Response | None:
        if request.path == "/healthz":
            return connection.respond(http.HTTPStatus.OK, "OK\n")
        if not self._options.admits(_header(request, "Authorization")):
            self._engine.metrics.errors["unauthorized"] += 1
            response = connection.respond(http.HTTPStatus.UNAUTHORIZED, rest.UNAUTHORIZED + "\n")
            response.headers["WWW-Authenticate"] = "Api-Key"
            return response
        if request.path == "/metrics":
            page = self._engine.metrics.render(self._gauges())
            response = connection.respond(http.HTTPStatus.OK, page)
            # Assignment adds a header to those of the same name.
            del response.headers["Content-Type"]
            response.headers["Content-Type"] = metrics.CONTENT_TYPE
            return response
        if self._full:
            self._engine.metrics.errors["full"] += 1
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, self._full + "\n")
        return None

    @property
    def _full(self) -> str:
        # Seats of clients that went away must not keep a new one out.
        self._door.rest.forget_idle()
        limit = self._options.max_sessions
        taken = len(self._engine.seats) >= limit
        return f"all {limit} sessions of this policy server are in use" if taken else ""

    def _gauges(self) -> dict[str, int]:
        engine = self._engine
        connections = len(self._door.connections)
        return {"sessions": len(engine.seats), "connections": connections, "queue": engine.waiting}

    async def _handle(self, connection: ServerConnection) -> None:
        peer, engine, seat = connection.remote_address, self._engine, Seat()
        if self._full:  # several shook hands for the last seat
            engine.metrics.errors["full"] += 1
            return await _refuse(connection, self._full)
        engine.seats.add(seat)
        log.info("%s connected; %d session(s)", peer, len(engine.seats))
        try:
            await connection.send(self._metadata)
            await self._converse(connection, seat)
        except ConnectionClosed as closed:
            # The close code is ours: `_Protocol.fail` has told the client why.
            if closed.sent is not None and closed.sent.code == CloseCode.MESSAGE_TOO_BIG:
                engine.metrics.errors["too_large"] += 1
        except TimeoutError:
            # No text frame: the client need not fail, it may connect again and start over.
            engine.metrics.errors["timeout"] += 1
            idle = f"no request in {self._options.idle_timeout:g} s"
            await connection.close(CloseCode.GOING_AWAY, idle)
        except tuple(_REASONS) as error:
            text = rest.brief(error)
            log.warning("%s: %s", peer, text)
            engine.metrics.errors[_REASONS[type(error)]] += 1
            await _refuse(connection, text)
        finally:
            engine.seats.discard(seat)
            log.info("%s left; %d session(s)", peer, len(engine.seats))

    async def _converse(self, connection: ServerConnection, seat: Seat) -> None:
        previous_total: float | None = None
        while True:
            async with asyncio.timeout(self._options.idle_timeout or None):
                message = await connection.recv()
            with self._drain.answering():
                previous_total = await self._reply(connection, seat, message, previous_total)
            if self._drain.begun:
                return await connection.close(CloseCode.GOING_AWAY, "the server is shutting down")

    async def _reply(
        self,
        connection: ServerConnection,
        seat: Seat,
        message: str | bytes,
        previous_total: float | None,
    ) -> float | None:
        """Answer one request; returns the seconds it took, which the next reply tells."""
        start = time.perf_counter()
        obs = _parse(message)
        endpoint = obs.pop(protocol.ENDPOINT_KEY, "infer")
        if not isinstance(endpoint, str) or endpoint not in protocol.ENDPOINTS:
            legal = list(protocol.ENDPOINTS)
            raise RequestError(f"endpoint {str(endpoint)[:40]!r} does not exist; legal: {legal}")
        if endpoint == "reset":
            seat.reset()
            await connection.send(protocol.RESET_REPLY)
            return previous_total
        reply = await self._engine.act(seat, obs)
        if previous_total is not None:
            # A reply cannot tell how long its own sending takes, so the next one does.
            reply[protocol.TIMING_KEY]["prev_total_ms"] = previous_total * 1e3
        await connection.send(msgpack_numpy.pack(reply))
        self._engine.metrics.requests["websocket"] += 1
        return time.perf_counter() - start


class _Protocol(ServerProtocol):
    """Says in a text frame, which every client shows, why a huge message ends the connection."""

    _fragments = 0

    def recv_frame(self, frame: Frame) -> None:
        # Empty fragments count for nothing in `max_size` and are held until the last one comes.
        if frame.opcode in (Opcode.TEXT, Opcode.BINARY, Opcode.CONT):
            self._fragments = 0 if frame.fin else self._fragments + 1
        if self._fragments > MAX_FRAGMENTS:
            raise ProtocolError(f"a message in more than {MAX_FRAGMENTS} fragments")
        super().recv_frame(frame)

    def fail(self, code: CloseCode | int, reason: str = "") -> None:
        if code == CloseCode.MESSAGE_TOO_BIG and self.state is State.OPEN:
            text = f"message too large: {reason}; send smaller images or raise --max-message-mb"
            self.send_text(text.encode())
        super().fail(code, reason)


def _parse(message: str | bytes) -> dict[str, Any]:
    if isinstance(message, str):
        raise RequestError("expected a binary frame holding msgpack, got a text frame")
    obs = msgpack_numpy.unpack(message)
    if not isinstance(obs, dict) or not all(isinstance(key, str) for key in obs):
        raise RequestError(
            f"expected a map with string keys, as {protocol.PROMPT_KEY!r}, got "
            + (f"the keys {list(obs)[:8]}" if isinstance(obs, dict) else type(obs).__name__)
        )
    return obs


def _header(request: Request, name: str) -> str | None:
    """The header's value; None where it is missing or occurs twice."""
    values = request.headers.get_all(name)
    return values[0] if len(values) == 1 else None


async def _refuse(connection: ServerConnection, message: str) -> None:
    with contextlib.suppress(ConnectionClosed):
        await connection.send(" ".join(message.split()))
        await connection.close(CloseCode.INTERNAL_ERROR, "the frame before this one says why")


def _port_of(server: Server) -> int:
    return next(iter(server.sockets)).getsockname()[1]


def uri_of(host: str, port: int) -> str:
    """`ws://host:port`, with brackets around an IPv6 address."""
    return f"ws://[{host}]:{port}" if ":" in host else f"ws://{host}:{port}"


def check_port(host: str, port: int) -> None:
    """Fail now, not after minutes of loading and compiling, if the port cannot be bound.

    Raises:
        OSError: naming the address.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As asyncio's own server does, else a port that was in use a minute ago seems taken.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            reason = f"cannot listen on {uri_of(host, port)}: {error.strerror}"
            raise OSError(error.errno, f"{reason}; choose another --port or --host") from error


def run(policy: protocol.Policy, options: ServerOptions, ready: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM; `ready(uri)` is called once clients can connect.

    Raises:
        OSError: if the port cannot be bound.
    """

    async def main() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()

        def finish(number: int) -> None:
            loop.remove_signal_handler(number)  # a second signal ends the process at once
            stop.set()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, finish, number)
        await PolicyServer(policy, options).run(ready, stop)

    asyncio.run(main())


@contextlib.contextmanager
def background(policy: protocol.Policy, options: ServerOptions) -> Iterator[str]:
    """Serve from a thread of this process for the length of a `with` block; yields the URI.

    Raises:
        Exception: whatever `warmup` or binding raised.
    """
    started: list[Any] = []
    up = threading.Event()

    async def main() -> None:
        stop = asyncio.Event()

        def ready(uri: str) -> None:
            started.extend((uri, asyncio.get_running_loop(), stop))
            up.set()

        await PolicyServer(policy, options).run(ready, stop)

    def target() -> None:
        try:
            asyncio.run(main())
        except Exception as error:  # raised again in the caller's thread
            # In front, where the caller looks for it.
            started.insert(0, error)
        finally:
            up.set()

    # A daemon thread cannot keep a process alive whose main thread has ended.
    thread = threading.Thread(target=target, name="policy-server", daemon=True)
    thread.start()
    up.wait()
    if isinstance(started[0], Exception):
        raise started[0]
    uri, loop, stop = started
    try:
        yield uri
    finally:
        # An asyncio event is not to be set from another thread.
        loop.call_soon_threadsafe(stop.set)
        thread.join()
