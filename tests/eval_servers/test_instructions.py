"""Instructions that a policy cannot be told are found before anything is started."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from eval_servers.calvin import rollout as calvin
from eval_servers.client import PolicyClient
from eval_servers.libero import rollout as libero
from tests.serve.clients import ask, connect, obs
from tests.serve.fakes import CountingPolicy
from vla_jax.serve import server

ROOT = Path(__file__).resolve().parents[2]
FIT = 40  # characters


class Brief(CountingPolicy):
    def check_instruction(self, instruction):
        return f"{len(instruction)} characters, at most {FIT}" if len(instruction) > FIT else ""


@pytest.fixture
def uri():
    with server.background(Brief(), server.ServerOptions(port=0)) as uri:
        yield uri


def test_a_client_asks_what_it_may_say(uri):
    with PolicyClient(uri) as client:
        long = "x" * (FIT + 1)
        assert client.unfit(["go", long, "go"]) == {long: "41 characters, at most 40"}
        assert client.unfit([]) == {}
    with connect(uri) as ws:
        ws.recv()
        ask(ws, obs())
        assert ask(ws, {"endpoint": "check", "instructions": ["go"]}) == {"unfit": {}}
        assert ask(ws, obs())["actions"][0, 1] == 2  # the episode goes on
        assert "expected a list of texts" in ask(ws, {"endpoint": "check", "instructions": "go"})


def test_other_servers_are_not_asked(monkeypatch):
    options = server.ServerOptions(port=0)
    with server.background(CountingPolicy(), options) as uri, PolicyClient(uri) as client:
        assert client.unfit(["x" * 100]) == {}
        client.metadata.pop("endpoints")
        monkeypatch.setattr(client, "_request", None)
        assert client.unfit(["x" * 100]) == {}


@pytest.mark.parametrize(
    ("simulator", "flags", "named"),
    [
        (
            libero,
            ["--suite=object", "--execute-steps=1"],
            "'pick up the alphabet soup and place it in the basket': 52",
        ),
        (calvin, ["--chains=0:3"], ": 41 characters"),
    ],
)
def test_no_simulator_is_started_for_them(uri, simulator, flags, named, tmp_path, capsys):
    """Neither simulator is installed here: starting one would be another error."""
    status = simulator.main([f"--server={uri}", f"--out={tmp_path}/run", *flags])
    message = capsys.readouterr().err
    assert status == 1
    assert "do not fit the policy, so nothing was started" in message
    assert named in message
    assert not (tmp_path / "run").exists()


class Still(CountingPolicy):
    """Holds its arm still and its fingers open."""

    def infer(self, session, obs):
        reply, session = super().infer(session, obs)
        return {"actions": reply["actions"] * 0 + np.eye(7, dtype=np.float32)[6]}, session


def test_a_score_says_whether_it_would_come_again(tmp_path):
    policy = Still()
    policy.metadata |= {"max_batch": 1, "device": "cpu"}
    with server.background(policy, server.ServerOptions(port=0)) as uri:
        flags = [f"--server={uri}", f"--out={tmp_path}", "--episodes=2", "--max-steps=2"]
        flags += ["--workers=1", "--videos=0", "--image-size=32"]
        # A process of its own: no rollout may run where jax is imported.
        command = [sys.executable, "-m", "eval_servers.tabletop.rollout", *flags]
        subprocess.run(command, cwd=ROOT, check=True)
    score = json.loads((tmp_path / "score.json").read_text())
    assert score["conditions"]["repeats"] == {"bit_equal": True, "why_not": []}
