"""With LIBERO: LIBERO_PYTHON is what setup.sh made.

LIBERO_PYTHON=VENV/bin/python pytest tests/eval_servers/test_libero_sim.py
"""

import functools
import json
import os

import numpy as np
import pytest

from eval_servers.libero import suites
from eval_servers.libero.expert import scripted
from tests.eval_servers.libero_expert_policy import ExpertPolicy
from tests.eval_servers.simulators import ROOT, run_in
from vla_jax.data import recordings
from vla_jax.serve import server

PYTHON = os.environ.get("LIBERO_PYTHON", "")
STATES = 3  # initial states of each task of libero_object that the expert is tried on

pytestmark = [
    pytest.mark.sim,
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="set LIBERO_PYTHON"),
]

simulate = functools.partial(run_in, PYTHON)


def check(*arguments):
    return json.loads(simulate("-m", "tests.eval_servers.libero_checks", *arguments))


# Without fixtures; with some; with something that is open at the start; with two of those.
@pytest.mark.parametrize("task", ["object 0", "goal 3", "spatial 4", "10 3"])
def test_states_and_pixels_are_the_stock_environments_from_any_trial(task):
    findings = check("stock", *task.split())
    assert findings["pixels"] == [True] * 4
    assert findings["state"] == 0
    assert findings["fixtures"] == 0
    assert (findings["moved"] > 0.001) == (task != "object 0")  # or the test would show nothing


@pytest.mark.parametrize("suite", ["spatial", "object", "goal", "10"])
def test_every_task_starts_draws_and_repeats(suite):
    findings = check("tasks", suite)
    assert len(findings) == 10
    for number, task in findings.items():
        assert task["repeats"], number
        assert not task["solved"], number
        assert not task["blank"], number
    assert len({task["pictures"] for task in findings.values()}) == 10


@pytest.mark.parametrize("kind", suites.PERTURBATIONS)
def test_perturbed_tasks_start_and_draw(kind):
    (result,) = check("tasks", f"goal_{kind}", "0").values()
    assert result["repeats"]
    assert not result["solved"]
    assert not result["blank"]


def test_names_sentences_and_initial_states_are_liberos():
    assert check("files") == []


def test_both_renderers_give_the_same_pictures():
    flags = ("-m", "eval_servers.libero.probe", "--suite=object", "--task=0", "--renderer")
    first, second = (json.loads(simulate(*flags, name)) for name in ("egl", "osmesa"))
    assert first["first_frames"] == second["first_frames"]
    assert first["versions"]["mujoco"] == "2.3.7"


def test_drawing_when_asked_costs_a_third():
    assert check("cost", "0", "120")["ratio"] <= 0.35


def test_the_expert_through_server_client_and_action_path(tmp_path):
    out = tmp_path / "run"
    with server.background(ExpertPolicy(), server.ServerOptions(port=0)) as uri:
        script = ROOT / "eval_servers" / "libero" / "rollout.py"
        flags = [f"--server={uri}", f"--out={out}", "--suite=object", f"--episodes={STATES}"]
        flags += ["--privileged", "--workers=1", "--videos=0", "--execute-steps=1"]
        simulate(script, *flags, "--sanity=off")
    score = json.loads((out / "score.json").read_text())
    assert score["episodes"] == 10 * STATES
    assert score["crashes"] == 0
    assert score["success_rate"] >= 0.95, score["per_task"]
    assert score["protocol"]["simulator"]["versions"]["mujoco"] == "2.3.7"
    assert score["protocol"]["profile"] == "custom"


def test_recorded_demonstrations_do_what_they_say(tmp_path):
    out = tmp_path / "recorded"
    script = ROOT / "eval_servers" / "libero" / "record.py"
    number = scripted("object")[0]
    flags = [f"--out={out}", "--suite=object", "--tasks", str(number), "--episodes=2"]
    assert "2 demonstrations" in simulate(script, *flags, "--noise=0", "--workers=1", "--size=64")
    results = [episode for _, episode in recordings.read(out)]
    assert [episode.task for episode in results] == [suites.tasks("object")[number].name] * 2
    for episode in results:
        # The hand goes where the actions say: in their direction, less far.
        went, message = np.diff(episode.state[2:, :3], axis=0), episode.action[1:-2, :3]
        assert np.corrcoef(went.ravel(), message.ravel())[0, 1] > 0.7
        assert episode.action[-1, 6] == -1
    # Only once things are in the hand: the first of these tasks draws its thing in one spot always.
    assert not np.array_equal(results[0].action, results[1].action)
