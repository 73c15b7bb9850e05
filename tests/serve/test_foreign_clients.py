"""Clients this project did not write, or Pythons it does not run on, against the server."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serve.fakes import CountingPolicy
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
    # openpi-client imports typing_extensions without declaring it.
    packages = ("numpy<2", "openpi-client==0.1.2", "typing_extensions")
    binary = make_venv(sys.executable, tmp_path / "venv", *packages)
    out = run_script(binary, tmp_path, OPENPI, uri.rpartition(":")[2])
    assert out.startswith("served 1.")


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
