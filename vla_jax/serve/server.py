"""Policy server: openpi's websocket + msgpack wire, so existing robot clients work unmodified.

On connection the server sends the policy's metadata (one binary frame); after that every binary
request (an observation) gets one binary reply (actions). A problem is a text frame with one
paragraph, then close code 1011; other clients are not disturbed. `GET /healthz` answers 200.

A connection owns one session, the policy's history. It starts anew on RoboArena's "reset" endpoint
and whenever `prompt` differs from the request before: a history under another instruction is one no
training episode has (one episode = one instruction), and openpi's client has no other way to say
that an episode ended, its `reset()` being empty.

The policy is compiled before the port is bound and runs in one worker thread, because the device
is one: the event loop stays free to answer keep-alive pings, whatever an inference takes.
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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode
from websockets.http11 import Request, Response
from websockets.protocol import State
from websockets.server import ServerProtocol

from vla_jax.serve import protocol, wire

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServerOptions:
    """Where and how to listen.

    Attributes:
        host: interface; the default is reachable from this machine only. There is no
            authentication: put anything else behind a tunnel or a firewall.
        port: 0 lets the system choose.
        max_message_bytes: larger requests are refused before they are read.
        max_sessions: connections at a time; one more gets HTTP 503.
        ping_interval: seconds between keep-alive pings.
        ping_timeout: seconds without an answer after which a client counts as gone.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    max_message_bytes: int = 16 * 2**20
    max_sessions: int = 64
    ping_interval: float = 20.0
    ping_timeout: float = 20.0


class RequestError(ValueError):
    """A request the server cannot act on; the message goes to the client."""


class PolicyServer:
    """One policy behind one port; see the module's docstring for the protocol."""

    def __init__(self, policy: protocol.Policy, options: ServerOptions) -> None:
        self._policy = policy
        self._options = options
        self._sessions = 0
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="policy")
        self._metadata = wire.pack(policy.metadata)

    async def run(self, ready: Callable[[str], None], stop: asyncio.Event) -> None:
        """Warm up, listen, call `ready(uri)`, serve until `stop` is set, then close everything.

        Raises:
            OSError: if the port cannot be bound.
        """
        options = self._options
        try:
            await self._call(self._policy.warmup)
            async with serve(
                self._handle,
                options.host,
                options.port,
                compression=None,  # camera images barely shrink and every request would wait for it
                max_size=options.max_message_bytes,
                max_queue=2,  # a client waits for its reply; more would only hold memory
                ping_interval=options.ping_interval,
                ping_timeout=options.ping_timeout,
                process_request=self._process_request,
                create_connection=self._connect,  # type: ignore[arg-type]
            ) as server:
                ready(uri_of(options.host, _port_of(server)))
                await stop.wait()
        finally:
            self._worker.shutdown(wait=False, cancel_futures=True)

    def _connect(self, given: ServerProtocol, *args: Any, **kwargs: Any) -> ServerConnection:
        limit = self._options.max_message_bytes
        return ServerConnection(_Protocol(max_size=limit, logger=given.logger), *args, **kwargs)

    def _process_request(self, connection: ServerConnection, request: Request) -> Response | None:
        if request.path == "/healthz":
            return connection.respond(http.HTTPStatus.OK, "OK\n")
        if self._sessions >= self._options.max_sessions:
            text = f"all {self._options.max_sessions} sessions of this policy server are in use\n"
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, text)
        return None

    async def _handle(self, connection: ServerConnection) -> None:
        peer = connection.remote_address
        self._sessions += 1
        log.info("%s connected; %d session(s)", peer, self._sessions)
        try:
            await connection.send(self._metadata)
            await self._converse(connection)
        except ConnectionClosed:
            pass
        except (RequestError, protocol.ObservationError, wire.WireError) as error:
            log.warning("%s: %s", peer, error)
            await _refuse(connection, str(error))
        except Exception as error:  # one client's failure must not end the others' service
            log.exception("%s: inference failed", peer)
            kind = type(error).__name__
            await _refuse(connection, f"the policy failed: {kind}: {error} (see the server's log)")
        finally:
            self._sessions -= 1
            log.info("%s left; %d session(s)", peer, self._sessions)

    async def _converse(self, connection: ServerConnection) -> None:
        session: Any = None  # None: `_step` asks the policy for a new one
        prompt = previous_total = None
        while True:
            obs = _parse(await connection.recv())
            start = time.perf_counter()
            endpoint = obs.pop(protocol.ENDPOINT_KEY, "infer")
            if endpoint not in protocol.ENDPOINTS:
                legal = list(protocol.ENDPOINTS)
                raise RequestError(f"endpoint {endpoint!r} does not exist; legal: {legal}")
            if endpoint == "reset":
                session = prompt = None
                await connection.send(protocol.RESET_REPLY)
                continue
            told = obs.get(protocol.PROMPT_KEY)
            if isinstance(told, str):
                session, prompt = session if told == prompt else None, told
            reply, session, seconds = await self._call(self._step, session, obs)
            timing = {"infer_ms": seconds * 1e3}
            if previous_total is not None:
                timing["prev_total_ms"] = previous_total * 1e3
            await connection.send(wire.pack({**reply, protocol.TIMING_KEY: timing}))
            previous_total = time.perf_counter() - start

    def _step(self, session: Any, obs: dict[str, Any]) -> tuple[dict[str, Any], Any, float]:
        """One inference, in the worker thread; a session of None asks for a new one."""
        start = time.perf_counter()
        self._policy.check(obs)
        if session is None:
            session = self._policy.new_session()
        reply, session = self._policy.infer(session, obs)
        actions = np.asarray(reply[protocol.ACTIONS_KEY])
        if not np.isfinite(actions).all():
            raise FloatingPointError("the actions are not finite; nothing was sent to the robot")
        return {**reply, protocol.ACTIONS_KEY: actions}, session, time.perf_counter() - start

    async def _call(self, function: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._worker, function, *args)


class _Protocol(ServerProtocol):
    """Says in a text frame, which every client shows, why a huge message ends the connection."""

    def fail(self, code: CloseCode | int, reason: str = "") -> None:
        if code == CloseCode.MESSAGE_TOO_BIG and self.state is State.OPEN:
            text = f"message too large: {reason}; send smaller images or raise --max-message-mb"
            self.send_text(text.encode())
        super().fail(code, reason)


def _parse(message: str | bytes) -> dict[str, Any]:
    if isinstance(message, str):
        raise RequestError("expected a binary frame holding msgpack, got a text frame")
    obs = wire.unpack(message)
    if not isinstance(obs, dict) or not all(isinstance(key, str) for key in obs):
        raise RequestError(
            f"expected a map with string keys, as {protocol.PROMPT_KEY!r}, got "
            + (f"the keys {list(obs)[:8]}" if isinstance(obs, dict) else type(obs).__name__)
        )
    return obs


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
            started.insert(0, error)
        finally:
            up.set()

    thread = threading.Thread(target=target, name="policy-server", daemon=True)
    thread.start()
    up.wait()
    if isinstance(started[0], Exception):
        raise started[0]
    uri, loop, stop = started
    try:
        yield uri
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
