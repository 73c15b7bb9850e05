import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from eval_servers.client import PolicyClient

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
    for flag in ("checkpoint", "port", "host", "step", "dataset", "untrained", "max-message-mb"):
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


def test_sigterm_ends_the_server_cleanly():
    command = [sys.executable, "-c", SERVE]
    with subprocess.Popen(command, env=ENV, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        uri = process.stdout.readline().split()[-1]
        client = PolicyClient(uri)
        assert client.metadata["model"] == "counting"
        process.send_signal(signal.SIGTERM)
        rest = process.stdout.read()
        assert process.wait(timeout=30) == 0
    assert rest == "closed\n"
    client.close()
