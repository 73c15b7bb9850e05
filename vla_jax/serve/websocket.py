"""Websocket connections: each has one seat, the policy's history for it.

A problem is told in the wire's own words, then the connection is closed with code 1011; other
clients are not disturbed. `handshake` answers what is not a websocket: `GET /healthz` and, in
Prometheus' format, `GET /metrics`.
"""

import asyncio
import contextlib
import http
import logging
import time
from collections.abc import Callable, Sequence

from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed, ProtocolError
from websockets.frames import CloseCode, Frame, Opcode
from websockets.http11 import Request as Handshake
from websockets.http11 import Response
from websockets.protocol import State
from websockets.server import ServerProtocol

from vla_jax.inference import protocol
from vla_jax.serve import metrics
from vla_jax.serve.drain import Drain
from vla_jax.serve.engine import Engine, PolicyFailedError, Seat, ShuttingDownError
from vla_jax.serve.msgpack_numpy import WireError
from vla_jax.serve.options import UNAUTHORIZED, ServerOptions
from vla_jax.serve.transports.base import (
    Message,
    Request,
    RequestError,
    WebsocketWire,
    brief,
)

log = logging.getLogger(__name__)

MAX_REASON = 120  # characters of a reason in a close frame
MAX_FRAGMENTS = 1024  # of one message; no client of these wires makes more than one


# What goes to a client in its wire's words, and how it is counted.
_REASONS: dict[type[Exception], str] = {
    RequestError: "malformed",
    WireError: "malformed",
    protocol.ObservationError: "observation",
    PolicyFailedError: "policy",
    ShuttingDownError: "shutdown",
}


class WebsocketAdapter:
    """Answers websocket connections, each in the words of the wire whose path it asked for."""

    def __init__(
        self,
        engine: Engine,
        options: ServerOptions,
        drain: Drain,
        wires: Sequence[WebsocketWire],
        full: Callable[[], str],
    ) -> None:
        """Serves `wires`; that of the options answers every path that none has.

        Args:
            engine: asks the policy.
            options: of the server.
            drain: of the server.
            wires: all of this kind.
            full: says why there is no seat left, "" while there is one.

        Raises:
            ValueError: there is no such wire.
        """
        self._engine, self._options, self._drain = engine, options, drain
        self._wires = {wire.path: wire for wire in wires}
        by_name = {wire.name: wire for wire in wires}
        if options.wire not in by_name:
            raise ValueError(f"wire: {options.wire!r} is none of {list(by_name)}")
        self._usual = by_name[options.wire]
        self._full = full

    def handshake(self, connection: ServerConnection, request: Handshake) -> Response | None:
        """Answer plain GET requests, and who cannot be let in; None goes on with the handshake."""
        if request.path == "/healthz":
            return connection.respond(http.HTTPStatus.OK, "OK\n")
        if not self._options.admits(_header(request, "Authorization")):
            self._engine.metrics.refused("unauthorized")
            response = connection.respond(http.HTTPStatus.UNAUTHORIZED, UNAUTHORIZED + "\n")
            response.headers["WWW-Authenticate"] = "Api-Key"
            return response
        if request.path == "/metrics":
            page = self._engine.metrics.render()
            response = connection.respond(http.HTTPStatus.OK, page)
            # Assignment adds a header to those of the same name.
            del response.headers["Content-Type"]
            response.headers["Content-Type"] = metrics.CONTENT_TYPE
            return response
        if full := self._full():
            self._engine.metrics.refused("full")
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, full + "\n")
        if not self._wire(request.path).answers_pings:
            # Read when the keep-alive of this connection begins, after the handshake.
            connection.ping_timeout = None
        return None

    async def serve(self, connection: ServerConnection) -> None:
        """Hold one conversation, from the greeting to the end of the connection."""
        peer, engine, seat = connection.remote_address, self._engine, Seat()
        wire = self._wire(connection.request.path if connection.request else "")
        if full := self._full():  # several shook hands for the last seat
            engine.metrics.refused("full")
            error = RequestError(full)
            return await _end(connection, wire.refuse(None, error), error)
        engine.seats.add(seat)
        log.info("%s connected (%s); %d session(s)", peer, wire.name, len(engine.seats))
        try:
            await self._greet(connection, wire)
            await self._converse(connection, wire, seat)
        except ConnectionClosed as closed:
            # The close code is ours: `Protocol.fail` has told the client why.
            if closed.sent is not None and closed.sent.code == CloseCode.MESSAGE_TOO_BIG:
                engine.metrics.refused("too_large")
        except TimeoutError:
            # No message: the client need not fail, it may connect again and start over.
            engine.metrics.refused("timeout")
            idle = f"no request in {self._options.idle_timeout:g} s"
            await connection.close(CloseCode.GOING_AWAY, idle)
        finally:
            engine.seats.discard(seat)
            log.info("%s left; %d session(s)", peer, len(engine.seats))

    async def _greet(self, connection: ServerConnection, wire: WebsocketWire) -> None:
        try:
            greeting = wire.greet()
        except RequestError as error:
            log.warning("%s: %s", connection.remote_address, error)
            await _end(connection, wire.refuse(None, error), error)
            return
        if greeting is not None:
            await connection.send(greeting)

    async def _converse(
        self, connection: ServerConnection, wire: WebsocketWire, seat: Seat
    ) -> None:
        previous_total: float | None = None
        while True:
            async with asyncio.timeout(self._options.idle_timeout or None):
                message = await connection.recv()
            request = None
            try:
                with self._drain.answering():
                    start = time.perf_counter()
                    request = wire.read(message)
                    answer = await self._answer(wire, seat, request, previous_total)
                    if answer is not None:
                        await connection.send(answer)
                    if request.obs is not None:
                        previous_total = time.perf_counter() - start
            except tuple(_REASONS) as error:
                log.warning("%s: %s", connection.remote_address, brief(error))
                self._engine.metrics.refused(_REASONS[type(error)])
                return await _end(connection, wire.refuse(request, error), error)
            if self._drain.begun:
                return await connection.close(CloseCode.GOING_AWAY, "the server is shutting down")

    async def _answer(
        self, wire: WebsocketWire, seat: Seat, request: Request, previous_total: float | None
    ) -> Message | None:
        """What to send for one request; `previous_total` is how many seconds the last one took."""
        if request.reset:
            seat.reset()
        if request.instructions is not None:
            unfit = await self._engine.unfit(request.instructions)
            return wire.write(request, {protocol.UNFIT_KEY: unfit})
        if request.obs is None:
            return request.answer
        reply = await self._engine.act(seat, request.obs, request.episode)
        if previous_total is not None:
            # A reply cannot tell how long its own sending takes, so the next one does.
            reply[protocol.TIMING_KEY]["prev_total_ms"] = previous_total * 1e3
        self._engine.metrics.answered(wire.name)
        return wire.write(request, reply)

    def _wire(self, path: str) -> WebsocketWire:
        return self._wires.get(path.partition("?")[0], self._usual)


class Protocol(ServerProtocol):
    """Says in a text frame, which every client shows, why a huge message ends the connection."""

    _fragments = 0

    def recv_frame(self, frame: Frame) -> None:
        """Count the pieces of a message; websockets itself counts their bytes alone."""
        # Empty fragments count for nothing in `max_size` and are held until the last one comes.
        if frame.opcode in (Opcode.TEXT, Opcode.BINARY, Opcode.CONT):
            self._fragments = 0 if frame.fin else self._fragments + 1
        if self._fragments > MAX_FRAGMENTS:
            raise ProtocolError(f"a message in more than {MAX_FRAGMENTS} fragments")
        super().recv_frame(frame)

    def fail(self, code: CloseCode | int, reason: str = "") -> None:
        """End the connection, and say more than the close code does."""
        if code == CloseCode.MESSAGE_TOO_BIG and self.state is State.OPEN:
            text = f"message too large: {reason}; send smaller images or raise --max-message-mb"
            self.send_text(text.encode())
        super().fail(code, reason)


def _header(request: Handshake, name: str) -> str | None:
    """The header's value; None where it is missing or occurs twice."""
    values = request.headers.get_all(name)
    return values[0] if len(values) == 1 else None


async def _end(connection: ServerConnection, refusal: Message, error: Exception) -> None:
    # A close frame has room for 123 bytes; the message before it says all.
    reason = brief(error, MAX_REASON).encode("ascii", "replace").decode()
    with contextlib.suppress(ConnectionClosed):
        await connection.send(refusal)
        await connection.close(CloseCode.INTERNAL_ERROR, reason)
