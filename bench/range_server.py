"""A web server that sends ranges of files, a stand-in for an object store.

Single-threaded and without a framework, so that on a machine of two cores it takes little from the
loader that is measured.
"""

import asyncio
import html
import os
import re
import threading
from collections import deque
from email.utils import formatdate
from pathlib import Path
from typing import Self
from urllib.parse import unquote

_REQUEST = re.compile(rb"(GET|HEAD) (\S+) HTTP/1\.[01]\r\n")
_RANGE = re.compile(rb"\r\nRange: *bytes=(\d*)-(\d*)", re.IGNORECASE)
_TICK = 0.001  # s between two looks at the requests that wait, since a look costs as well


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
        self._paths: dict[bytes, Path] = {}
        self._files: dict[Path, _File] = {}
        # All wait equally long, so that they are answered in the order in which they came.
        self._waiting: deque[tuple[float, asyncio.Transport, bytes]] = deque()
        self._loop, started = asyncio.new_event_loop(), threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,), daemon=True)
        self._thread.start()
        started.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

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
        method, name = matched[1], matched[2]
        if self.failures and method == b"GET":
            self.failures -= 1
            return _answer("503 Service Unavailable", b"")
        file = self._file(name)
        if file is None:
            return self._listing(unquote(name.decode()).strip("/"))
        if method == b"HEAD":
            return _answer("200 OK", b"", file.more, file.size)
        asked = _RANGE.search(head) if self._takes_ranges else None
        if not asked:
            self.requests.append((file.name, 0, file.size))
            return _answer("200 OK", os.pread(file.fd, file.size, 0), file.more)
        first, stop = int(asked[1] or 0), file.size
        if asked[2]:
            stop = min(int(asked[2]) + 1, stop)
        if first >= file.size:
            return _answer("416 Range Not Satisfiable", b"")
        data = os.pread(file.fd, stop - first, first)
        self.requests.append((file.name, first, len(data)))
        size = len(data)
        return file.part % (size, first, first + size - 1) + data

    def _file(self, name: bytes) -> "_File | None":
        """A file by its name in a URL, kept open until another takes its place; None: no file."""
        path = self._paths.get(name)
        if path is None:
            path = (self._folder / unquote(name.decode()).lstrip("/")).resolve()
            if not path.is_relative_to(self._folder.resolve()) or not path.is_file():
                return None
            self._paths[name] = path
        try:
            status = os.stat(path)
        except FileNotFoundError:
            return None
        file = self._files.get(path)
        if file is None or file.version != (status.st_mtime_ns, status.st_size, status.st_ino):
            relative = str(path.relative_to(self._folder.resolve()))
            file = self._files[path] = _File(path, relative, self._takes_ranges)
        return file

    def _listing(self, name: str) -> bytes:
        """Links to what lies in a folder."""
        path = (self._folder / name).resolve()
        if not path.is_relative_to(self._folder.resolve()) or not path.is_dir():
            return _answer("404 Not Found", b"")
        names = sorted(p.name + "/" * p.is_dir() for p in path.iterdir())
        base = f"/{name}/" if name else "/"
        links = (f'<a href="{base}{html.escape(n)}">{html.escape(n)}</a>' for n in names)
        return _answer("200 OK", "\n".join(links).encode(), ["Content-Type: text/html"])

    def came(self, transport: asyncio.Transport, head: bytes) -> None:
        """Has a request answered when its time is there."""
        self._waiting.append((self._loop.time() + self._latency, transport, head))
        if len(self._waiting) == 1:
            self._loop.call_at(self._waiting[0][0], self._send)

    def _send(self) -> None:
        """Answers all requests whose time is there, and comes back for the others."""
        moment = self._loop.time()
        while self._waiting and self._waiting[0][0] <= moment:
            _, transport, head = self._waiting.popleft()
            if not transport.is_closing():
                transport.write(self.answer(head))
        if self._waiting:
            self._loop.call_at(max(self._waiting[0][0], moment + _TICK), self._send)


class _File:
    """An opened file and what the answers about it begin with."""

    def __init__(self, path: Path, name: str, takes_ranges: bool):
        self.name, self.fd = name, os.open(path, os.O_RDONLY)
        status = os.fstat(self.fd)
        self.size = status.st_size
        self.version = status.st_mtime_ns, status.st_size, status.st_ino
        self.more = [
            f"Last-Modified: {formatdate(status.st_mtime, usegmt=True)}",
            f'ETag: "{status.st_mtime_ns:x}-{status.st_size:x}"',
            "Accept-Ranges: bytes" if takes_ranges else "Accept-Ranges: none",
        ]
        lines = ["HTTP/1.1 206 Partial Content", "Content-Length: %d", *self.more]
        lines += [f"Content-Range: bytes %d-%d/{self.size}", "", ""]
        self.part = "\r\n".join(lines).encode()  # of a range; its length, first and last byte

    def __del__(self, close=os.close):
        close(self.fd)


class _Connection(asyncio.Protocol):
    """One connection, kept for the next request."""

    def __init__(self, server: RangeServer):
        self._server, self._received = server, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        *heads, self._received = (self._received + data).split(b"\r\n\r\n")
        for head in heads:
            self._server.came(self._transport, head + b"\r\n")


def _answer(status: str, body: bytes, more: list[str] | None = None, length: int = -1) -> bytes:
    size = len(body) if length < 0 else length
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {size}", *(more or [])]
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + body
