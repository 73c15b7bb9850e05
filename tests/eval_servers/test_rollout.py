import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval_servers import lock, pool, results, rollout
from eval_servers.client import PolicyClient, PolicyServerError, SessionLostError
from eval_servers.progress import Progress
from tests.eval_servers.fake_env import TASKS, FakeEnv, save_text
from tests.serve.fakes import CountingPolicy
from vla_jax.serve import server

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def policy():
    return CountingPolicy(fail_on="crash")


@pytest.fixture
def uri(policy):
    with server.background(policy, server.ServerOptions(port=0, max_message_bytes=2**20)) as uri:
        yield uri


def make_episodes(count, instruction="go"):
    return [rollout.Episode(i, 100 + i, TASKS[i % len(TASKS)], instruction) for i in range(count)]


def evaluate(uri, out, count=12, make_env: Any = FakeEnv, save=None, instruction="go", **changes):
    options: dict[str, Any] = {"max_steps": 6, "workers": 2, "connect_timeout": 10.0, **changes}
    return rollout.evaluate(
        make_env,
        make_episodes(count, instruction),
        str(out),
        rollout.Options(uri, **options),
        {"environment": "fake"},
        save,
    )


def rows_of(out):
    return sorted(results.load_rows(str(out / "episodes.jsonl")), key=lambda row: row.index)


def test_one_episode(uri):
    episode = rollout.Episode(3, 2, "up", "raise it")
    frames = []
    with PolicyClient(uri) as client:
        row = rollout.run_episode(FakeEnv(), client, episode, max_steps=6, frames=frames)
        again = rollout.run_episode(FakeEnv(), client, episode, max_steps=2, execute_steps=2)
    assert (row.index, row.seed, row.task) == (3, 2, "up")
    assert row.instruction == "raise it"
    assert (row.success, row.steps, row.error, row.restarts) == (True, 3, None, 0)
    assert len(row.round_trip_ms) == len(row.server_ms) == 3
    assert [frame[0, 0, 0] for frame in frames] == [0, 1, 2, 3]
    assert (again.success, again.steps) == (False, 2)
    assert len(again.round_trip_ms) == 1


def test_only_what_the_policy_takes_is_sent():
    obs = FakeEnv().reset(rollout.Episode(0, 0, "up", "go"))
    single = {"cameras": {"primary": "observation/image"}}
    assert set(rollout.select(obs, single)) == {"observation/image"}
    assert set(rollout.select(obs, {**single, "needs_proprio": True})) == {
        "observation/image",
        "observation/state",
    }
    assert rollout.select(obs, {}) == obs


class Unreliable:
    """A client whose connection drops at the given requests."""

    def __init__(self, drops):
        self.metadata, self.requests, self.steps, self.drops = {}, 0, 0, drops

    def reset(self):
        self.steps = 0

    def infer(self, obs):
        self.requests += 1
        if self.requests in self.drops:
            raise SessionLostError("cable")
        self.steps += 1
        return {"actions": np.full((1, 7), self.steps)}


def test_a_lost_session_starts_the_episode_over():
    client = Unreliable({2, 4})
    episode = rollout.Episode(0, 2, "up", "go")
    row = rollout.run_episode(FakeEnv(), client, episode, max_steps=6)
    assert (row.success, row.steps, row.restarts) == (True, 3, 2)
    assert len(row.round_trip_ms) == 3
    with pytest.raises(PolicyServerError, match="lost its connection 4 times"):
        rollout.run_episode(FakeEnv(), Unreliable(range(100)), episode, max_steps=6)


def test_the_simulator_draws_only_when_the_policy_is_asked(uri):
    drawn, wanted = [], []

    class Drawing(FakeEnv):
        def observe(self, keys=None):
            wanted.append(keys)
            return self._observe()

        def _observe(self):
            drawn.append(self._steps)
            return super()._observe()

    with PolicyClient(uri) as client:
        episode = rollout.Episode(0, 4, "down", "go")
        row = rollout.run_episode(Drawing(), client, episode, 10, execute_steps=4)
    assert row.steps == 10
    assert drawn == [0, 4, 8]  # the first by `reset`, and not once more
    assert wanted == [{"observation/image"}] * 2
    assert len(row.round_trip_ms) == len(row.server_ms) == 3


def test_two_workers_end_to_end(uri, tmp_path):
    out = tmp_path / "run"
    score = evaluate(uri, out, save=save_text)
    rows = rows_of(out)
    assert [row.index for row in rows] == list(range(12))
    for row in rows:
        assert row.success == (row.task != "down")
        assert row.steps == (row.seed % 5 + 1 if row.success else 6)
    assert score == json.loads((out / "score.json").read_text())
    assert (score["successes"], score["episodes"], score["crashes"]) == (8, 12, 0)
    assert score["per_task"]["down"]["rate"] == 0
    assert score["protocol"]["server"]["model"] == "counting"
    assert score["protocol"]["seeds"] == "100-111"
    assert score["conditions"]["workers"] == 2
    frames = {row.first_frame for row in rows}
    assert len(frames) == 1  # this world starts every episode with the same pixels
    assert len(frames.pop()) == 16
    assert score["latency_ms"]["round_trip"]["count"] == sum(r.steps for r in rows)
    videos = {row.video: row for row in rows if row.video}
    assert sorted((r.task, r.success) for r in videos.values()) == [
        ("down", False), ("still", True), ("up", True)
    ]  # fmt: skip
    assert {str(p.relative_to(out)) for p in out.glob("videos/*")} == set(videos)
    for path, row in videos.items():
        assert (out / path).read_text() == f"{row.steps + 1} {row.steps}"


def test_a_crashed_workers_episode_is_retried_once_and_counted_once(uri, tmp_path):
    trouble = {1: ("raise", 1), 4: ("segfault", 1), 6: ("segfault", 99), 9: ("raise", 99)}
    make_env = functools.partial(FakeEnv, str(tmp_path), trouble)
    score = evaluate(uri, tmp_path / "run", make_env=make_env)
    rows = rows_of(tmp_path / "run")
    assert [row.index for row in rows] == list(range(12))
    assert [row.index for row in rows if row.error] == [6, 9]
    assert "exit code -11" in str(rows[6].error)
    assert "told to raise" in str(rows[9].error)
    assert not rows[6].success
    assert rows[4].steps == 6
    assert (score["crashes"], score["episodes"], score["successes"]) == (2, 10, 6)
    assert (score["success_rate"], score["missing"]) == (0.6, 0)
    for index, times in {1: 1, 4: 1, 6: 2, 9: 2}.items():
        pids = (tmp_path / str(index)).read_text().split()
        assert len(pids) == len(set(pids)) == times  # never twice on the same worker


def test_a_hung_worker_is_replaced(uri, tmp_path):
    make_env = functools.partial(FakeEnv, str(tmp_path), {1: ("hang", 1)})
    out = tmp_path / "run"
    evaluate(uri, out, count=4, make_env=make_env, episode_timeout=3.0, connect_timeout=1.0)
    assert [row.error for row in rows_of(tmp_path / "run")] == [None] * 4


def test_workers_that_only_crash_end_the_run(uri, tmp_path):
    trouble = {index: ("raise", 99) for index in range(40)}
    make_env = functools.partial(FakeEnv, str(tmp_path), trouble)
    with pytest.raises(pool.PoolError, match=r"died in a row.*told to raise"):
        evaluate(uri, tmp_path / "run", count=40, make_env=make_env, workers=1)


def test_actions_that_do_not_fit_and_refused_observations_end_the_run(uri, tmp_path):
    make_env = functools.partial(FakeEnv, str(tmp_path), {2: ("action", 99)})
    with pytest.raises(pool.PoolError, match="told to action"):
        evaluate(uri, tmp_path / "one", make_env=make_env, workers=1)
    with pytest.raises(pool.PoolError, match="policy failed: ArithmeticError"):
        evaluate(uri, tmp_path / "two", instruction="crash now", workers=1)


def test_heavy_imports_in_a_worker_end_the_run(uri, tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    make_env = functools.partial(FakeEnv, extra_import="torch")
    with pytest.raises(pool.PoolError, match="imported torch"):
        evaluate(uri, tmp_path / "run", count=2, make_env=make_env, workers=1)
    assert not (tmp_path / "run" / "score.json").exists()


def test_an_interrupted_run_is_finished_by_resume(uri, tmp_path):
    out = tmp_path / "run"
    full = evaluate(uri, out)
    lines = (out / "episodes.jsonl").read_text().splitlines(keepends=True)
    (out / "episodes.jsonl").write_text("".join(lines[:5]) + lines[5][:20])
    with pytest.raises(results.ResultsError, match="resume"):
        evaluate(uri, out)
    assert len((out / "episodes.jsonl").read_text().splitlines()) == 6
    with pytest.raises(results.ResultsError, match="max_steps: 6 then, 7 now"):
        evaluate(uri, out, resume=True, max_steps=7)
    score = evaluate(uri, out, resume=True)
    assert [row.index for row in rows_of(out)] == list(range(12))
    retained = (out / "episodes.jsonl").read_text().splitlines(keepends=True)[:5]
    assert sorted(retained) == sorted(lines[:5])
    assert score["per_task"] == full["per_task"]


def test_two_evaluations_do_not_share_a_folder(uri, tmp_path):
    with (
        lock.held(str(tmp_path), results.ResultsError),
        pytest.raises(results.ResultsError, match=f"writing there .process {os.getpid()} on "),
    ):
        evaluate(uri, tmp_path, count=2)
    assert evaluate(uri, tmp_path, count=2)["episodes"] == 2


def test_an_evaluation_whose_folder_is_removed_stops_early(uri, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(results.ResultsError, match=r"removed while .* of 40 episodes were done"):
        evaluate(uri, out, count=40, make_env=_Removed(str(out)))


class _Removed:
    """Makes environments; the second episode of one removes the folder of the results."""

    def __init__(self, out):
        self.out = out

    def __call__(self):
        env, out, resets = FakeEnv(), self.out, []
        reset = env.reset

        def remove(episode):
            resets.append(episode)
            if len(resets) == 3:
                shutil.rmtree(out, ignore_errors=True)
            return reset(episode)

        env.reset = remove
        return env


def test_a_film_that_cannot_be_written_costs_no_episode(uri, tmp_path):
    score = evaluate(uri, tmp_path, count=4, save=no_room)
    assert (score["episodes"], score["crashes"], score["restarts"]) == (4, 0, 0)
    assert all(row.video is None for row in rows_of(tmp_path))


def no_room(path, frames):
    raise OSError(28, "No space left on device")


def test_execute_steps_beyond_the_chunk_are_refused_before_anything_starts(uri, tmp_path):
    with pytest.raises(ValueError, match=r"9 is not in 1\.\.4"):
        evaluate(uri, tmp_path / "run", execute_steps=9)
    assert not (tmp_path / "run").exists()


def test_other_instructions_is_a_fixed_derangement():
    tasks = [f"task {i}" for i in range(13)]
    instructions = rollout.other_instructions(tasks)
    assert sorted(instructions) == sorted(instructions.values()) == sorted(tasks)
    assert all(task != other for task, other in instructions.items())
    assert instructions == rollout.other_instructions(tasks)
    assert instructions != rollout.other_instructions(tasks, seed=1)
    with pytest.raises(ValueError, match="at least two"):
        rollout.other_instructions(["a", "a"])


def test_a_rollout_process_imports_nothing_heavy():
    code = (
        "import sys\n"
        "from eval_servers import client, pool, progress, results, rollout, wire\n"
        "rollout.check_imports()\n"
        "sys.modules['torch'] = sys\n"
        "try:\n    rollout.check_imports()\nexcept ImportError as e:\n    print(e)\n"
        "names = {m.partition('.')[0] for m in sys.modules}\n"
        "ours = {'vla_jax', 'matplotlib', 'PIL', 'tqdm', 'flax', 'optax'}\n"
        "print(sorted(names & ours))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "imported torch" in done.stdout
    assert done.stdout.endswith("[]\n")


def test_progress_line():
    progress = Progress(200, done=10, successes=7)
    progress.add(True)
    assert progress.line().startswith("[ 11/200] success 72.7 % (8)")
