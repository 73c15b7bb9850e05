"""With SAPIEN: SIMPLER_PYTHON (what setup.sh made), REAL2SIM (its source tree), a Vulkan device.

SIMPLER_PYTHON=VENV/bin/python REAL2SIM=DIR pytest tests/eval_servers/test_simpler_sim.py

Assets that this copy of the tree lacks are stood in for, and nothing is ray-traced: this tests that
the environments run, and the way from a policy's action to the robot, not what they look like.
"""

import functools
import json
import os
import subprocess

import pytest

from eval_servers.simpler.tasks import ENVIRONMENTS, GOOGLE, WIDOWX, robot_of
from tests.eval_servers.simpler_expert_policy import ExpertPolicy, StillPolicy
from tests.eval_servers.simulators import ROOT, run_in
from vla_jax.serve import server

SCRIPT = ROOT / "eval_servers" / "simpler" / "rollout.py"
PYTHON, TREE = os.environ.get("SIMPLER_PYTHON", ""), os.environ.get("REAL2SIM", "")

pytestmark = [
    pytest.mark.sim,
    pytest.mark.slow,
    pytest.mark.skipif(not (PYTHON and TREE), reason="set SIMPLER_PYTHON and REAL2SIM"),
]

simulate = functools.partial(run_in, PYTHON)


@pytest.fixture(scope="module")
def where(tmp_path_factory):
    """Flags that name the simulator, with stand-ins for what is missing."""
    assets = tmp_path_factory.mktemp("simpler") / "assets"
    simulate("-m", "eval_servers.simpler.stand_ins", f"--real2sim={TREE}", f"--out={assets}")
    return f"--real2sim={TREE}", f"--assets={assets}", "--drawn=raster"


def run(policy, out, where, *flags):
    with server.background(policy, server.ServerOptions(port=0)) as uri:
        common = [f"--server={uri}", f"--out={out}", *where, "--workers=1", "--sanity=off"]
        simulate(SCRIPT, *common, *flags)
    rows = [json.loads(line) for line in (out / "episodes.jsonl").read_text().splitlines()]
    return json.loads((out / "score.json").read_text()), rows


@pytest.mark.parametrize("robot", [GOOGLE, WIDOWX])
def test_all_25_environments_are_made_reset_and_stepped(robot, where, tmp_path):
    names = [name for name in ENVIRONMENTS if robot_of(name) == robot]
    flags = ["--setting=prepackaged", "--episodes=1", "--max-steps=3", "--videos=0"]
    score, rows = run(StillPolicy(), tmp_path / "run", where, *flags, "--tasks", *names)
    assert len(names) == {GOOGLE: 21, WIDOWX: 4}[robot]
    assert [row["task"] for row in rows] == names
    assert [row["error"] for row in rows] == [None] * len(names)
    assert {row["steps"] for row in rows} == {3}
    assert all(row["told"][0] for row in rows)
    # Every picture shows something else but for names of the same environment.
    assert len({row["first_frame"] for row in rows}) > len(names) / 2
    assert score["crashes"] == 0
    assert score["protocol"]["profile"] == "custom"
    assert score["protocol"]["simulator"]["driver"]


def test_variants_of_the_published_evaluation(where, tmp_path):
    flags = ["--tasks", "google_robot_pick_coke_can", "google_robot_move_near"]
    flags += ["google_robot_open_top_drawer", "--max-steps=2", "--videos=0", "--episodes=2"]
    score, rows = run(StillPolicy(), tmp_path / "run", where, *flags)
    assert (score["episodes"], score["crashes"]) == (10, 0)
    assert {row["told"][0] for row in rows} == {row["instruction"] for row in rows}
    assert len({row["first_frame"] for row in rows}) == 10


def test_the_expert_through_server_client_and_action_path(where, tmp_path):
    flags = ["--tasks", "widowx_stack_cube", "--privileged", "--videos=0", "--episodes=8"]
    score, rows = run(ExpertPolicy(), tmp_path / "run", where, *flags)
    assert score["crashes"] == 0
    assert score["protocol"]["setting"] == "visual_matching"
    assert score["protocol"]["privileged"] is True
    assert score["success_rate"] >= 0.75, [(row["start"], row["stats"]) for row in rows]
    assert all(row["steps"] == 60 for row in rows)


def test_doing_nothing_scores_nothing(where, tmp_path):
    flags = ["--tasks", "widowx_stack_cube", "--videos=0", "--episodes=2"]
    score, _ = run(StillPolicy(), tmp_path / "run", where, *flags)
    assert (score["episodes"], score["successes"]) == (2, 0)


def test_the_same_pictures_every_time(where):
    flags = ("-m", "eval_servers.simpler.probe", *where, "--task=widowx_stack_cube")
    first, second = (json.loads(simulate(*flags).splitlines()[-1]) for _ in range(2))
    assert first == second
    assert first["cameras"] == {"image": [480, 640, 3]}


def test_missing_assets_are_refused(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    command = [PYTHON, str(SCRIPT), "--server=ws://127.0.0.1:9", f"--out={tmp_path / 'run'}"]
    command += [f"--real2sim={TREE}", f"--assets={data}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "files are missing" in done.stderr
    assert "bridge_table_1_v1.glb" in done.stderr
