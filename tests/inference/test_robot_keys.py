"""Observations of robots and clients nobody here wrote, under the keys that they send."""

import json
from typing import Any

import numpy as np
import pytest

from tests.inference.test_policy import make
from vla_jax.config import ConfigError
from vla_jax.config.observation import PROFILES, ObservationConfig
from vla_jax.data.units.normalize import StateSpec
from vla_jax.inference import robot_keys
from vla_jax.inference.protocol import ObservationError
from vla_jax.inference.robot_keys import RobotKeys


def picture(value, shape=(6, 8, 3)):
    return np.full(shape, value, np.uint8)


DROID = {
    "observation/exterior_image_1_left": picture(1),
    "observation/wrist_image_left": picture(2),
    "observation/joint_position": np.arange(7.0),
    "observation/gripper_position": np.array([0.5]),
    "prompt": "go",
}
ALOHA = {
    "state": np.arange(14.0),
    "images": {
        "cam_high": picture(1, (3, 6, 8)),
        "cam_low": picture(9, (3, 6, 8)),
        "cam_left_wrist": picture(2, (3, 6, 8)),
        "cam_right_wrist": picture(3, (3, 6, 8)),
    },
    "prompt": "go",
}
OFT = {
    "full_image": picture(1),
    "left_wrist_image": picture(2),
    "right_wrist_image": picture(3),
    "state": np.arange(14.0),
    "instruction": "go",
}
LIBERO = {
    "observation/image": picture(1),
    "observation/wrist_image": picture(2),
    "observation/state": np.arange(1.0, 9.0),
    "prompt": "go",
}
ARENA = {
    "observation/exterior_image_0_left": picture(1),
    "observation/exterior_image_1_left": picture(3),
    "observation/wrist_image_left": picture(2),
    "observation/joint_position": np.arange(7.0),
    "observation/cartesian_position": np.zeros(6),
    "observation/gripper_position": np.float32(0.5),
    "session_id": "38DSA3hd3",
    "prompt": "go",
}
# profile, observation, numbers of state, which cameras there are
SENT = [
    ("openpi", LIBERO, 8, ("primary", "wrist")),
    ("libero", LIBERO, 8, ("primary", "wrist")),
    ("droid", DROID, 8, ("primary", "wrist")),
    ("roboarena", ARENA, 8, ("primary", "secondary", "wrist")),
    ("aloha", ALOHA, 14, ("primary", "secondary", "wrist")),
    ("openvla", OFT, 14, ("primary", "secondary", "wrist")),
]
KEYS = {
    "primary": "observation/image",
    "secondary": "observation/image_secondary",
    "wrist": "observation/wrist_image",
}


@pytest.mark.parametrize(("profile", "sent", "numbers", "cameras"), SENT)
def test_what_a_known_robot_sends_is_found(profile, sent, numbers, cameras):
    standard = RobotKeys(ObservationConfig(profile)).standardize(sent, numbers)
    for camera in cameras:
        image = standard[KEYS[camera]]
        assert image.shape == (6, 8, 3)
        assert image.mean() == {"primary": 1, "wrist": 2, "secondary": 3}[camera]
    assert standard["prompt"] == "go"
    assert standard["observation/state"].shape == (numbers,)


def test_states_are_put_together():
    droid = RobotKeys(ObservationConfig("droid")).standardize(DROID, 8)
    assert droid["observation/state"].tolist() == [0, 1, 2, 3, 4, 5, 6, 0.5]
    libero = RobotKeys(ObservationConfig("libero"))
    nine = libero.standardize(LIBERO, 9)["observation/state"]
    assert nine.tolist() == [1, 2, 3, 4, 5, 6, 0, 7, 8]
    separate = RobotKeys(ObservationConfig(state=("a.b[1:3]", 7, "c")))
    sent = {"a": {"b": [1, 2, 3]}, "c": 4}
    assert separate.standardize(sent, 4)["observation/state"].tolist() == [2, 3, 7, 4]


def test_dots_lead_into_maps_and_may_stand_in_names():
    separate = RobotKeys(ObservationConfig(images={"primary": ["x.y", "observation.images.top"]}))
    for sent in (
        {"observation.images.top": picture(5)},
        {"observation": {"images": {"top": picture(5)}}},
        {"observation.images": {"top": picture(5)}},
    ):
        assert separate.standardize(sent)["observation/image"].mean() == 5
    for sent in ({"x": picture(1)}, {"x": {"z": 1}}, {"x": "y"}, {}):
        assert "observation/image" not in separate.standardize(sent)


def test_openpis_own_names_are_taken_beside_a_robots():
    keys = RobotKeys(ObservationConfig("droid"))
    assert keys.standardize(LIBERO, 8)["observation/image"].mean() == 1
    assert keys.to_json()["images"]["primary"] == [
        "observation/exterior_image_1_left",
        "observation/image",
    ]


def test_values_of_no_use_are_left_for_the_check():
    keys = RobotKeys(ObservationConfig("droid"))
    for bad in ("x", b"x", None, [1, "a"], np.zeros((2, 2)), np.array(["a"]), {"a": 1}):
        sent = {**DROID, "observation/joint_position": bad}
        assert "observation/state" not in keys.standardize(sent, 8)


def test_a_file_of_the_users(tmp_path):
    path = tmp_path / "robot.json"
    path.write_text(
        json.dumps({"images": {"wrist": "hand"}, "state": ["joints", 0], "prompt": "task"})
    )
    keys = RobotKeys(robot_keys.load(str(path)))
    sent = {"hand": picture(2), "joints": [1.0, 2.0], "task": "go", "observation/image": picture(1)}
    standard = keys.standardize(sent, 3)
    assert standard["observation/wrist_image"].mean() == 2
    assert standard["observation/state"].tolist() == [1, 2, 0]
    assert standard["prompt"] == "go"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "not JSON"),
        ("[]", "expected an object"),
        ('{"camera": {}}', "expected an object with some of"),
        ('{"profile": "libera"}', "profile: one of"),
        ('{"images": {"front": "a"}}', "'front' is none of"),
        ('{"images": {"wrist": [3]}}', "3 is no key"),
        ('{"state": ["zeros", "a", "zeros"]}', "can stand there once"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path, content, problem):
    path = tmp_path / "robot.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=problem):
        robot_keys.load(str(path))
    with pytest.raises(ConfigError, match="neither one of"):
        robot_keys.load("missing.json")


def test_profiles_are_legal():
    for name in PROFILES:
        assert RobotKeys(robot_keys.load(name)).name == name


def test_a_policy_answers_its_robot():
    """The same pictures and numbers give the same actions under either name."""
    dim = 8
    states = StateSpec((0.0,) * dim, (1.0,) * dim)
    changes: Any = {"structure.proprio": dim}
    policy = make(states=states, **changes)
    ours = {"prompt": "lift the red block", "observation/image": DROID[next(iter(DROID))]}
    ours["observation/wrist_image"] = DROID["observation/wrist_image_left"]
    ours["observation/state"] = np.array([0, 1, 2, 3, 4, 5, 6, 0.5])
    policy.keys = RobotKeys(ObservationConfig("droid"))
    reference = {**DROID, "prompt": ours["prompt"]}
    policy.check(reference)
    replies = [policy.infer(policy.new_session(), obs)[0]["actions"] for obs in (ours, reference)]
    np.testing.assert_array_equal(*replies)
    with pytest.raises(ObservationError) as refused:
        policy.check({"prompt": "lift the red block", "observation/wrist_image_left": picture(2)})
    text = str(refused.value)
    assert (
        "observation/exterior_image_1_left or observation/image: missing (primary camera)" in text
    )
    assert "observation/joint_position + observation/gripper_position: expected 8 numbers" in text
