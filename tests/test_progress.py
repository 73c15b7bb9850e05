"""Bars of long work."""

import io
import sys
import time

from vla_jax import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def go_through(monkeypatch, stream, steps):
    monkeypatch.setattr(sys, "stderr", stream)
    recorded = []
    for step in progress.bar(range(steps), desc="work"):
        time.sleep(0.02)
        recorded.append(step)
    assert recorded == list(range(steps))
    return stream.getvalue()


def test_a_log_file_gets_few_whole_lines(monkeypatch):
    monkeypatch.setattr(progress, "LOG_INTERVAL", 0.2)
    written = go_through(monkeypatch, io.StringIO(), 60)
    lines = list(filter(None, written.replace("\r", "").splitlines()))
    assert 2 <= len(lines) <= 10
    assert all(line.startswith("work: ") for line in lines)
    assert "60/60" in lines[-1]


def test_short_work_leaves_no_line_in_a_log_file(monkeypatch):
    assert go_through(monkeypatch, io.StringIO(), 3) == ""


def test_a_terminal_sees_it_at_once(monkeypatch):
    assert "\r" in go_through(monkeypatch, Terminal(), 3)
