"""A newcomer's first hour, in empty environments: both wheels from the package index, no checkout.

HOME is empty, so there is no cache of any kind; the working directory is elsewhere. One environment
has `vla_jax`, the other the client alone, which asks the first for actions over a socket.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_package import NOT_COPIED, ROOT

pytestmark = pytest.mark.slow

HELP = (
    "train", "local", "plan", "serve", "evaluate", "convert", "convert push", "replay", "data",
    "data inspect", "data convert", "data fast", "data record", "doctor", "demo",
)  # fmt: skip
QUERY = """
import json, sys
import numpy as np
from eval_servers.client import PolicyClient

with PolicyClient(sys.argv[1]) as client:
    pictures = {key: np.zeros((32, 32, 3), np.uint8) for key in client.metadata["cameras"].values()}
    actions = client.infer({**pictures, "prompt": "lift the red block"})["actions"]
print(json.dumps({"shape": actions.shape, "finite": bool(np.isfinite(actions).all())}))
"""


class Environment:
    """An environment of its own with one wheel in it, and a user without any settings."""

    def __init__(self, folder, source):
        self.folder, self.bin = folder, folder / "env" / "bin"
        tree = folder / "tree"
        ignored = shutil.ignore_patterns(*NOT_COPIED)
        shutil.copytree(source, tree, symlinks=True, ignore=ignored)
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        self._check([*pip, "wheel", "--no-deps", "--wheel-dir", str(folder / "wheel"), str(tree)])
        shutil.rmtree(tree)
        # That of this process may be an environment itself, whose packages must not shine through.
        self._check([sys.executable, "-m", "venv", str(folder / "env")])
        (wheel,) = (folder / "wheel").glob("*.whl")
        own_pip = [str(self.bin / "python"), "-m", "pip", "--quiet", "--disable-pip-version-check"]
        self._check([*own_pip, "install", str(wheel)])
        for name in ("home", "elsewhere"):
            (folder / name).mkdir()
        self.settings = {"HOME": str(folder / "home"), "PATH": f"{self.bin}:/usr/bin:/bin"}

    def run(self, *command):
        """Run a command as the newcomer does; returns the finished process."""
        return subprocess.run(
            command, cwd=self.folder / "elsewhere", env=self.settings, capture_output=True,
            text=True, timeout=600,
        )  # fmt: skip

    def check(self, *command):
        """As `run`; what the command printed. It has to end well."""
        done = self.run(*command)
        print(f"$ {' '.join(command)}\n{done.stdout}{done.stderr}")  # shown by -s and on failure
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def _check(self, command):
        settings = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        done = subprocess.run(command, env=settings, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def vla(tmp_path_factory):
    return Environment(tmp_path_factory.mktemp("vla"), ROOT)


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    return Environment(tmp_path_factory.mktemp("client"), ROOT / "eval_servers")


def test_the_machine_is_ready(vla):
    printed = vla.check("vla", "doctor")
    assert "ready" in printed
    assert "[dev]" not in printed


def test_the_demo_says_first_what_it_will_need_last(vla):
    done = vla.run("vla", "demo")
    assert done.returncode == 1
    assert done.stderr.startswith("vla demo: the report needs matplotlib; pip install ")


@pytest.mark.parametrize("command", HELP)
def test_every_command_explains_itself(vla, command):
    printed = vla.check("vla", *command.split(), "--help")
    assert len(printed.splitlines()) > 5


def test_a_first_policy_answers_a_client_elsewhere(vla, client):
    data, run = "runs/quickstart/data/tabletop/1.0.0", "runs/quickstart"
    without = vla.run("vla", "train", "--config=quickstart", f"--workdir={run}")
    assert without.returncode == 1
    assert f"{data}: is no folder" in without.stderr.splitlines()[-1]
    assert "Traceback" not in without.stderr
    vla.check("vla", "data", "record", f"--out={data}", "--size=32", "--episodes=52")
    steps = ["--config.train.steps=20", "--config.train.log_every=10"]
    vla.check("vla", "train", "--config=quickstart", f"--workdir={run}", *steps)
    log = (vla.folder / "elsewhere" / run / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log if '"train"' in line] == [10, 20]

    server = subprocess.Popen(
        [vla.bin / "vla", "serve", f"--checkpoint={run}", "--port=0"],
        cwd=vla.folder / "elsewhere", env=vla.settings, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert server.stdout
        lines = iter(server.stdout.readline, "")
        uri = next(line.split()[-1] for line in lines if "listening on " in line)
        assert client.run("python", "-c", "import jax").returncode == 1
        reply = json.loads(client.check("python", "-c", QUERY, uri).splitlines()[-1])
        assert reply == {"shape": [4, 7], "finite": True}
        rollout = ["python", "-m", "eval_servers.tabletop.rollout", "--server", uri]
        client.check(*rollout, "--out=score", "--episodes=2", "--image-size=32", "--sanity=off")
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
    score = json.loads((client.folder / "elsewhere/score/score.json").read_text())
    assert (score["episodes"], score["crashes"], score["missing"]) == (2, 0, 0)
    assert Path(client.folder / "home").exists()
