"""Clients this project did not write, or Pythons it does not run on, against the server.

Each client has an environment of its own, made from PyPI for the one test, or with
VLA_CLIENT_VENVS=DIR kept in DIR and used again:

    VLA_CLIENT_VENVS=DIR pytest -m slow tests/serve/test_foreign_clients.py
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serve.fakes import CountingPolicy, RobotPolicy
from vla_jax.serve import server

ROOT = Path(__file__).resolve().parents[2]

OPENPI = """
import sys
import numpy as np
from openpi_client.websocket_client_policy import WebsocketClientPolicy

assert np.__version__.startswith("1."), np.__version__
client = WebsocketClientPolicy(host="127.0.0.1", port=int(sys.argv[1]))
metadata = client.get_server_metadata()
assert metadata["model"] == "counting" and metadata["hz"] == 10.0, metadata
image = np.full((224, 224, 3), 7, np.uint8)
obs = {"observation/image": image, "prompt": "lift the red block"}
for step in (1, 2, 3):
    reply = client.infer(obs)
    actions = reply["actions"]
    assert actions.dtype == np.float32 and actions.shape == (4, 7), actions
    assert actions[0].tolist() == [1, step, 0, 7, 0, 0, 0], actions
    assert reply["server_timing"]["infer_ms"] >= 0
client.reset()
try:
    client.infer({"prompt": 3})
except RuntimeError as error:
    assert "observation/image: missing" in str(error), error
else:
    raise SystemExit("a bad observation was not refused")
print("served", np.__version__)
"""

# What openpi's examples send for each robot: LIBERO's and DROID's are flat, ALOHA's is nested.
OPENPI_ROBOTS = """
import sys
import numpy as np
from openpi_client.websocket_client_policy import WebsocketClientPolicy

image = np.full((224, 224, 3), 7, np.uint8)
turned = np.ascontiguousarray(image.transpose(2, 0, 1))
observations = {
    "libero": {
        "observation/image": image, "observation/wrist_image": image,
        "observation/state": np.zeros(8),
    },
    "droid": {
        "observation/exterior_image_1_left": image, "observation/wrist_image_left": image,
        "observation/joint_position": np.zeros(7), "observation/gripper_position": np.zeros(1),
    },
    "aloha": {
        "state": np.zeros(14),
        "images": {
            "cam_high": turned, "cam_low": turned,
            "cam_left_wrist": turned, "cam_right_wrist": turned,
        },
    },
}
client = WebsocketClientPolicy(host="127.0.0.1", port=int(sys.argv[1]))
for step in (1, 2):
    actions = client.infer({**observations[sys.argv[2]], "prompt": "go"})["actions"]
    assert actions.shape == (4, int(sys.argv[3])) and actions[0, 1] == step, actions
    assert actions[0, 3] == 7, actions
print("served", sys.argv[2])
"""

POLICY_WEBSOCKET = """
import sys
import numpy as np
from policy_websocket import ActionChunkBroker, WebsocketClientPolicy

client = WebsocketClientPolicy(host="127.0.0.1", port=int(sys.argv[1]))
assert client.get_server_metadata()["model"] == "counting"
broker = ActionChunkBroker(client, action_horizon=4)
obs = {"observation/image": np.full((8, 8, 3), 7, np.uint8), "prompt": "go"}
steps = [broker.infer(obs)["actions"][1:3].tolist() for _ in range(6)]
assert steps == [[1, 0], [1, 1], [1, 2], [1, 3], [2, 0], [2, 1]], steps
print("served", flush=True)
client.close()  # its __del__ would wait for a thread that has ended by then
"""

WIDOWX = """
import sys
import numpy as np
import requests
from inspect_robots.scene import Scene
from inspect_robots.types import Observation
from inspect_robots_widowx.policy import OpenpiPolicy, OpenVLAPolicy

port = int(sys.argv[1])
seen = Observation(images={"external_cam": np.full((64, 64, 3), 7, np.uint8)})
url = "http://127.0.0.1:%d" % port
for policy in (OpenpiPolicy(port=port), OpenVLAPolicy(server_url=url)):
    policy.reset(Scene("a", "put the spoon on the towel"))
    chunk = policy.act(seen)
    assert chunk.actions[0].data.shape == (7,) and chunk.actions[0].data[3] == 7, chunk
wrong = OpenVLAPolicy(server_url=url, unnorm_key="viola")
try:
    wrong.act(seen)
except requests.HTTPError as error:
    assert "422 Client Error: unnorm_key 'viola': this server's actions are" in str(error), error
print("served")
"""

FRANKA = """
import sys
import numpy as np
from inspect_robots.scene import Scene
from inspect_robots.types import Observation
from inspect_robots_franka.policy import OpenpiPolicy

image = np.full((64, 64, 3), 7, np.uint8)
seen = Observation(
    images={"exterior_cam": image, "wrist_cam": image}, state={"joint_pos": np.zeros(8)}
)
policy = OpenpiPolicy(port=int(sys.argv[1]))
policy.reset(Scene("a", "put the spoon on the towel"))
assert policy.act(seen).actions[0].data.shape == (8,)
print("served")
"""

VLA_EVAL = """
import asyncio
import sys
import numpy as np
from vla_eval.connection import Connection

async def main():
    async with Connection("ws://127.0.0.1:%s/vla-eval" % sys.argv[1]) as connection:
        image = np.full((64, 64, 3), 7, np.uint8)
        obs = {"images": {"agentview": image}, "task_description": "go", "states": np.zeros(8)}
        for _ in range(2):
            await connection.start_episode({"task": {"name": "go"}})
            steps = [(await connection.act(obs))["actions"][1] for _ in range(3)]
            assert steps == [1, 2, 3], steps
            await connection.end_episode({})
        assert connection.server_info["model_server"].startswith("vla_jax")

asyncio.run(main())
print("served")
"""

# openpi-client imports typing_extensions without declaring it.
OPENPI_PACKAGES = ("openpi-client==0.1.2", "typing_extensions", "numpy<2")
# Name of an environment -> what is in it.
ENVIRONMENTS = {
    "openpi-client": OPENPI_PACKAGES,
    "policy-websocket": ("policy-websocket==0.1.0",),
    "inspect-robots-widowx": ("inspect-robots-widowx==0.1.0", *OPENPI_PACKAGES),
    "inspect-robots-franka": ("inspect-robots-franka==0.1.0", *OPENPI_PACKAGES),
    "vla-eval": ("vla-eval==0.8.0",),
}
BOTH = ("primary", "wrist")
# Environment, script, its arguments, and the policy that it meets.
CLIENTS: dict[str, tuple[str, str, tuple, tuple]] = {
    "openpi libero": ("openpi-client", OPENPI_ROBOTS, ("libero", "7"), ("libero", BOTH, 9)),
    "openpi droid": ("openpi-client", OPENPI_ROBOTS, ("droid", "8"), ("droid", BOTH, 8, 8)),
    "openpi aloha": (
        "openpi-client",
        OPENPI_ROBOTS,
        ("aloha", "14"),
        ("aloha", (*BOTH, "secondary"), 14, 14),
    ),
    "policy-websocket": (
        "policy-websocket",
        POLICY_WEBSOCKET,
        (),
        ("openpi", ("primary",), 0),
    ),
    "widowx": ("inspect-robots-widowx", WIDOWX, (), ("openpi", ("primary",), 0)),
    "franka": ("inspect-robots-franka", FRANKA, (), ("droid", BOTH, 8, 8)),
    "vla-eval": ("vla-eval", VLA_EVAL, (), ("openpi", ("primary",), 8)),
}

OLD_PYTHON = """
import sys
from eval_servers import results, rollout
from tests.eval_servers.fake_env import FakeEnv

if __name__ == "__main__":
    episodes = [rollout.Episode(i, i, "up", "go") for i in range(4)]
    options = rollout.Options(sys.argv[1], max_steps=6, workers=2)
    score = rollout.evaluate(FakeEnv, episodes, sys.argv[2], options, {})
    assert (score["successes"], score["episodes"]) == (4, 4), score
    print("served", sys.version_info[:2])
"""


@pytest.fixture
def uri():
    with server.background(CountingPolicy(), server.ServerOptions(port=0)) as uri:
        yield uri


def make_venv(python, folder, *packages):
    subprocess.run([python, "-m", "venv", str(folder)], check=True)
    binary = str(folder / "bin" / "python")
    subprocess.run([binary, "-m", "pip", "install", "-q", *packages], check=True)
    return binary


def environment(name, folder):
    """The Python of one of `ENVIRONMENTS`, which is made if it is not there yet."""
    folder = Path(os.environ.get("VLA_CLIENT_VENVS") or folder) / name
    packages, binary = ENVIRONMENTS[name], str(folder / "bin" / "python")
    if not folder.exists():
        try:
            make_venv(sys.executable, folder, *packages)
        except subprocess.CalledProcessError:
            shutil.rmtree(folder)  # half an environment would fail for ever
            raise
    # A kept environment may be an old one.
    versions = "import sys; from importlib.metadata import version; print(version(sys.argv[1]))"
    for package, version in (x.split("==") for x in packages if "==" in x):
        result = subprocess.check_output([binary, "-c", versions, package], text=True).strip()
        assert result == version, f"{folder} has {package} {result}; remove it to get {version}"
    return binary


def run_script(binary, folder, code, *arguments):
    script = folder / "script.py"
    script.write_text(code)
    done = subprocess.run(
        [binary, str(script), *arguments],
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_stock_openpi_client(uri, tmp_path):
    binary = environment("openpi-client", tmp_path)
    out = run_script(binary, tmp_path, OPENPI, uri.rpartition(":")[2])
    assert out.startswith("served 1.")


@pytest.mark.slow
@pytest.mark.parametrize("name", CLIENTS)
def test_clients_as_they_are_published(name, tmp_path):
    place, script, arguments, robot = CLIENTS[name]
    policy = RobotPolicy(*robot)
    policy.metadata["dataset"] = "bridge_dataset"
    with server.background(policy, server.ServerOptions(port=0)) as uri:
        binary = environment(place, tmp_path)
        port = uri.rpartition(":")[2]
        assert run_script(binary, tmp_path, script, port, *arguments).startswith("served")


@pytest.mark.slow
@pytest.mark.parametrize("websockets", ["12.0", "13.1"])
def test_rollouts_run_on_python_3_8(uri, tmp_path, websockets):
    python = shutil.which("python3.8")
    # pyenv puts a python3.8 on the path even where none is installed.
    if not python or subprocess.run([python, "-V"], capture_output=True).returncode:
        pytest.skip("no python3.8 on this machine")
    binary = make_venv(python, tmp_path / "venv", "numpy", "msgpack", f"websockets=={websockets}")
    out = run_script(binary, tmp_path, OLD_PYTHON, uri, str(tmp_path / "run"))
    assert "served (3, 8)" in out
