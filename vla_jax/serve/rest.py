"""HTTP connections: each POST is one message of the wire whose path it asks for.

The HTTP is what this needs and no more: one verb, bodies of a stated length, a time limit on every
request. aiohttp in its place was tried: 93 lines less here and eight packages more, but a header
that never ends is waited for without limit, what it cannot parse is answered before anything here
sees or counts it, and a request takes 4.4 ms instead of 3.2 (two cores). `websockets`, which
answers on the same port, does not read bodies.
"""

import asyncio
import contextlib
import http
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vla_jax.inference import protocol
from vla_jax.serve import json_numpy
from vla_jax.serve.drain import Drain
from vla_jax.serve.engine import Engine, PolicyFailedError, Seat, ShuttingDownError
from vla_jax.serve.msgpack_numpy import WireError
from vla_jax.serve.options import UNAUTHORIZED, ServerOptions
from vla_jax.serve.transports.base import Message, PostWire, Request, RequestError, brief

log = logging.getLogger(__name__)

MAX_HEADER_BYTES = 16 * 1024
MAX_PHRASE = 160  # characters of a reason in the status line
KEEP_ALIVE = 75.0  # seconds an unused connection is kept


class HTTPError(Exception):
    """A request that is not answered with actions; the message goes to the client.

    Attributes:
        status: of the response.
        reason: as `Metrics.refused` counts it.
    """

    def __init__(self, status: http.HTTPStatus, text: str, reason: str = "malformed") -> None:
        super().__init__(text)
        self.status, self.reason = status, reason


_STATUS = http.HTTPStatus
# What is answered with another status than 200, and how it is counted.
_REFUSALS: dict[type[Exception], tuple[http.HTTPStatus, str]] = {
    HTTPError: (_STATUS.BAD_REQUEST, "malformed"),  # carries its own
    WireError: (_STATUS.BAD_REQUEST, "malformed"),
    RequestError: (_STATUS.BAD_REQUEST, "malformed"),
    protocol.ObservationError: (_STATUS.UNPROCESSABLE_ENTITY, "observation"),
    PolicyFailedError: (_STATUS.INTERNAL_SERVER_ERROR, "policy"),
    ShuttingDownError: (_STATUS.SERVICE_UNAVAILABLE, "shutdown"),
}


@dataclass(frozen=True)
class Head:
    """A request up to its body; names of headers are in lower case."""

    method: str
    path: str
    version: str
    headers: Mapping[str, str]

    @property
    def keeps_alive(self) -> bool:
        """Whether the client wants to go on with this connection."""
        connection = self.headers.get("connection", "").lower()
        return "close" not in connection and (
            self.version == "HTTP/1.1" or "keep-alive" in connection
        )


@dataclass(eq=False)
class _Named:
    """A seat that a client calls by name."""

    seat: Seat = field(default_factory=Seat)
    used: float = field(default_factory=time.monotonic)


class RestAdapter:
    """Answers HTTP connections from the engine."""

    def __init__(
        self, engine: Engine, options: ServerOptions, drain: Drain, wires: Sequence[PostWire]
    ) -> None:
        self._engine, self._options, self._drain = engine, options, drain
        self._wires = {wire.path: wire for wire in wires}
        self._named: dict[str, _Named] = {}
        self._warned = False

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one connection's requests until either side ends it."""
        # The first request has to come soon, while a later one may wait for the robot.
        patience = self._options.open_timeout
        try:
            while await self._answer(reader, writer, patience):
                patience = KEEP_ALIVE
        except (ConnectionError, asyncio.IncompleteReadError, TimeoutError):
            log.debug("%s left", writer.get_extra_info("peername"))
        finally:
            writer.close()

    async def _answer(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, patience: float
    ) -> bool:
        """Answer one request; returns whether there may be another."""
        try:
            head = await _read_head(reader, patience)
        except _SilenceError:
            return False
        except HTTPError as error:
            head = error
        with self._drain.answering():
            keep = await self._respond(head, reader, writer)
        if not keep:
            await _linger(reader, writer)
        return keep

    async def _respond(
        self, head: Head | HTTPError, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        """Answer a request whose head was read; returns whether the connection stays open."""
        keep, wire, request, phrase = False, None, None, http.HTTPStatus.OK.phrase
        try:
            if isinstance(head, HTTPError):
                raise head
            wire = self._wire(head)
            body = await self._read_body(head, reader, writer)
            # Only after a body is read to its end does the next request begin where we read on.
            keep = head.keeps_alive
            request = wire.read(body)
            status, payload = http.HTTPStatus.OK, await self._reply(wire, request)
        except tuple(_REFUSALS) as error:
            log.warning("%s: %s", writer.get_extra_info("peername"), brief(error))
            status, reason = _REFUSALS[type(error)]
            if isinstance(error, HTTPError):
                status, reason = error.status, error.reason
            self._engine.metrics.refused(reason)
            phrase = _phrase(error)
            plain_refusal = json_numpy.pack({"error": brief(error)})
            payload = wire.refuse(request, error) if wire else plain_refusal
        if isinstance(payload, str):
            payload = payload.encode()
        keep = keep and not self._drain.begun
        lines = [
            f"HTTP/1.1 {status.value} {phrase}",
            f"Content-Type: {wire.content_type if wire else 'application/json'}",
            f"Content-Length: {len(payload)}",
            f"Connection: {'keep-alive' if keep else 'close'}",
        ]
        # RFC 9110 asks every 401 to name the scheme.
        if status is http.HTTPStatus.UNAUTHORIZED:
            lines.append("WWW-Authenticate: Api-Key")
        writer.write("\r\n".join([*lines, "", ""]).encode("ascii") + payload)
        # A client that does not read its reply is given up on, like one that does not finish.
        async with asyncio.timeout(self._options.open_timeout):
            await writer.drain()
        return keep

    def _wire(self, head: Head) -> PostWire:
        if not self._options.admits(head.headers.get("authorization")):
            raise HTTPError(http.HTTPStatus.UNAUTHORIZED, UNAUTHORIZED, "unauthorized")
        path = head.path.partition("?")[0]
        if path not in self._wires:
            text = f"no {path[:80]!r} here; POST to {' or '.join(self._wires)}"
            raise HTTPError(http.HTTPStatus.NOT_FOUND, text)
        return self._wires[path]

    async def _read_body(
        self, head: Head, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bytes:
        status = http.HTTPStatus
        if "transfer-encoding" in head.headers:
            raise HTTPError(status.LENGTH_REQUIRED, "send a Content-Length, not chunks")
        length = head.headers.get("content-length", "")
        # isdigit alone takes digits of all scripts, which a proxy may read in another way.
        if not (length.isascii() and length.isdigit() and len(length) < 20):
            raise HTTPError(status.LENGTH_REQUIRED, f"Content-Length {length[:40]!r} is no number")
        size, limit = int(length), self._options.max_message_bytes
        # The stated length is enough to refuse a body before any of it takes memory.
        if size > limit:
            text = f"message too large: {size} bytes, {limit} are allowed; send smaller images"
            raise HTTPError(status.REQUEST_ENTITY_TOO_LARGE, text, "too_large")
        # curl waits for this before it sends a large body.
        if head.headers.get("expect", "").lower() == "100-continue":
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        try:
            async with asyncio.timeout(self._options.open_timeout):
                return await reader.readexactly(size)
        except TimeoutError:
            text = f"the body of {size} bytes did not arrive in time"
            raise HTTPError(status.REQUEST_TIMEOUT, text, "timeout") from None

    async def _reply(self, wire: PostWire, request: Request) -> Message:
        status = http.HTTPStatus
        named = self._seat(request)
        if named.seat.waiting:
            text = "this session_id has another request waiting; one session is one robot"
            raise HTTPError(status.CONFLICT, text)
        # With a request waiting the reply is a conflict, and its history must stay.
        if request.reset:
            named.seat.reset()
        if request.obs is None:
            return request.answer or b""
        try:
            reply = await self._engine.act(named.seat, request.obs, request.episode)
        finally:
            named.used = time.monotonic()
        self._engine.metrics.answered(wire.name)
        return wire.write(request, reply)

    def _seat(self, request: Request) -> _Named:
        """The seat that the request names, or one for this request alone."""
        name = request.session
        # Without a name nothing can be remembered: the seat ends with the reply.
        if name is None:
            window = self._engine.metadata.get("window", 1)
            if window > 1 and not self._warned:
                self._warned = True
                log.warning(
                    "POST /act without a session_id: each request is the first of an episode, and "
                    "this policy was trained on a history of %d steps",
                    window,
                )
            return _Named()
        self.forget_idle()
        if name not in self._named:
            if len(self._engine.seats) >= self._options.max_sessions:
                text = f"all {self._options.max_sessions} sessions of this server are in use"
                raise HTTPError(http.HTTPStatus.SERVICE_UNAVAILABLE, text, "full")
            self._named[name] = _Named()
            self._engine.seats.add(self._named[name].seat)
        return self._named[name]

    def forget_idle(self) -> None:
        """Give back the seats of clients that have been away, or never got an answer."""
        limit = self._options.idle_timeout
        oldest = time.monotonic() - limit
        for name, named in list(self._named.items()):
            empty = named.seat.session is None
            if (empty or (limit and named.used < oldest)) and not named.seat.waiting:
                self._engine.seats.discard(named.seat)
                del self._named[name]


def _phrase(error: Exception) -> str:
    """The reason in the status line: all of it that clients of `requests` show their users."""
    return brief(error, MAX_PHRASE).encode("ascii", "replace").decode()


# Given twice, these would mean one thing to a proxy and another to this server.
_SINGLE = ("authorization", "content-length", "transfer-encoding")


async def _linger(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Read on for a moment: closing on unread bytes resets the connection under the reply."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(1.0):
            writer.write_eof()
            while await reader.read(2**16):
                pass


class _SilenceError(Exception):
    """Nothing came, or not enough of it in time to be worth an answer."""


async def _read_head(reader: asyncio.StreamReader, patience: float) -> Head:
    try:
        async with asyncio.timeout(patience):
            raw = await reader.readuntil(b"\r\n\r\n")
    except (TimeoutError, asyncio.IncompleteReadError):
        raise _SilenceError from None
    except asyncio.LimitOverrunError:
        status = http.HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
        raise HTTPError(status, f"more than {MAX_HEADER_BYTES} bytes of headers") from None
    # latin-1 decodes every byte, so no header makes this raise.
    first, *lines = raw.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
    words = first.split(" ")
    if len(words) != 3 or words[2] not in ("HTTP/1.0", "HTTP/1.1"):
        raise HTTPError(http.HTTPStatus.BAD_REQUEST, "not an HTTP/1.1 request")
    if words[0] != "POST":
        text = f"{words[0][:20]!r} on a connection that began with POST"
        raise HTTPError(http.HTTPStatus.METHOD_NOT_ALLOWED, text)
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        key = name.lower()
        if not colon or not name or name != name.strip() or (key in headers and key in _SINGLE):
            text = f"header {line[:60]!r} has no name, or stands there twice"
            raise HTTPError(http.HTTPStatus.BAD_REQUEST, text)
        # Where a harmless header comes twice, the first counts.
        headers.setdefault(key, value.strip())
    return Head(words[0], words[1], words[2], headers)
