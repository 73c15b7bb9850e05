"""The rules of single datasets that are more than columns, by hand."""

import zlib
from typing import Any

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from vla_jax.data import ops
from vla_jax.data.oxe import get_spec
from vla_jax.data.spec import Trajectory

X = "_converted_externally_to_rlds"


def state_of(found: Trajectory) -> np.ndarray:
    assert found.proprio is not None
    return found.proprio


def binarize_by_loop(position):
    out = np.empty(len(position), np.float32)
    carry = position[-1]
    for t in range(len(position) - 1, -1, -1):
        if position[t] > 0.95:
            carry = 1.0
        elif position[t] < 0.05:
            carry = 0.0
        out[t] = carry
    return out


@pytest.mark.parametrize("seed", range(5))
def test_binarize_gripper_equals_a_backward_scan(seed):
    rng = np.random.default_rng(seed)
    position = rng.choice([0, 0.01, 0.05, 0.3, 0.7, 0.95, 0.96, 1], 40).astype(np.float32)
    np.testing.assert_array_equal(ops.binarize_gripper(position), binarize_by_loop(position))


def test_binarize_gripper_worked_example():
    position = np.array([0.5, 1.0, 0.6, 0.02, 0.4, 0.99, 0.3], np.float32)
    gripper = ops.binarize_gripper(position)
    np.testing.assert_array_equal(gripper, np.array([1, 1, 0, 0, 1, 1, 0.3], np.float32))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ([0, 0, 1, 0, 0, -1, 0], [1, 1, 0, 0, 0, 1, 1]),
        ([0, -1, 0, 1, 1, 0], [0, 1, 1, 0, 0, 0]),
        ([1, 0], [0, 0]),
        ([0, 0.1, -0.1], [1, 1, 1]),  # the threshold itself is no command
        ([0, 0.11, -0.11], [1, 0, 1]),
        ([0], [1]),
        ([], []),
    ],
)
def test_absolute_gripper(change, expected):
    gripper = ops.absolute_gripper(np.array(change, np.float32))
    assert gripper.tolist() == expected
    assert gripper.dtype == np.float32


def test_euler_angles_turn_like_their_quaternion():
    turns = Rotation.random(500, rng=np.random.default_rng(0))
    angles = ops.euler_from_quaternion(turns.as_quat())
    again = Rotation.from_euler("xyz", angles).as_matrix()
    np.testing.assert_allclose(again, turns.as_matrix(), atol=1e-6)


@pytest.mark.parametrize("y", [np.pi / 2, -np.pi / 2])
def test_euler_angles_at_the_poles(y):
    turn = Rotation.from_euler("xyz", [0.3, y, 0.4])
    angles = ops.euler_from_quaternion(turn.as_quat()[None])
    assert angles[0, 2] == 0
    np.testing.assert_allclose(
        Rotation.from_euler("xyz", angles[0]).as_matrix(), turn.as_matrix(), atol=1e-6
    )


@pytest.fixture
def bridge_episode():
    rng = np.random.default_rng(0)
    return {
        "state": rng.normal(size=(6, 7)).astype(np.float32),
        "action": np.concatenate([rng.normal(size=(6, 6)), np.ones((6, 1))], 1).astype(np.float32),
        "language": np.array(["go"] * 6, object),
    }


@pytest.mark.parametrize(
    ("name", "variant", "kept"),
    [
        ("bridge_dataset", "default", [0, 1, 2, 3, 4]),
        ("bridge_dataset", "octo", [0, 1, 2, 3, 4]),
        ("bridge_dataset", "openvla", [1, 2, 3, 4]),
        ("bridge_orig", "default", [1, 2, 3, 4]),
        ("bridge_orig", "octo", [1, 2, 3, 4]),
    ],
)
def test_bridge(bridge_episode, name, variant, kept):
    standardized = get_spec(name, variant).standardize(bridge_episode)
    state = bridge_episode["state"]
    assert np.arange(6)[standardized.keep].tolist() == kept
    for t in kept:
        np.testing.assert_array_equal(standardized.action[t, :6], state[t + 1, :6] - state[t, :6])
    assert (standardized.action[:, 6] == 1).all()
    assert standardized.action.dtype == np.float32
    expected = state if len(kept) == 5 else np.insert(state, 6, 0, axis=1)
    np.testing.assert_array_equal(state_of(standardized), expected)


def test_bridge_oxe():
    state = np.cumsum(np.arange(28, dtype=np.float32).reshape(4, 7), axis=0)
    opened = np.array([False, True, True, False])
    standardized = get_spec("bridge_oxe").standardize(
        {"state": state, "open": opened, "language": np.array(["go"] * 4, object)}
    )
    retained = standardized.action[standardized.keep]
    assert retained.tolist() == [[14, 15, 16, 17, 18, 19, 1], [21, 22, 23, 24, 25, 26, 1]]
    assert state_of(standardized)[1].tolist() == [*state[1, :6].tolist(), 0, state[1, 6]]


def test_calvin_gripper_and_arm():
    action = np.array([[0.5, -1, 1, 0, 0.25, -0.5, -1], [0, 0, 0, 0, 0, 0, 1]], np.float32)
    episode: dict[str, Any] = {
        "action": action,
        "robot_obs": np.zeros((2, 15)),
        "language": "x",
    }
    standardized = get_spec("calvin").standardize(episode)
    np.testing.assert_array_equal(standardized.action[:, :6], action[:, :6])
    np.testing.assert_array_equal(standardized.action[:, 6], [0, 1])
    assert get_spec("calvin").gripper_env == (-1, 1)


def test_kuka_states_may_come_compressed():
    spec = get_spec("kuka")
    pose = np.arange(14, dtype=np.float32).reshape(2, 7)
    closed = np.array([[0.5], [0.25]], np.float32)
    names = ("observation/clip_function_input/base_pose_tool_reached", "observation/gripper_closed")
    episode = {
        "action/world_vector": np.ones((2, 3), np.float32),
        "action/rotation_delta": np.ones((2, 3), np.float32),
        "action/gripper_closedness_action": np.array([[0], [-1]], np.float32),
        "observation/natural_language_instruction": np.array(["pick anything"] * 2, object),
    }
    packed = {
        name: np.array([zlib.compress(row.tobytes()) for row in values], object)
        for name, values in zip(names, (pose, closed), strict=True)
    }
    plain = spec.standardize(episode | dict(zip(names, (pose, closed), strict=True)))
    standardized = spec.standardize(episode | packed)
    np.testing.assert_array_equal(state_of(standardized), np.concatenate([pose, closed], axis=1))
    np.testing.assert_array_equal(state_of(standardized), state_of(plain))
    assert standardized.action[:, 6].tolist() == [0, 1]


@pytest.mark.parametrize("variant", ["openvla", "octo"])
def test_language_table(variant):
    codes = np.zeros((3, 12), np.int32)
    codes[:, :7] = [ord(letter) for letter in "go → é"] + [0]
    codes[:, 8] = ord("x")  # what follows the end does not count
    standardized = get_spec("language_table", variant).standardize(
        {
            "action": np.array([[0.1, -0.2]] * 3, np.float32),
            "observation/effector_translation": np.array([[0.5, 0.25]] * 3, np.float32),
            "observation/instruction": codes,
        }
    )
    assert standardized.language == "go → é"
    expected = np.array([[0.1, -0.2, 0, 0, 0, 0, 1]] * 3, np.float32)
    np.testing.assert_array_equal(standardized.action, expected)
    padding = [0.0] * (6 if variant == "openvla" else 0)
    assert state_of(standardized).tolist() == [[0.5, 0.25, *padding]] * 3


def test_language_table_without_text():
    assert ops.first_text(np.zeros((2, 4), np.int32)) == ""
    assert ops.first_text(np.array([[0, 65], [66, 0]])) == "B"


def test_droid_in_both_its_forms():
    rng = np.random.default_rng(0)
    velocity = rng.normal(size=(3, 6)).astype(np.float32)
    episode = {
        "action_dict/cartesian_velocity": velocity,
        "action_dict/gripper_position": np.array([[0], [0.25], [1]], np.float32),
        "observation/cartesian_position": rng.normal(size=(3, 6)).astype(np.float32),
        "observation/gripper_position": np.zeros((3, 1), np.float32),
        "language_instruction": np.array(["wipe"] * 3, object),
    }
    for name in ("droid", "droid_wipe"):
        spec = get_spec(name)
        standardized = spec.standardize(episode)
        np.testing.assert_array_equal(standardized.action[:, :6], velocity)
        assert standardized.action[:, 6].tolist() == [1, 0.75, 0]
        assert state_of(standardized).shape == (3, 7)
        assert spec.gripper_env == (1, 0)
        assert not spec.gripper_binary
    assert get_spec("droid").swap == ("primary", "secondary")
    assert get_spec("droid").noop == 1e-5
    assert get_spec("droid_wipe").swap is None
    assert get_spec("droid_wipe").noop == 0


def test_libero_gripper_is_told_its_own_way():
    spec = get_spec("libero_spatial_no_noops")
    assert spec.gripper_env == (1, -1)  # -1 opens, 1 closes
    assert spec.gripper_binary
    assert spec.hz == 20


def test_berkeley_rpt_by_octo_goes_at_a_third_of_the_rate():
    joints = np.arange(8, dtype=np.float32)[:, None] ** 2 + np.arange(7)
    action = np.zeros((8, 8), np.float32)
    action[:, 7] = np.arange(8) / 8
    episode = {
        "joints": joints.astype(np.float32),
        "gripper": np.ones(8, bool),
        "action": action,
        "language": np.array(["go"] * 8, object),
    }
    standardized = get_spec(f"berkeley_rpt{X}", "octo").standardize(episode)
    # Steps 0, 3, 6 of which the last has no next: 9 - 0 and 36 - 9.
    retained = standardized.action[standardized.keep]
    assert retained[:, 0].tolist() == [9, 27]
    assert retained[:, 7].tolist() == [1, 1 - 3 / 8]
    assert state_of(standardized)[standardized.keep].tolist() == [
        [*range(7), 1],
        [*range(9, 16), 1],
    ]
    plain = get_spec(f"berkeley_rpt{X}")
    assert plain.hz == 30
    assert get_spec(f"berkeley_rpt{X}", "octo").hz == 10


@pytest.mark.parametrize(("steps", "kept"), [(1, 0), (3, 0), (4, 1), (6, 1), (7, 2)])
def test_strides_leave_out_the_last_of_what_is_left(steps, kept):
    standardized = get_spec(f"berkeley_rpt{X}", "octo").standardize(
        {
            "joints": np.zeros((steps, 7), np.float32),
            "gripper": np.zeros(steps, bool),
            "action": np.zeros((steps, 8), np.float32),
            "language": np.array([""] * steps, object),
        }
    )
    assert len(np.arange(steps)[standardized.keep]) == kept


def gnm_episode(position, yaw, first_action=(0.5, 0.0)):
    steps = len(position)
    action = np.zeros((steps, 2), np.float32)
    action[0] = first_action
    return {
        "position": np.array(position, np.float32),
        "yaw": np.array(yaw, np.float32)[:, None],
        "state": np.zeros((steps, 3), np.float32),
        "action": action,
        "language": np.array(["go"] * steps, object),
    }


def test_gnm_by_octo():
    # Turned a quarter to the left, so that the world's y is ahead and its x to the right.
    position = [[0, 0], [0, 1], [0, 2], [0, 3], [1, 4], [2, 5], [3, 6]]
    standardized = get_spec("gnm_dataset").standardize(gnm_episode(position, [np.pi / 2] * 7))
    # The first action is half the first step long, so everything is halved.
    expected = [[1.5, 0], [1.5, -1.5]]
    np.testing.assert_allclose(standardized.action[standardized.keep], expected, atol=1e-6)
    assert standardized.action.dtype == np.float32


@pytest.mark.parametrize("position", [[[1, 1]], [[1, 1], [1, 1], [2, 2], [3, 3]]])
def test_gnm_without_a_first_step_has_no_scale(position):
    standardized = get_spec("gnm_dataset").standardize(gnm_episode(position, [0.0] * len(position)))
    assert len(standardized.action[standardized.keep]) == 0
    assert np.isfinite(standardized.action).all()


@pytest.mark.parametrize(("robot", "numbers"), [("static", 14), ("dagger", 14), ("mobile", 16)])
def test_aloha_goes_at_a_fifth_of_the_rate(robot, numbers):
    action = np.arange(11 * numbers, dtype=np.float32).reshape(11, numbers)
    state = np.arange(11 * 14, dtype=np.float32).reshape(11, 14)
    spec = get_spec(f"aloha_{robot}_dataset")
    episode = {
        "action": action,
        "observation/state": state,
        "language_instruction": np.array(["go"] * 11, object),
    }
    standardized = spec.standardize(episode)
    np.testing.assert_array_equal(standardized.action[standardized.keep], action[[0, 5, 10]])
    np.testing.assert_array_equal(state_of(standardized)[standardized.keep], state[[0, 5, 10]])
    assert spec.hz == 10
