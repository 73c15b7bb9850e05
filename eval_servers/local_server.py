"""A policy server as a child process that is started again when it dies.

    with local_server.running(["--checkpoint", "runs/quickstart"]) as server:
        ...                                             # clients connect to server.uri

The address outlives a crash: clients reconnect, start their episode over and find the same policy.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Callable, Iterator, List, Sequence

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[1]
MAX_RESTARTS = 5  # of one server
_READY = "listening on "
_STOP_SECONDS = 20.0  # for a server to close by itself


class ServerError(RuntimeError):
    """The server did not come up; its own output says why."""


class LocalServer:
    """The process and its watchman.

    Attributes:
        uri: ws://host:port.
        restarts: how often it had to be started again.
    """

    def __init__(self, command: Callable[[int], Sequence[str]], restarts: int) -> None:
        """Start and wait until it listens.

        Args:
            command: port -> what to run; prints "listening on URI" once clients can connect.
            restarts: at most this many.

        Raises:
            ServerError: it ended instead.
        """
        self._command, self._allowed, self.restarts = command, restarts, 0
        self._port, self._stopping = _free_port(), threading.Event()
        self._process = self._start()
        try:
            self.uri = self._wait_until_it_listens(self._process)
        except BaseException:  # Ctrl-C, or SIGTERM: nobody else knows the process yet
            self._end(self._process)
            raise
        if not self.uri:
            status = self._process.wait()
            raise ServerError(
                "the policy server ended with exit status {} before it listened; see its error"
                " above".format(status)
            )
        self._watchman = threading.Thread(target=self._watch, name="server-watch", daemon=True)
        self._watchman.start()

    @property
    def pid(self) -> int:
        """Process id of the server as it runs now."""
        return self._process.pid

    def stop(self) -> None:
        """End the server for good."""
        self._stopping.set()
        self._end(self._process)
        self._watchman.join()

    def _watch(self) -> None:
        while not self._stopping.is_set():
            for _ in self._process.stdout or ():  # whatever else it prints, so that it never blocks
                pass
            status = self._process.wait()
            if self._stopping.is_set():
                return
            # A server that keeps dying is broken, and clients should see that it is away.
            if self.restarts == self._allowed:
                log.error("the policy server died %d times; it stays down", self.restarts + 1)
                return
            self.restarts += 1
            log.warning("the policy server died (exit status %s); starting it again", status)
            # The pause doubles up to half a minute, and `stop` ends it at once.
            if self._stopping.wait(timeout=min(2.0 ** (self.restarts - 1), 30.0) - 1.0):
                return
            self._process = self._start()
            if self._stopping.is_set():  # meanwhile `stop` has ended the one before
                self._end(self._process)
                return
            if self._wait_until_it_listens(self._process):
                log.warning("the policy server is up again")

    def _start(self) -> Any:
        path = os.pathsep.join([str(ROOT)] + [p for p in [os.environ.get("PYTHONPATH")] if p])
        return subprocess.Popen(
            # The same port each time, so that clients find the new process at the old address.
            list(self._command(self._port)),
            env=dict(os.environ, PYTHONPATH=path),
            stdout=subprocess.PIPE,
            universal_newlines=True,
        )

    def _wait_until_it_listens(self, process: Any) -> str:
        """Return the server's address, or "" if it ended first."""
        for line in process.stdout:
            if line.startswith(_READY):
                return line[len(_READY) :].strip()
        return ""

    @staticmethod
    def _end(process: Any) -> None:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(timeout=_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
        process.wait()


@contextlib.contextmanager
def running(serve_flags: Sequence[str], restarts: int = MAX_RESTARTS) -> Iterator[LocalServer]:
    """`launch/serve.py` on a free port of this machine, for the length of a `with` block.

    Args:
        serve_flags: all but --port, as ["--checkpoint", DIR].
        restarts: how often it may be started again.

    Raises:
        ServerError: it does not come up.
    """

    def command(port: int) -> List[str]:
        program = [sys.executable, "-m", "vla_jax.launch.serve"]
        return [*program, *serve_flags, "--port={}".format(port)]

    server = LocalServer(command, restarts)
    try:
        yield server
    finally:
        server.stop()


def _free_port() -> int:
    with socket.socket() as probe:
        # Port 0 lets the system choose one that is free now.
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
