import functools
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval_servers import results, rollout
from eval_servers.calvin import simulator
from eval_servers.calvin.env import CalvinEnv, attempt, film
from eval_servers.calvin.rollout import table
from eval_servers.client import PolicyClient, SessionLostError
from tests.eval_servers.fake_calvin import DARK, LAMPS, FakeSimulator, LampPolicy, make_chain
from tests.eval_servers.fake_calvin import make_env as make_fake
from tests.serve.fakes import CountingPolicy
from vla_jax.serve import server

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "eval_servers" / "calvin" / "rollout.py"
GOOD = (LAMPS[0], LAMPS[1], LAMPS[2], LAMPS[0], LAMPS[2])
BAD = (LAMPS[0], LAMPS[1], LAMPS[3], LAMPS[2], LAMPS[0])  # the third is beyond the policy


@pytest.fixture
def policy():
    return LampPolicy()


@pytest.fixture
def uri(policy):
    with server.background(policy, server.ServerOptions(port=0)) as uri:
        yield uri


def run_one(uri, chain, frames=None, max_steps=6):
    with PolicyClient(uri) as client:
        return rollout.run_episode(
            make_fake(), client, chain, max_steps, frames=frames, attempt=attempt
        )


def test_a_chain_is_five_fresh_sessions(uri, policy):
    frames = []
    chain = make_chain(4, GOOD)
    row = run_one(uri, chain, frames)
    assert (row.success, row.steps, row.error, row.index) == (True, 15, None, 4)
    assert [stage.task for stage in row.stages] == list(GOOD)
    # Three steps each: the policy's own count starts anew, so its history did.
    assert [stage.steps for stage in row.stages] == [3] * 5
    assert policy.sessions == 5
    assert policy.prompts == [text for text in chain.instructions for _ in range(3)]
    assert len(row.round_trip_ms) == len(row.server_ms) == 15
    assert len(frames) == 16
    assert json.loads(json.dumps(row.to_json()))["state"] == list(DARK)


def test_the_first_failure_ends_a_chain(uri, policy):
    row = run_one(uri, make_chain(0, BAD))
    assert (row.success, row.steps) == (False, 3 + 3 + 6)
    assert [(s.success, s.steps) for s in row.stages] == [(True, 3), (True, 3), (False, 6)]
    assert len(policy.prompts) == 12


def test_the_chunk_of_one_task_is_not_executed_in_the_next(uri):
    with PolicyClient(uri) as client:
        row = rollout.run_episode(
            make_fake(), client, make_chain(0, GOOD), 20, execute_steps=4, attempt=attempt
        )
    assert row.success
    # Requests 1 and 2 replay four actions each; the first action of the third ends the task.
    assert [stage.steps for stage in row.stages] == [9] * 5
    assert len(row.round_trip_ms) == 15


def test_a_lost_session_starts_the_chain_over():
    class Client:
        def __init__(self):
            self.metadata, self.requests = {}, 0

        def reset(self):
            pass

        def infer(self, obs):
            self.requests += 1
            if self.requests == 2:
                raise SessionLostError("cable")
            action = np.array([[1, 1, 0, 0, 0, 0, 1]], np.float32)
            return {"actions": action}

    chain = make_chain(0, (LAMPS[0], LAMPS[3]))
    row = rollout.run_episode(make_fake(), Client(), chain, 1, attempt=attempt)
    # Once more from the start: the LED was on already, and turning it on counts again.
    assert (row.restarts, row.stages[0].success, row.stages[1].success) == (
        1, True, False
    )  # fmt: skip


def test_success_counts_from_the_tasks_beginning(uri):
    row = run_one(uri, make_chain(0, (LAMPS[0], LAMPS[0])))
    assert [stage.success for stage in row.stages] == [True, False]


def test_an_evaluation_of_chains(uri, tmp_path):
    episodes = [make_chain(i, GOOD if i % 2 else BAD) for i in range(6)]
    options = rollout.Options(uri, max_steps=6, workers=2, connect_timeout=10.0)
    make_env = functools.partial(make_fake, crash_on=5)
    out = tmp_path / "run"
    score = rollout.evaluate(make_env, episodes, str(out), options, {}, film, attempt)
    assert (score["episodes"], score["successes"], score["crashes"]) == (5, 2, 1)
    chains = score["chains"]
    assert [c["successes"] for c in chains["solved_in_a_row"].values()] == [5, 5, 2, 2, 2]
    assert chains["average_solved"] == pytest.approx((3 * 2 + 2 * 5) / 5)
    assert score["per_task"]["turn_off_lightbulb"]["rate"] == 0
    assert score["per_task"]["turn_on_led"]["episodes"] == 5 + 2
    assert score["latency_ms"]["server"]["count"] == sum(
        row.steps for row in results.load_rows(str(out / "episodes.jsonl"))
    )
    text = table(score)
    assert "in a row  1: 100.0%  2: 100.0%  3: 40.0%" in text
    assert "average   3.200" in text
    assert "1 episodes lost to crashes" in text
    assert "turn_off_lightbulb" in text
    videos = list((out / "videos").glob("*.webp"))
    assert len(videos) == 2
    assert Image.open(videos[0]).size == (284, 200)


def test_shards_of_chains_make_the_whole(uri, tmp_path):
    episodes = [make_chain(i, GOOD if i % 2 else BAD) for i in range(4)]
    options = rollout.Options(uri, max_steps=6, connect_timeout=10.0)
    folders = [str(tmp_path / str(i)) for i in range(2)]
    for number, folder in enumerate(folders):
        shard = (number, 2)
        rollout.evaluate(make_fake, episodes, folder, options, {}, None, attempt, None, shard)
    score = results.merge(folders, str(tmp_path / "all"))
    assert (score["episodes"], score["missing"]) == (4, 0)
    assert score["chains"]["average_solved"] == pytest.approx((2 * 2 + 2 * 5) / 4)


def test_single_tasks_have_no_chain_section():
    rows = [rollout.Row(0, 1, "turn_on_led", "", True, 3, tasks=("turn_on_led",))]
    score = results.summarize(rows, {})
    assert "chains" not in score
    assert score["per_task"]["turn_on_led"]["successes"] == 1


def test_observations_and_frames():
    env = CalvinEnv(FakeSimulator(), privileged=True)
    obs = env.reset(make_chain(0, GOOD))
    assert {key: (value.shape, value.dtype.name) for key, value in obs.items()} == {
        "observation/image": ((200, 200, 3), "uint8"),
        "observation/wrist_image": ((84, 84, 3), "uint8"),
        "observation/state": ((15,), "float32"),
        "observation/scene": ((24,), "float32"),
    }
    picture = np.asarray(Image.open(io.BytesIO(env.frame())))
    assert picture.shape == (200, 284, 3)
    assert abs(int(picture[50, 240, 0]) - 30) < 4
    assert picture[150, 240].max() < 8


@pytest.mark.parametrize(
    "action", [np.zeros(7), np.full(7, np.nan), np.ones(6), np.array([0, 0, 0, 0, 0, np.inf, 1])]
)
def test_actions_that_do_not_fit(action):
    env = CalvinEnv(FakeSimulator())
    env.reset(make_chain(0, GOOD))
    with pytest.raises(rollout.ActionError, match="7 finite numbers"):
        env.step(action)


def test_settings_are_checked_all_at_once(tmp_path):
    with pytest.raises(simulator.SimulatorError) as error:
        simulator.check(simulator.Settings(str(tmp_path), "vulkan", "E", str(tmp_path)))
    for words in ("no calvin_env source tree", "'vulkan'", "'E'", "merged_config.yaml"):
        assert words in str(error.value)
    with pytest.raises(simulator.SimulatorError, match="CALVIN_ENV"):
        simulator.check(simulator.Settings(""))


def test_no_simulator_is_one_clear_line(tmp_path):
    flags = [f"--out={tmp_path / 'run'}", f"--calvin-env={tmp_path}"]
    with server.background(CountingPolicy(), server.ServerOptions(port=0)) as uri:
        command = [sys.executable, SCRIPT, f"--server={uri}", *flags]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip().startswith("rollout: ")
    assert "no calvin_env source tree" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--chains=7"], "FIRST:LAST"),
        (["--episodes=3"], "--episodes goes with --tasks"),
        (["--tasks", "fly"], "no task"),
        (["--chains=990:1001"], "0:1000"),
    ],
)
def test_wrong_flags(tmp_path, flags, words):
    command = [sys.executable, SCRIPT, "--server=ws://127.0.0.1:9", f"--out={tmp_path / 'run'}"]
    done = subprocess.run([*command, *flags], capture_output=True, text=True)
    assert done.returncode in (1, 2)
    assert words in done.stderr


def test_the_drivers_name_is_read_from_what_bullet_prints():
    text = "starting\nGL_VENDOR=Mesa\nGL_RENDERER=llvmpipe (LLVM 15.0.6)\nGL_VERSION=4.5 Mesa\n"
    assert simulator._driver(text) == "llvmpipe (LLVM 15.0.6), 4.5 Mesa"
    assert simulator._driver("") == "unknown GL driver"
