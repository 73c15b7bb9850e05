"""Killed workers, killed servers and cut connections: every episode is counted, once."""

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from eval_servers import rollout
from tests.eval_servers.fake_env import TASKS, FakeEnv
from tests.serve.fakes import SERVE, CountingPolicy
from vla_jax.serve import server

ROOT = Path(__file__).resolve().parents[2]


def episodes(count):
    return [rollout.Episode(i, i, TASKS[i % len(TASKS)], "go") for i in range(count)]


def check(score, folder, count):
    rows = [json.loads(line) for line in (folder / "episodes.jsonl").read_text().splitlines()]
    assert Counter(row["index"] for row in rows) == dict.fromkeys(range(count), 1)
    assert score["episodes"] == count
    # What FakeEnv solves does not depend on what happened on the way.
    assert score["successes"] == sum(TASKS[i % len(TASKS)] != "down" for i in range(count))
    return rows


class Cable:
    """A TCP relay that can be cut: all its connections end at once, new ones are taken."""

    def __init__(self, uri: str) -> None:
        self._target = ("127.0.0.1", int(uri.rpartition(":")[2]))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self.uri = f"ws://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> int:
        ends, self._open = self._open, []
        for end in ends:
            with_errors_ignored(end.shutdown, socket.SHUT_RDWR)
            end.close()
        return len(ends) // 2

    def close(self) -> None:
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target)
            except OSError:
                return
            self._open += [near, far]
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=_pump, args=(source, sink), daemon=True).start()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    try:
        while data := source.recv(2**16):
            sink.sendall(data)
    except OSError:
        pass
    with_errors_ignored(sink.shutdown, socket.SHUT_RDWR)


def with_errors_ignored(function, *args):
    try:
        function(*args)
    except OSError:
        return


def in_background(action):
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    return thread


def wait_for_rows(folder, count):
    path = folder / "episodes.jsonl"
    while not path.exists() or len(path.read_text().splitlines()) < count:
        time.sleep(0.01)


def test_connections_cut_again_and_again(tmp_path):
    cuts = []
    with server.background(CountingPolicy(seconds=0.02), server.ServerOptions(port=0)) as uri:
        cable = Cable(uri)

        def cut():
            for rows in (2, 5, 8):
                wait_for_rows(tmp_path, rows)
                cuts.append(cable.cut())

        thread = in_background(cut)
        options = rollout.Options(cable.uri, max_steps=6, workers=2)
        score = rollout.evaluate(FakeEnv, episodes(16), str(tmp_path), options, {})
        thread.join(timeout=10)
        cable.close()
    rows = check(score, tmp_path, 16)
    assert sum(cuts) >= 3
    assert sum(row["restarts"] for row in rows) >= 1


def start_server(port):
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(port), "0.01"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, process.stdout.readline().strip().removeprefix("listening on ")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_server_killed_and_started_again(tmp_path, number):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [start_server(port)[0]]

    def kill():
        wait_for_rows(tmp_path, 3)
        processes[0].send_signal(number)
        processes[0].wait()
        processes.append(start_server(port)[0])

    try:
        thread = in_background(kill)
        options = rollout.Options(f"ws://127.0.0.1:{port}", max_steps=12, workers=2)
        score = rollout.evaluate(FakeEnv, episodes(24), str(tmp_path), options, {})
        thread.join(timeout=60)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    rows = check(score, tmp_path, 24)
    assert len(processes) == 2
    assert sum(row["restarts"] for row in rows) >= 1


def test_workers_killed_in_the_middle(tmp_path):
    trouble = {2: ("segfault", 1), 7: ("segfault", 1)}
    (tmp_path / "trouble").mkdir()
    make_env = functools.partial(FakeEnv, str(tmp_path / "trouble"), trouble)
    with server.background(CountingPolicy(), server.ServerOptions(port=0)) as uri:
        options = rollout.Options(uri, max_steps=6, workers=2)
        score = rollout.evaluate(make_env, episodes(10), str(tmp_path / "run"), options, {})
    check(score, tmp_path / "run", 10)
