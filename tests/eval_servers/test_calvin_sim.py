"""With calvin_env: CALVIN_PYTHON (what setup.sh made) and CALVIN_ENV (its source tree).

CALVIN_PYTHON=VENV/bin/python CALVIN_ENV=DIR pytest tests/eval_servers/test_calvin_sim.py
"""

import json
import os
import subprocess
from pathlib import Path

import pytest

from eval_servers.calvin.expert import TASKS
from tests.eval_servers.calvin_expert_policy import ExpertPolicy
from vla_jax.serve import server

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).with_name("calvin_golden")
PYTHON, TREE = os.environ.get("CALVIN_PYTHON", ""), os.environ.get("CALVIN_ENV", "")
EPISODES = 40

pytestmark = [
    pytest.mark.sim,
    pytest.mark.slow,
    pytest.mark.skipif(not (PYTHON and TREE), reason="set CALVIN_PYTHON and CALVIN_ENV"),
]


def simulate(*command, timeout=1800):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [PYTHON, *map(str, command)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, cwd=ROOT, env=env
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def checks():
    table = GOLDEN / "new_playtable_tasks.yaml"
    return json.loads(simulate("-m", "tests.eval_servers.calvin_checks", TREE, table))


def test_the_simulator_takes_every_initial_state(checks):
    off = checks["states"]
    # Within one physics step (1/240 s) of where everything was put.
    assert off["doors and lamps"] < 2e-3
    assert off["robot"] < 2e-3
    assert off["blocks"] < 2e-3
    assert off["yaw"] < 2e-2


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
        flags += ["--privileged", "--workers=1", f"--episodes={EPISODES}", "--videos=0", "--tasks"]
        simulate(script, *flags, *TASKS)
    score = json.loads((out / "score.json").read_text())
    assert score["episodes"] == EPISODES
    assert score["errors"] == 0
    assert score["success_rate"] >= 0.95, score["per_task"]
    assert score["protocol"]["simulator"]["renderer"] == "tiny"
    assert score["protocol"]["privileged"] is True
