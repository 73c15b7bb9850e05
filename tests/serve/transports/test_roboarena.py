"""RoboArena's wire, asked as its example client asks."""

import numpy as np
import pytest

from tests.serve.clients import ask, connect
from tests.serve.fakes import CountingPolicy
from vla_jax.serve import msgpack_numpy, server

# What its clients build their settings from, as keyword arguments.
SETTINGS = {
    "image_resolution",
    "needs_wrist_camera",
    "n_external_cameras",
    "needs_stereo_camera",
    "needs_session_id",
    "action_space",
}


@pytest.fixture
def policy():
    policy = CountingPolicy()
    cameras = {"primary": "observation/image", "wrist": "observation/wrist_image"}
    policy.metadata |= {"cameras": cameras, "observation": {"action_space": "joint_velocity"}}
    return policy


@pytest.mark.parametrize("path", ["/roboarena", "/", ""])
def test_its_client_gets_its_settings_and_a_history_for_each_episode(policy, path):
    options = server.ServerOptions(port=0, wire="roboarena")
    with server.background(policy, options) as uri, connect(uri + path) as ws:
        settings = msgpack_numpy.unpack(ws.recv())
        assert settings.keys() == SETTINGS
        assert (settings["n_external_cameras"], settings["needs_wrist_camera"]) == (1, True)
        assert settings["action_space"] == "joint_velocity"
        image = np.zeros((12, 20, 3), np.uint8)
        obs = {"observation/image": image, "prompt": "go", "endpoint": "infer"}

        def step(name):
            return int(ask(ws, {**obs, "session_id": name})["actions"][0, 1])

        assert [step(name) for name in ("a", "a", "b", "b", "b", "a")] == [1, 2, 1, 2, 3, 1]
        assert ask(ws, {"session_id": "a", "endpoint": "reset"}) == "reset successful"
        assert step("a") == 1


def test_nobody_is_served_whose_actions_nobody_has_named(policy):
    policy.metadata["observation"] = {"action_space": ""}
    with server.background(policy, server.ServerOptions(port=0)) as uri:
        with connect(uri + "/roboarena") as ws:
            assert "--action-space" in ws.recv()
        with connect(uri) as ws:
            assert msgpack_numpy.unpack(ws.recv())["model"] == "counting"


def test_a_wire_that_does_not_exist(policy):
    options = server.ServerOptions(port=0, wire="grpc")
    with (
        pytest.raises(ValueError, match="'grpc' is none of"),
        server.background(policy, options),
    ):
        pass
