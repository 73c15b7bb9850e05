"""With calvin_env: CALVIN_PYTHON (what setup.sh made) and CALVIN_ENV (its source tree).

CALVIN_PYTHON=VENV/bin/python CALVIN_ENV=DIR pytest tests/eval_servers/test_calvin_sim.py
"""

import functools
import json
import os
from pathlib import Path

import numpy as np
import pytest

from eval_servers.calvin.expert import TASKS
from tests.eval_servers.calvin_expert_policy import ExpertPolicy
from tests.eval_servers.simulators import ROOT, run_in
from vla_jax.serve import server

GOLDEN = Path(__file__).with_name("calvin_golden")
PYTHON, TREE = os.environ.get("CALVIN_PYTHON", ""), os.environ.get("CALVIN_ENV", "")
EPISODES = 40

pytestmark = [
    pytest.mark.sim,
    pytest.mark.slow,
    pytest.mark.skipif(not (PYTHON and TREE), reason="set CALVIN_PYTHON and CALVIN_ENV"),
]

simulate = functools.partial(run_in, PYTHON)


@pytest.fixture(scope="module")
def checks():
    table = GOLDEN / "new_playtable_tasks.yaml"
    return json.loads(simulate("-m", "tests.eval_servers.calvin_checks", TREE, table))


def test_the_simulator_takes_every_initial_state(checks):
    off = checks["states"]
    # After the one physics step (1/240 s) that a reset ends with; metres and radians.
    assert off["doors and lamps"] < 1e-6
    assert off["robot"] < 1e-4
    assert off["blocks"] < 1e-3
    assert off["yaw"] < 1e-3


def test_a_start_hardly_depends_on_what_happened_before(checks):
    repeated = checks["repeated"]
    assert repeated["solved"]
    assert repeated["robot"] == 0  # the gripper's last command included
    assert repeated["scene"] < 5e-3  # metres and radians; lamps, button and doors are exact


def test_the_oracle_agrees_with_calvins_on_what_the_simulator_does(checks):
    played = checks["played"]
    assert played["different"] == []
    assert played["compared"] == 700
    assert set(TASKS) <= set(played["seen"])


def test_the_oracle_agrees_with_calvins_on_every_task(checks):
    imagined = checks["imagined"]
    assert imagined["different"] == []
    assert len(imagined["seen"]) == 34
    assert min(imagined["seen"].values()) >= 3


def test_the_same_pictures_every_time():
    flags = ("-m", "eval_servers.calvin.probe", f"--calvin-env={TREE}", "--renderer=tiny")
    first, second = (json.loads(simulate(*flags)) for _ in range(2))
    assert first == second
    assert first["driver"] == "TinyRenderer"
    assert first["cameras"] == {"rgb_gripper": [84, 84, 3], "rgb_static": [200, 200, 3]}


def test_the_expert_through_server_client_and_action_path(tmp_path):
    out = tmp_path / "run"
    with server.background(ExpertPolicy(), server.ServerOptions(port=0)) as uri:
        script = ROOT / "eval_servers" / "calvin" / "rollout.py"
        flags = [f"--server={uri}", f"--out={out}", f"--calvin-env={TREE}", "--renderer=tiny"]
        flags += ["--privileged", "--workers=1", f"--episodes={EPISODES}", "--videos=0"]
        simulate(script, *flags, "--sanity=off", "--tasks", *TASKS)
    score = json.loads((out / "score.json").read_text())
    assert score["episodes"] == EPISODES
    assert score["crashes"] == 0
    assert score["success_rate"] >= 0.95, score["per_task"]
    assert score["protocol"]["simulator"]["renderer"] == "tiny"
    assert score["protocol"]["privileged"] is True


def test_recorded_demonstrations_read_as_calvins(tmp_path):
    out = tmp_path / "demos"
    script = ROOT / "eval_servers" / "calvin" / "record.py"
    flags = [f"--out={out}", f"--calvin-env={TREE}", "--renderer=tiny", "--episodes=5"]
    flags += ["--noise=0"]  # what is done is then what is recorded
    assert "5 training and 0 validation" in simulate(script, *flags)
    training = out / "training"
    spans = np.load(training / "ep_start_end_ids.npy")
    notes = np.load(training / "lang_annotations" / "auto_lang_ann.npy", allow_pickle=True).item()
    assert notes["language"]["task"] == list(TASKS)
    assert notes["info"]["indx"] == [tuple(span) for span in spans.tolist()]
    assert len(list(training.glob("episode_*.npz"))) == spans[-1, 1] + 1
    for first, last in spans.tolist():
        frames = [np.load(training / f"episode_{i:07d}.npz") for i in range(first, last + 1)]
        assert frames[0]["rgb_static"].shape == (200, 200, 3)
        assert frames[0]["rgb_gripper"].shape == (84, 84, 3)
        actions = np.array([frame["rel_actions"] for frame in frames])
        places = np.array([frame["robot_obs"][:3] for frame in frames])
        targets = np.array([frame["actions"][:3] for frame in frames])
        assert np.allclose(targets - places, actions[:, :3] * 0.02)
        assert not actions[-1, :6].any()
        # The tool goes where the actions say: most of the way is explained by them.
        message, went = actions[:-1, :3].sum(0) * 0.02, places[-1] - places[0]
        assert np.abs(message - went).max() < 0.05
    # The recording's own configuration builds the same world.
    flags = ("-m", "eval_servers.calvin.probe", f"--calvin-env={TREE}", "--renderer=tiny")
    world = json.loads(simulate(*flags, f"--dataset={training}"))
    assert world["first_frames"] == json.loads(simulate(*flags))["first_frames"]
