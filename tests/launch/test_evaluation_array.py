"""An evaluation spread over the tasks of a Slurm array, with the array's variables set by hand."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from eval_servers import results
from tests.eval_servers import fake_rollout
from tests.serve.fakes import CountingPolicy
from vla_jax.serve import server

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "slurm_evaluate.sh"


@pytest.fixture
def checkout(tmp_path):
    """A checkout whose one simulator is the tests' own."""
    folder = tmp_path / "eval_servers" / "fake"
    folder.mkdir(parents=True)
    (folder / "rollout.py").symlink_to(fake_rollout.__file__)
    return tmp_path


def start(checkout, task, count, *flags, **variables):
    env = {
        **os.environ,
        "PYTHON": sys.executable,
        "SLURM_SUBMIT_DIR": str(checkout),
        "SLURM_ARRAY_TASK_ID": str(task),
        "SLURM_ARRAY_TASK_COUNT": str(count),
        "SLURM_CPUS_PER_TASK": "1",
        **variables,
    }
    return subprocess.Popen([SCRIPT, *flags], env=env, stderr=subprocess.PIPE, text=True)


def test_two_tasks_and_two_servers_make_one_score(checkout):
    options = server.ServerOptions(port=0)
    with (
        server.background(CountingPolicy(), options) as single,
        server.background(CountingPolicy(), options) as two,
    ):
        flags = ["fake", f"--server={single},{two}", f"--out={checkout / 'parts'}"]
        tasks = [start(checkout, i, 2, *flags) for i in range(2)]
        assert [task.wait(timeout=120) for task in tasks] == [0, 0]
        full = start(checkout, 0, 1, "fake", f"--server={single}", f"--out={checkout / 'whole'}")
        assert full.wait(timeout=120) == 0
        # A task that is queued again after it has ended finds nothing left to do.
        assert start(checkout, 1, 2, *flags).wait(timeout=120) == 0
    score, rows = results.load_run(str(checkout / "parts"))
    expected, remaining = results.load_run(str(checkout / "whole"))
    assert (score["episodes"], score["missing"]) == (expected["episodes"], 0)
    assert [(*row.key, row.success, row.steps) for row in rows] == [
        (*row.key, row.success, row.steps) for row in remaining
    ]


@pytest.mark.parametrize(
    ("flags", "variables", "message"),
    [
        ([], {}, "usage: sbatch --array"),
        (["fake"], {"SLURM_ARRAY_TASK_ID": ""}, "usage: sbatch --array"),
        (["pybullet"], {}, "no eval_servers/pybullet/rollout.py"),
    ],
)
def test_what_is_missing_is_said(checkout, flags, variables, message):
    started = start(checkout, 0, 1, *flags, **variables)
    assert message in started.communicate(timeout=60)[1]
    assert started.returncode == 2
