import importlib.util
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from eval_servers.client import PolicyClient
from tests.serve.fakes import CountingPolicy

ROOT = Path(__file__).resolve().parents[2]
ENV = {**os.environ, "PYTHONPATH": str(ROOT)}
SERVE = (
    "from tests.serve.fakes import CountingPolicy\n"
    "from vla_jax.serve import server\n"
    "options = server.ServerOptions(port=0)\n"
    "server.run(CountingPolicy(), options, lambda uri: print('listening on', uri, flush=True))\n"
    "print('closed')\n"
)


def serve_py(*flags):
    command = [sys.executable, str(ROOT / "launch" / "serve.py"), *flags]
    return subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=60)


def test_help_names_every_flag():
    done = serve_py("--help")
    assert done.returncode == 0
    flags = ("checkpoint", "port", "host", "step", "dataset", "untrained", "max-message-mb")
    for flag in (*flags, "max-batch", "max-wait-ms", "api-key-file", "idle-timeout"):
        assert f"--{flag}" in done.stdout


def test_a_taken_port_is_found_before_anything_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = serve_py("--checkpoint=missing", f"--port={port}")
    assert done.returncode == 1
    assert "in use" in done.stderr
    assert str(port) in done.stderr
    assert "Traceback" not in done.stderr


def test_bad_flags():
    assert "65535" in serve_py("--checkpoint=x", "--port=70000").stderr
    assert "positive" in serve_py("--checkpoint=x", "--max-message-mb=0").stderr
    assert "negative" in serve_py("--checkpoint=x", "--max-wait-ms=-1").stderr
    assert "missing.key" in serve_py("--checkpoint=x", "--api-key-file=missing.key").stderr


def test_sigterm_ends_the_server_cleanly():
    command = [sys.executable, "-c", SERVE]
    with subprocess.Popen(command, env=ENV, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        uri = process.stdout.readline().split()[-1]
        client = PolicyClient(uri)
        assert client.metadata["model"] == "counting"
        process.send_signal(signal.SIGTERM)
        remainder = process.stdout.read()
        assert process.wait(timeout=30) == 0
    assert remainder == "closed\n"
    client.close()


@pytest.fixture
def launch(monkeypatch, tmp_path):
    """launch/serve.py's main() with a stand-in policy; calls are recorded."""
    monkeypatch.chdir(tmp_path)
    for folder in ("runs/a", "a", "broken"):
        (tmp_path / folder / "checkpoints").mkdir(parents=True)
    spec = importlib.util.spec_from_file_location("launch_serve", ROOT / "launch" / "serve.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    calls = {}

    class Policy(CountingPolicy):
        @classmethod
        def from_checkpoint(cls, folder, **choices):
            calls["checkpoint"] = (folder, choices)
            if folder == "broken":
                raise ValueError("dataset 'x' is unknown; the checkpoint has ['tabletop']")
            policy = cls()
            policy.metadata["observation"] = {"aliases": []}
            return policy

    def run(policy, options, ready):
        calls.update(options=options, policy=policy)
        ready("ws://somewhere:1")

    monkeypatch.setitem(sys.modules, "vla_jax.inference.policy", SimpleNamespace(Policy=Policy))
    monkeypatch.setattr(module.server, "run", run)

    def main(*flags):
        monkeypatch.setattr(sys, "argv", ["serve.py", *flags])
        return module.main(), calls

    return main


def test_flags_reach_the_policy_and_the_server(launch, capsys):
    flags = ["--checkpoint=runs/a", "--port=0", "--step=300", "--dataset=tabletop", "--untrained"]
    status, calls = launch(*flags, "--max-message-mb=2", "--max-sessions=3", "--host=0.0.0.0")
    assert status == 0
    folder, choices = calls["checkpoint"]
    assert folder == "runs/a"
    wanted = {"step": 300, "dataset": "tabletop", "untrained": True, "gripper": {}}
    wanted |= {"max_batch": 3, "observation": None, "weights": ""}
    assert {k: v for k, v in choices.items() if k != "execution"} == wanted
    assert choices["execution"].mode == "chunk"
    options = calls["options"]
    assert (options.host, options.port, options.max_sessions) == ("0.0.0.0", 0, 3)
    assert options.max_message_bytes == 2 * 2**20
    assert capsys.readouterr().out == "listening on ws://somewhere:1\n"


def test_a_robots_own_keys(launch, capsys):
    flags = ["--checkpoint=a", "--port=0"]
    _, calls = launch(*flags, "--observation=droid", "--unnorm-keys=droid_100,mine")
    assert calls["checkpoint"][1]["observation"].profile == "droid"
    assert calls["policy"].metadata["observation"]["aliases"] == ["droid_100", "mine"]
    assert launch(*flags, "--observation=droids")[0] == 1
    assert "neither one of ['openpi', 'libero', 'droid'" in capsys.readouterr().err


def test_limits_and_the_key_reach_the_server(launch, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("VLA_API_KEY", "from-environment")
    flags = ["--checkpoint=a", "--port=0", "--max-batch=16", "--max-wait-ms=7", "--idle-timeout=60"]
    _, calls = launch(*flags)
    options = calls["options"]
    assert (options.max_wait, options.idle_timeout) == (0.007, 60.0)
    assert options.api_key == "from-environment"
    assert calls["checkpoint"][1]["max_batch"] == 16
    (tmp_path / "key").write_text("from-file\n")
    _, calls = launch(*flags, f"--api-key-file={tmp_path / 'key'}", "--host=0.0.0.0")
    assert calls["options"].api_key == "from-file"
    assert "without an API key" not in caplog.text
    monkeypatch.delenv("VLA_API_KEY")
    launch(*flags, "--host=0.0.0.0")
    assert "--host=0.0.0.0 without an API key: anyone may connect" in caplog.text


def test_a_checkpoint_that_does_not_load_is_one_line(launch, capsys):
    status, calls = launch("--checkpoint=broken", "--port=0")
    assert status == 1
    assert "options" not in calls
    choices = calls["checkpoint"][1]
    assert (choices["step"], choices["dataset"], choices["untrained"]) == (None, None, False)
    expected = "serve.py: dataset 'x' is unknown; the checkpoint has ['tabletop']"
    assert expected in capsys.readouterr().err
