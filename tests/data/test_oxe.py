import numpy as np
import pytest

from vla_jax.data import ops
from vla_jax.data.oxe import SPECS, get_spec
from vla_jax.types import CAMERAS


def binarise_by_loop(position):
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
def test_binarise_gripper_equals_a_backward_scan(seed):
    rng = np.random.default_rng(seed)
    position = rng.choice([0, 0.01, 0.05, 0.3, 0.7, 0.95, 0.96, 1], 40).astype(np.float32)
    np.testing.assert_array_equal(ops.binarise_gripper(position), binarise_by_loop(position))


def test_binarise_gripper_worked_example():
    position = np.array([0.5, 1.0, 0.6, 0.02, 0.4, 0.99, 0.3], np.float32)
    found = ops.binarise_gripper(position)
    np.testing.assert_array_equal(found, np.array([1, 1, 0, 0, 1, 1, 0.3], np.float32))


@pytest.fixture
def bridge_episode():
    rng = np.random.default_rng(0)
    return {
        "state": rng.normal(size=(6, 7)).astype(np.float32),
        "action": np.concatenate([rng.normal(size=(6, 6)), np.ones((6, 1))], 1).astype(np.float32),
        "language": np.array(["go"] * 6, object),
    }


@pytest.mark.parametrize(
    ("name", "kept"), [("bridge_dataset", [0, 1, 2, 3, 4]), ("bridge_orig", [1, 2, 3, 4])]
)
def test_bridge(bridge_episode, name, kept):
    found = get_spec(name).standardise(bridge_episode)
    state = bridge_episode["state"]
    assert np.arange(6)[found.keep].tolist() == kept
    for t in kept:
        np.testing.assert_array_equal(found.action[t, :6], state[t + 1, :6] - state[t, :6])
    assert (found.action[:, 6] == 1).all()
    assert found.action.dtype == np.float32


def test_calvin_gripper_and_arm():
    action = np.array([[0.5, -1, 1, 0, 0.25, -0.5, -1], [0, 0, 0, 0, 0, 0, 1]], np.float32)
    episode = {"action": action, "robot_obs": np.zeros((2, 15)), "language": "x"}
    found = get_spec("calvin").standardise(episode)
    np.testing.assert_array_equal(found.action[:, :6], action[:, :6])
    np.testing.assert_array_equal(found.action[:, 6], [0, 1])
    assert get_spec("calvin").gripper_env == (-1, 1)


def test_unknown_spec_lists_the_legal_ones():
    with pytest.raises(KeyError, match=r"did you mean 'bridge_dataset'.*calvin"):
        get_spec("bridge_datset")


def test_every_spec_names_legal_cameras():
    for name, spec in SPECS.items():
        assert set(spec.images) <= set(CAMERAS), name
        assert spec.gripper_env[0] != spec.gripper_env[1], name
