"""An evaluation finishes, every episode counted once, whatever is shot at meanwhile."""

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from eval_servers import local_server, results, rollout
from eval_servers.client import PolicyClient
from tests.eval_servers import fake_rollout
from tests.serve.fakes import SERVE, CountingPolicy
from vla_jax.serve import server

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _light(monkeypatch):
    # The tests' own process serves policies; the workers are spawned and do check.
    monkeypatch.setattr(rollout, "HEAVY", ())


def command(port):
    return [sys.executable, "-c", SERVE, str(port), "0.02"]


def run(uri, out, *flags):
    flags = ["--workers=2", "--connect-timeout=60", *flags]
    return fake_rollout.main([f"--server={uri}", f"--out={out}", *flags])


def check_rows(out, count=12):
    score, rows = results.load_run(str(out))
    written = (Path(out) / "episodes.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["index"] for line in written) == list(range(count))
    assert (score["episodes"], score["crashes"], score["missing"]) == (count, 0, 0)
    for row in rows:
        assert row.success == (row.task != "down")
    return score


def after_rows(out, count, act):
    """Call `act` in a thread as soon as that many rows are written."""

    def watch():
        path = Path(out) / "episodes.jsonl"
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if path.exists() and len(path.read_text().splitlines()) >= count:
                act()
                return
            time.sleep(0.01)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def test_a_worker_is_killed_mid_episode(tmp_path):
    out, killed = tmp_path / "run", []

    def kill():
        victim = multiprocessing.active_children()[0]
        killed.append(victim.pid)
        victim.kill()

    with server.background(CountingPolicy(0.02), server.ServerOptions(port=0)) as uri:
        thread = after_rows(out, 2, kill)
        assert run(uri, out) == 0
        thread.join()
    assert killed
    check_rows(out)


def test_the_server_is_killed_and_comes_back_at_the_same_address(tmp_path):
    out, up = tmp_path / "run", local_server.LocalServer(command, restarts=2)
    try:
        uri, first = up.uri, up.pid
        thread = after_rows(out, 2, lambda: os.kill(first, signal.SIGKILL))
        assert run(uri, out) == 0
        thread.join()
        assert up.restarts == 1
        assert up.pid != first
        assert up.uri == uri
    finally:
        up.stop()
    assert check_rows(out)["restarts"] >= 1


class Cable:
    """A TCP relay whose connections can all be cut."""

    def __init__(self, uri):
        self.target = ("127.0.0.1", int(uri.rsplit(":", 1)[1]))
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.uri = f"ws://127.0.0.1:{self.listener.getsockname()[1]}"
        self.ends, self.cuts = [], 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                near, _ = self.listener.accept()
            except OSError:
                return
            far = socket.create_connection(self.target)
            self.ends += [near, far]
            for a, b in ((near, far), (far, near)):
                threading.Thread(target=self._relay, args=(a, b), daemon=True).start()

    def _relay(self, source, sink):
        try:
            while data := source.recv(65536):
                sink.sendall(data)
        except OSError:
            pass
        sever((source, sink))

    def cut(self):
        ends, self.ends = self.ends, []
        self.cuts += bool(ends)
        sever(ends)


def sever(ends):
    for end in ends:
        with contextlib.suppress(OSError):  # the other direction's thread was first
            end.shutdown(socket.SHUT_RDWR)


def test_the_connection_is_cut_again_and_again(tmp_path):
    out = tmp_path / "run"
    with server.background(CountingPolicy(0.02), server.ServerOptions(port=0)) as uri:
        cable = Cable(uri)
        threads = [after_rows(out, count, cable.cut) for count in (1, 4, 7)]
        assert run(cable.uri, out) == 0
        for thread in threads:
            thread.join()
        cable.listener.close()
    assert cable.cuts == 3
    assert check_rows(out)["restarts"] >= 3


def test_the_whole_evaluation_is_killed_and_resumed(tmp_path):
    out = tmp_path / "run"
    script = str(ROOT / "tests" / "eval_servers" / "fake_rollout.py")
    with server.background(CountingPolicy(0.02), server.ServerOptions(port=0)) as uri:
        process = subprocess.Popen(
            [sys.executable, script, f"--server={uri}", f"--out={out}", "--pace=0.05"]
        )
        thread = after_rows(out, 3, process.kill)
        assert process.wait(timeout=120) == -signal.SIGKILL
        thread.join()
        done = len((out / "episodes.jsonl").read_text().splitlines())
        assert 3 <= done < 12
        assert run(uri, out, "--resume", "--pace=0.05") == 0
    check_rows(out)


def test_a_server_that_does_not_come_up_is_an_error():
    broken = [sys.executable, "-c", "import sys; sys.exit(7)"]
    with pytest.raises(local_server.ServerError, match="exit status 7"):
        local_server.LocalServer(lambda port: broken, restarts=1)


def test_a_server_that_keeps_dying_stays_down(caplog):
    up = local_server.LocalServer(command, restarts=0)
    os.kill(up.pid, signal.SIGKILL)
    up._watchman.join(timeout=30)
    assert "stays down" in caplog.text
    up.stop()
    assert up.restarts == 0


def test_stopping_ends_the_process():
    up = local_server.LocalServer(command, restarts=3)
    with PolicyClient(up.uri) as client:
        assert client.metadata["model"] == "counting"
    pid = up.pid
    up.stop()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_one_that_is_interrupted_before_it_listens_is_ended(monkeypatch):
    started = []

    def interrupted(_, process):
        started.append(process)
        raise KeyboardInterrupt

    monkeypatch.setattr(local_server.LocalServer, "_wait_until_it_listens", interrupted)
    sleeping = [sys.executable, "-c", "import time; time.sleep(60)"]
    with pytest.raises(KeyboardInterrupt):
        local_server.LocalServer(lambda port: sleeping, restarts=1)
    assert started[0].poll() is not None
