"""One port for two protocols, and what a connection may take before anyone has read from it.

The first bytes decide: "POST " is for the REST adapter, all else for `websockets`, which answers
plain GET requests as well. Connections are counted here, silent ones are dropped, and one that
sends without reading what it is sent is cut off.
"""

import asyncio
from collections.abc import Callable
from typing import Any

from vla_jax.serve.metrics import Metrics
from vla_jax.serve.options import ServerOptions
from vla_jax.serve.rest import MAX_HEADER_BYTES, RestAdapter

_REST = b"POST "
SPARE_CONNECTIONS = 64  # beyond the sessions: refusals, health checks, requests without a session
MAX_UNREAD = 4 * 2**20  # bytes on their way to one client, such as answers to its pings


class FrontDoor:
    """Makes the asyncio protocol of every new connection.

    Attributes:
        connections: open ones.
    """

    def __init__(self, adapter: RestAdapter, options: ServerOptions, metrics: Metrics) -> None:
        self.connections: set[Connection] = set()
        self.rest, self.options, self.metrics = adapter, options, metrics

    @property
    def full(self) -> bool:
        """Whether one more connection is too many."""
        return len(self.connections) >= self.options.max_sessions + SPARE_CONNECTIONS

    def close(self) -> None:
        """End what `websockets` does not know of."""
        for connection in list(self.connections):
            connection.close_unless_websocket()


class Connection(asyncio.Protocol):
    """Passes everything on to the protocol that the first bytes ask for."""

    def __init__(self, door: FrontDoor, make_websocket: Callable[[], asyncio.Protocol]) -> None:
        self._door, self._make_websocket = door, make_websocket
        self._transport: Any = None
        self._timer: asyncio.TimerHandle | None = None
        self._inner: asyncio.Protocol | None = None
        self._begin = b""

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Wait for the first bytes, but not for long."""
        self._transport = transport
        if self._door.full:
            self._door.metrics.refused("full")
            self._transport.abort()
            return
        self._door.connections.add(self)
        seconds = self._door.options.open_timeout
        # A client that connects and stays silent must not hold a place.
        self._timer = asyncio.get_running_loop().call_later(seconds, self._give_up)

    def data_received(self, data: bytes) -> None:
        """Choose, once; then pass on."""
        # These bytes were under way when the connection was given up.
        if self._transport.is_closing():
            return
        if self._inner is None:
            self._begin += data
            # So few bytes could still become a POST.
            if len(self._begin) < len(_REST) and _REST.startswith(self._begin):
                return
            self._choose()
            data, self._begin = self._begin, b""
        assert self._inner is not None
        self._inner.data_received(data)
        # A client that sends pings and never reads would fill our memory.
        if self._transport.get_write_buffer_size() > MAX_UNREAD:
            self._door.metrics.refused("too_large")
            self._transport.abort()

    def eof_received(self) -> bool | None:
        """See asyncio.Protocol."""
        return self._inner.eof_received() if self._inner else None

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        self._door.connections.discard(self)
        if self._timer is not None:
            self._timer.cancel()
        if self._inner is not None:
            self._inner.connection_lost(exc)

    def pause_writing(self) -> None:
        """See asyncio.Protocol."""
        if self._inner is not None:
            self._inner.pause_writing()

    def resume_writing(self) -> None:
        """See asyncio.Protocol."""
        if self._inner is not None:
            self._inner.resume_writing()

    def close_unless_websocket(self) -> None:
        """`websockets` says goodbye to its own."""
        if self._inner is None or isinstance(self._inner, asyncio.StreamReaderProtocol):
            self._transport.close()

    def _choose(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._begin.startswith(_REST):
            # Reading up to the end of the headers raises beyond this limit.
            reader = asyncio.StreamReader(limit=MAX_HEADER_BYTES)
            self._inner = asyncio.StreamReaderProtocol(reader, self._door.rest.serve)
        else:
            self._inner = self._make_websocket()
        self._inner.connection_made(self._transport)

    def _give_up(self) -> None:
        self._door.metrics.refused("timeout")
        self._transport.abort()
