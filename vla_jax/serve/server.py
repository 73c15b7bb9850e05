"""One policy behind one port, for every wire in `transports`.

The port is bound after the policy is compiled. What a client sends first decides who answers:
`POST` goes to `rest`, all else to `websocket`, which answers plain GET requests as well.
"""

import asyncio
import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.server import ServerProtocol

from vla_jax.inference import protocol
from vla_jax.serve import rest, transports, websocket
from vla_jax.serve.drain import Drain
from vla_jax.serve.engine import Engine
from vla_jax.serve.front import Connection, FrontDoor
from vla_jax.serve.options import ServerOptions
from vla_jax.serve.transports.base import PostWire, WebsocketWire

__all__ = ["PolicyServer", "ServerOptions", "background", "check_port", "run", "uri_of"]

log = logging.getLogger(__name__)


class PolicyServer:
    """One policy behind one port; see the module's docstring for the protocol."""

    def __init__(self, policy: protocol.Policy, options: ServerOptions) -> None:
        self._options = options
        self._engine = Engine(policy, options.max_wait, options.new_episode)
        self._drain = Drain()
        metadata = {
            **policy.metadata,
            "episodes": self._engine.episodes.to_json(),
            "endpoints": list(protocol.ENDPOINTS),
        }
        wires = [wire(metadata) for wire in transports.WIRES]
        parts = (self._engine, options, self._drain)
        posts = [wire for wire in wires if isinstance(wire, PostWire)]
        self._door = FrontDoor(rest.RestAdapter(*parts, posts), options, self._engine.metrics)
        lasting = [wire for wire in wires if isinstance(wire, WebsocketWire)]
        self._websockets = websocket.WebsocketAdapter(*parts, lasting, self._full)
        self._engine.metrics.watch(
            {
                "sessions": lambda: len(self._engine.seats),
                "connections": lambda: len(self._door.connections),
                "queue": lambda: self._engine.waiting,
            }
        )

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
                    self._websockets.serve,
                    options.host,
                    options.port,
                    compression=None,  # images barely shrink and every request would wait for it
                    max_size=options.max_message_bytes,
                    max_queue=2,  # a client waits for its reply; more would only hold memory
                    open_timeout=options.open_timeout,
                    close_timeout=options.open_timeout,
                    ping_interval=options.ping_interval,
                    ping_timeout=options.ping_timeout,
                    process_request=self._websockets.handshake,
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
        def new_websocket() -> ServerConnection:
            limit = self._options.max_message_bytes
            # websockets cannot be told which protocol to make, so the one it made is replaced.
            protocol = websocket.Protocol(max_size=limit, logger=default.logger)
            return ServerConnection(protocol, *args, **kwargs)

        return Connection(self._door, new_websocket)

    def _full(self) -> str:
        # Seats of clients that went away must not keep a new one out.
        self._door.rest.forget_idle()
        limit = self._options.max_sessions
        taken = len(self._engine.seats) >= limit
        return f"all {limit} sessions of this policy server are in use" if taken else ""


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
