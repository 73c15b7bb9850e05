"""launch/evaluate.py, from a running server and from a checkpoint whose server is killed."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from eval_servers import results
from tests.eval_servers.test_tabletop_rollout import OpenHand
from tests.test_quickstart import TINY
from vla_jax.serve import server

ROOT = Path(__file__).resolve().parents[1]
EVALUATE = [sys.executable, "launch/evaluate.py", "tabletop"]
ROLLOUT = ["--", "--image-size=32", "--max-steps=3"]


def run(*arguments):
    return subprocess.run(
        [*EVALUATE, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=600
    )


def test_a_running_server_gives_rows_score_and_page(tmp_path):
    with server.background(OpenHand(), server.ServerOptions(port=0)) as uri:
        inputs = [f"--server={uri}", "--workers=2", f"--out={tmp_path / 'one'}"]
        done = run(*inputs, *ROLLOUT, "--episodes=4")
        assert done.returncode == 0, done.stderr
        inputs[-1] = f"--out={tmp_path / 'two'}"
        earlier = f"--against=one={tmp_path / 'one'}"
        again = run(*inputs, earlier, *ROLLOUT, "--episodes=6", "--sanity=warn")
    assert again.returncode == 0, again.stderr
    assert "fail  instruction" in again.stderr  # it holds its hand open, whatever it is told
    score, rows = results.load_run(str(tmp_path / "two"))
    assert [row.index for row in sorted(rows, key=lambda row: row.index)] == list(range(6))
    assert score["protocol"]["environment"] == "tabletop"
    assert score["protocol"]["simulator"]["driver"]
    page = (tmp_path / "two" / "report" / "index.html").read_text()
    assert "Against one" in page
    assert "4 episodes" in page


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--out=x"], "either --checkpoint"),
        (["--out=x", "--checkpoint=a", "--server=b"], "either --checkpoint"),
        (["--out=x", "--server=ws://127.0.0.1:9", "--", "--connect-timeout=0.1"], "no policy"),
        (["--out=x", "--server=ws://h:1", "--", "--no-such-flag"], "--no-such-flag"),
    ],
)
def test_mistakes_are_told(flags, words, tmp_path):
    done = run(*(flag.replace("=x", f"={tmp_path / 'x'}") for flag in flags))
    assert done.returncode != 0
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def children(pid):
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []


def command(pid):
    return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")


@pytest.mark.slow
def test_server_and_worker_are_killed_and_every_episode_counts_once(tmp_path):
    data, run_dir, out = tmp_path / "data/tabletop/1.0.0", tmp_path / "run", tmp_path / "out"
    flags = [f"--config.{key}={value}" for key, value in TINY.items()]
    record = ["launch/record_demos.py", "--out", data, "--episodes=26", "--size=32"]
    train = ["launch/train.py", f"--config=configs/quickstart.py:{data}", "--workdir", run_dir]
    for stage in (record, [*train, *flags]):
        subprocess.run([sys.executable, *map(str, stage)], cwd=ROOT, check=True)
    settings = ["--sanity=off", "--", "--image-size=32", "--max-steps=40", "--episodes=16"]
    process = subprocess.Popen(
        [*EVALUATE, f"--checkpoint={run_dir}", f"--out={out}", "--workers=2", *settings], cwd=ROOT
    )
    killed = []

    def shoot():
        while process.poll() is None and len(killed) < 2:
            time.sleep(0.05)
            path = out / "episodes.jsonl"
            rows = len(path.read_text().splitlines()) if path.exists() else 0
            for child in children(process.pid):
                if "launch.serve" in command(child) and rows >= 2 and "server" not in killed:
                    os.kill(child, signal.SIGKILL)
                    killed.append("server")
                workers = [c for c in children(child) if "multiprocessing.spawn" in command(c)]
                if "rollout.py" in command(child) and rows >= 6 and workers:
                    os.kill(workers[0], signal.SIGKILL)
                    killed.append("worker")

    thread = threading.Thread(target=shoot)
    thread.start()
    assert process.wait(timeout=900) == 0
    thread.join()
    assert sorted(killed) == ["server", "worker"]
    written = [json.loads(line) for line in (out / "episodes.jsonl").read_text().splitlines()]
    assert sorted(row["index"] for row in written) == list(range(16))
    score, _ = results.load_run(str(out))
    assert (score["episodes"], score["crashes"], score["missing"]) == (16, 0, 0)
    assert score["restarts"] >= 1
    policy = score["protocol"]["server"]
    assert len(policy["checkpoint"]) == len(policy["statistics"]) == 16
    assert (out / "report" / "index.html").exists()
