import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval_servers import cli, results, rollout
from tests.eval_servers import fake_rollout
from tests.eval_servers.fake_env import FakeEnv
from tests.serve.fakes import CountingPolicy
from vla_jax.serve import server

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _light(monkeypatch):
    # The tests' own process serves policies; the workers are spawned and do check.
    monkeypatch.setattr(rollout, "HEAVY", ())


class Sees(CountingPolicy):
    """Answers the image's mean and, unless deaf, the prompt's length in the arm."""

    hears = True

    def infer(self, session, obs):
        reply, session = super().infer(session, obs)
        actions = np.zeros_like(reply["actions"])
        actions[:, 0] = obs["observation/image"].mean() / 255
        actions[:, 1] = self.hears * len(obs["prompt"]) / 100
        actions[:, 6] = 1
        return {"actions": actions}, session


@pytest.fixture
def uri():
    with server.background(Sees(), server.ServerOptions(port=0)) as uri:
        yield uri


class Deaf(Sees):
    hears = False


@pytest.fixture
def deaf():
    with server.background(Deaf(), server.ServerOptions(port=0)) as uri:
        yield uri


def run(uri, out, *flags):
    return fake_rollout.main([f"--server={uri}", f"--out={out}", "--workers=1", *flags])


def test_sanity_alone(uri, tmp_path, capsys):
    assert run(uri, tmp_path / "run", "--sanity=only") == 0
    message = capsys.readouterr().err
    assert "ok    image" in message
    assert "ok    instruction" in message
    assert not (tmp_path / "run").exists()


def test_a_failed_suite_stops_a_long_evaluation(deaf, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "LONG", 12)
    assert run(deaf, tmp_path / "run") == cli.UNWELL
    message = capsys.readouterr().err
    assert "fail  instruction" in message
    assert "-> the instruction does not reach the network" in message
    assert "--sanity=warn" in message
    assert not (tmp_path / "run").exists()


def test_a_short_one_is_not_held_up_and_warn_goes_on_with_it_on_record(deaf, tmp_path):
    assert run(deaf, tmp_path / "short", "--episodes=2") == 0
    assert run(deaf, tmp_path / "warned", "--episodes=2", "--sanity=warn") == 0
    short, _ = results.load_run(str(tmp_path / "short"))
    warned, _ = results.load_run(str(tmp_path / "warned"))
    assert short["conditions"]["sanity"] == []
    outcomes = {each["name"]: each["level"] for each in warned["conditions"]["sanity"]}
    assert outcomes["instruction"] == "fail"
    assert short["protocol"] == warned["protocol"]


def test_the_last_shard_puts_all_of_them_together(uri, tmp_path, capsys):
    assert run(uri, tmp_path, "--shard=1/3") == 0
    assert "the other shards are not yet" in capsys.readouterr().out
    assert run(uri, tmp_path, "--shard=0/3") == 0
    assert not (tmp_path / "score.json").exists()
    assert run(uri, tmp_path, "--shard=2/3") == 0
    assert "(8/12" in capsys.readouterr().out
    score, rows = results.load_run(str(tmp_path))
    assert [row.index for row in rows] == list(range(12))
    assert (score["episodes"], score["missing"]) == (12, 0)
    shard, part = results.load_run(str(tmp_path / "shard-1-of-3"))
    assert [row.index for row in part] == [1, 4, 7, 10]
    assert (shard["missing"], shard["conditions"]["shard"]) == (8, "1/3")
    assert (tmp_path / next(row.video for row in rows if row.video)).exists()


def children(pid):
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux's /proc")
def test_whoever_is_told_to_end_takes_the_workers_along(uri, tmp_path):
    flags = [f"--server={uri}", f"--out={tmp_path / 'run'}", "--workers=2", "--pace=60"]
    command = [sys.executable, "-m", "tests.eval_servers.fake_rollout", *flags]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    # Two workers and multiprocessing's own helper.
    while len(workers := children(process.pid)) < 3 and time.monotonic() < until:
        time.sleep(0.2)
    process.terminate()
    message = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "interrupted; --resume goes on from here" in message
    assert len(workers) == 3
    while any(Path(f"/proc/{pid}").is_dir() for pid in workers) and time.monotonic() < until:
        time.sleep(0.2)
    assert not [pid for pid in workers if Path(f"/proc/{pid}").is_dir()]


def test_workers_are_spread_over_several_servers(tmp_path):
    single, two = CountingPolicy(), CountingPolicy()
    options = server.ServerOptions(port=0)
    with server.background(single, options) as a, server.background(two, options) as b:
        assert run(f"{a},{b}", tmp_path / "run", "--workers=2", "--pace=0.02") == 0
        assert single.sessions > 0
        assert two.sessions > 0
        two.metadata["step"] = 9
    two.metadata["step"] = 9
    with server.background(single, options) as a, server.background(two, options) as b:
        assert run(f"{a},{b}", tmp_path / "other") == 1


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        ([], "name --server and --out"),
        (["--server=ws://127.0.0.1:9"], "name --out"),
        (["--server=,", "--out=x"], "no server was named"),
    ],
)
def test_what_is_missing_is_one_line(flags, word, capsys):
    assert fake_rollout.main(flags) == 1
    message = capsys.readouterr().err
    assert message.startswith("rollout: ")
    assert word in message


@pytest.mark.parametrize("shard", ["3", "3/3", "-1/2", "a/b"])
def test_bad_shards(shard, capsys):
    with pytest.raises(SystemExit):
        fake_rollout.main([f"--shard={shard}"])
    assert "shard" in capsys.readouterr().err


def test_frame_draws_without_a_server_and_tells_a_blank_one(tmp_path, capsys, monkeypatch):
    path = tmp_path / "frame.png"
    assert fake_rollout.main([f"--frame={path}"]) == 1  # this world is one grey level
    parsed = json.loads(capsys.readouterr().out)
    assert parsed["blank"] == ["observation/image", "observation/wrist_image"]
    assert Image.open(path).size == (8, 4)
    noise = np.random.default_rng(0).integers(0, 255, (6, 4, 3), np.uint8)
    monkeypatch.setattr(FakeEnv, "_observe", lambda self: {"observation/image": noise})
    assert fake_rollout.main([f"--frame={path}"]) == 0
    assert json.loads(capsys.readouterr().out)["pictures"] == {"observation/image": [6, 4, 3]}


def test_an_out_that_is_a_file_is_said_before_a_server_is_waited_for(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert fake_rollout.main(["--server=ws://127.0.0.1:9", f"--out={tmp_path}/file"]) == 1
    assert "file is a file, not a folder" in capsys.readouterr().err
