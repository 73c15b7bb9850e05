"""One progress line, without dependencies."""

from __future__ import annotations

import sys
import time
from typing import Any, Optional, TextIO


class Progress:
    """`[ 37/200] success 71.2 % (26)  3.1 episodes/s  0:52 left`, rewritten in place on a terminal.

    Episodes lost to a crash of the simulator are counted apart from the success. Elsewhere (a log
    file) a new line appears at most every 30 seconds, and at the end.
    """

    def __init__(
        self, total: int, done: int = 0, successes: int = 0, stream: Optional[TextIO] = None
    ) -> None:
        """Start at `done` episodes, of which `successes`; a resumed run starts above zero."""
        self._total, self._done, self._successes, self._crashes = total, done, successes, 0
        self._stream = stream or sys.stderr
        self._start = self._shown = time.monotonic()
        # Episodes of an earlier run must not count in this run's speed.
        self._before = done

    def add(self, success: bool, crashed: bool = False) -> None:
        """Count one episode."""
        self._done += 1
        self._successes += bool(success)
        self._crashes += bool(crashed)
        current_time = time.monotonic()
        # A log file cannot be rewritten in place, so it gets few lines.
        if self._stream.isatty() or self._done == self._total or current_time - self._shown > 30.0:
            self._shown = current_time
            end = "" if self._stream.isatty() else "\n"
            self._stream.write(("\r\x1b[K" if not end else "") + self.line() + end)
            self._stream.flush()

    def line(self) -> str:
        """The line as it stands."""
        seconds = max(time.monotonic() - self._start, 1e-6)
        rate = (self._done - self._before) / seconds
        left = (self._total - self._done) / rate if rate else 0.0
        width = len(str(self._total))
        # A crash of the simulator says nothing about the policy.
        ran = max(self._done - self._crashes, 1)
        line = "[{:{w}d}/{}] success {:.1f} % ({})  {:.2g} episodes/s  {}:{:02d} left".format(
            self._done,
            self._total,
            100.0 * self._successes / ran,
            self._successes,
            rate,
            int(left) // 60,
            int(left) % 60,
            w=width,
        )
        return line + ("  {} crashed".format(self._crashes) if self._crashes else "")

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._stream.isatty():
            self._stream.write("\n")
