"""A web server that sends ranges of files, a stand-in for an object store.

Single-threaded and without a framework, so that on a machine of two cores it takes little from the
loader that is measured.
"""

import asyncio
import html
import os
import re
import threading
import time
from email.utils import formatdate
from pathlib import Path
from typing import NamedTuple, Self
from urllib.parse import unquote

_REQUEST = re.compile(rb"(GET|HEAD) (\S+) HTTP/1\.[01]\r\n")
_RANGE = re.compile(rb"\r\nRange: *bytes=(\d*)-(\d*)", re.IGNORECASE)


class RangeServer:
    """Serves the files of a folder on the loopback interface from a thread of its own.

    Attributes:
        url: of the folder.
        requests: (path, first byte, bytes sent) of every GET that sent part of a file or all of it.
        failures: GETs to answer with status 503 from now on, before it goes on as usual.
    """

    def __init__(self, folder: Path, latency: float = 0.0, takes_ranges: bool = True):
        """Starts serving.

        Args:
            folder: what is served.
            latency: seconds that every answer waits.
            takes_ranges: else every answer is the whole file, as some servers have it.
        """
        self._folder, self._latency, self._takes_ranges = folder, latency, takes_ranges
        self.requests: list[tuple[str, int, int]] = []
        self.failures = 0
        self._files: dict[str, _File] = {}
        self._loop, started = asyncio.new_event_loop(), threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,), daemon=True)
        self._thread.start()
        started.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        for file in self._files.values():
            os.close(file.descriptor)

    @property
    def sent(self) -> int:
        """Bytes of files that were sent."""
        return sum(size for _, _, size in self.requests)

    def _run(self, started: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        listening = self._loop.create_server(lambda: _Connection(self), "127.0.0.1", 0)
        server = self._loop.run_until_complete(listening)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        started.set()
        self._loop.run_forever()

    def answer(self, head: bytes) -> bytes:
        """The answer to a request."""
        matched = _REQUEST.match(head)
        if not matched:
            return _answer("400 Bad Request", b"")
        method, name = matched[1].decode(), unquote(matched[2].decode()).lstrip("/")
        if self.failures and method == "GET":
            self.failures -= 1
            return _answer("503 Service Unavailable", b"")
        file = self._file(name)
        if file is None:
            return _answer("404 Not Found", b"")
        if isinstance(file, Path):
            names = sorted(p.name + "/" * p.is_dir() for p in file.iterdir())
            base = f"/{name.rstrip('/')}/" if name else "/"
            links = (f'<a href="{base}{html.escape(n)}">{html.escape(n)}</a>' for n in names)
            return _answer("200 OK", "\n".join(links).encode(), ["Content-Type: text/html"])
        asked = _RANGE.search(head) if self._takes_ranges else None
        if method == "HEAD":
            return _answer("200 OK", b"", file.lines, file.size)
        first, stop, code, more = 0, file.size, "200 OK", file.lines
        if asked:
            first = int(asked[1] or 0)
            stop = min(int(asked[2]) + 1 if asked[2] else stop, stop)
            if first >= file.size:
                return _answer("416 Range Not Satisfiable", b"")
            code = "206 Partial Content"
            more = [*more, f"Content-Range: bytes {first}-{stop - 1}/{file.size}"]
        data = os.pread(file.descriptor, stop - first, first)
        self.requests.append((name, first, len(data)))
        return _answer(code, data, more)

    def _file(self, name: str) -> "_File | Path | None":
        """What is served under a name: a file, which stays open, a folder, or nothing."""
        path = self._folder / name
        try:
            status = os.stat(path)
        except OSError:
            return None
        version = (status.st_ino, status.st_mtime_ns, status.st_size)
        file = self._files.get(name)
        # To find links out of the folder takes a call for every folder above.
        if file is None or file.version != version:
            if not path.resolve().is_relative_to(self._folder.resolve()):
                return None
            if path.is_dir():
                return path
            if file is not None:
                os.close(file.descriptor)
            lines = [
                f"Last-Modified: {formatdate(status.st_mtime, usegmt=True)}",
                f'ETag: "{status.st_mtime_ns:x}-{status.st_size:x}"',
                "Accept-Ranges: bytes" if self._takes_ranges else "Accept-Ranges: none",
            ]
            descriptor = os.open(path, os.O_RDONLY)
            file = self._files[name] = _File(version, descriptor, status.st_size, lines)
        return file


class _File(NamedTuple):
    """A file that is open, its version and what every answer says of it."""

    version: tuple[int, int, int]
    descriptor: int
    size: int
    lines: list[str]


class _Connection(asyncio.Protocol):
    """One connection, kept for the next request."""

    def __init__(self, server: RangeServer):
        self._server, self._received = server, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        while b"\r\n\r\n" in self._received:
            head, _, self._received = self._received.partition(b"\r\n\r\n")
            came = time.monotonic()
            answer = self._server.answer(head + b"\r\n")
            loop = asyncio.get_running_loop()
            wait = self._server._latency - (time.monotonic() - came)
            loop.call_later(max(wait, 0.0), self._send, answer)

    def _send(self, answer: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(answer)


def _answer(status: str, body: bytes, more: list[str] | None = None, length: int = -1) -> bytes:
    size = len(body) if length < 0 else length
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {size}", *(more or [])]
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + body
