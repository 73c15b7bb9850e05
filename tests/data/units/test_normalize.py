import dataclasses
import json

import numpy as np
import pytest

from vla_jax.data.units.gripper import GripperState
from vla_jax.data.units.normalize import ActionSpec, StateSpec
from vla_jax.data.units.statistics import statistics

RNG = np.random.default_rng(0)
ACTIONS = np.concatenate([RNG.normal(0, 0.1, (500, 6)), RNG.integers(0, 2, (500, 1))], 1)
ACTIONS = ACTIONS.astype(np.float32)
STATISTICS = statistics(ACTIONS, None, 1)


def make(normalization="q99", clip=1.0, found=STATISTICS):
    return ActionSpec.from_statistics(found, normalization, clip, (-1.0, 1.0), hz=5.0)


@pytest.mark.parametrize("normalization", ["q99", "bounds", "normal", "none"])
@pytest.mark.parametrize("clip", [1.0, 0.65])
def test_unnormalize_inverts_normalize_within_the_clip(normalization, clip):
    spec = make(normalization, clip)
    model = RNG.uniform(-1, 1, (50, 7)).astype(np.float32)
    robot = spec.unnormalize(model)
    np.testing.assert_allclose(spec.normalize(robot), model, atol=2e-6)
    np.testing.assert_allclose(spec.unnormalize(spec.normalize(robot)), robot, atol=1e-7)
    np.testing.assert_array_equal(robot[:, 6], model[:, 6])


def test_formulas_of_the_reference():
    action = STATISTICS["action"]
    x = ACTIONS[:, :6].astype(np.float64)
    q01, q99 = np.array(action["q01"][:6]), np.array(action["q99"][:6])
    expected = np.clip(2 * (x - q01) / (q99 - q01 + 1e-8) - 1, -1, 1)
    np.testing.assert_allclose(make("q99").normalize(ACTIONS)[:, :6], expected, atol=1e-6)
    low, high = np.array(action["min"][:6]), np.array(action["max"][:6])
    expected = np.clip(2 * (x - low) / (high - low + 1e-8) - 1, -1, 1)
    np.testing.assert_allclose(make("bounds").normalize(ACTIONS)[:, :6], expected, atol=1e-6)
    mean, std = np.array(action["mean"][:6]), np.array(action["std"][:6])
    expected = np.clip((x - mean) / (std + 1e-8), -3, 3) / 3
    np.testing.assert_allclose(make("normal", 3.0).normalize(ACTIONS)[:, :6], expected, atol=1e-6)


def test_robovlms_clip_worked_example():
    x = np.array([-1, -0.65, -0.3, 0, 0.3, 0.65, 1], np.float32)
    arm = np.tile(x[:, None], (1, 6))
    normalized = make("none", 0.65).normalize(np.concatenate([arm, np.ones((7, 1))], 1))
    np.testing.assert_allclose(normalized[:, 0], [-1, -1, -0.461538, 0, 0.461538, 1, 1], atol=1e-6)
    assert (normalized[:, 6] == 1).all()


@pytest.mark.parametrize("normalization", ["q99", "bounds", "normal"])
def test_constant_dimensions(normalization):
    actions = ACTIONS.copy()
    actions[:, 2] = 0.3
    actions[:, 6] = 1.0  # a gripper that is always open keeps its value
    spec = make(normalization, found=statistics(actions, None, 1))
    model = spec.normalize(actions)
    assert (model[:, 2] == 0).all()
    assert (model[:, 6] == 1).all()
    model[:, 2] = RNG.normal(size=len(model))
    np.testing.assert_array_equal(spec.unnormalize(model)[:, 2], np.float32(0.3))


def test_masked_arm_dimension_is_not_scaled():
    parsed = json.loads(json.dumps(STATISTICS))
    parsed["action"]["mask"][1] = False
    model = make(found=parsed).normalize(np.clip(ACTIONS, -1, 1))
    np.testing.assert_allclose(model[:, 1], np.clip(ACTIONS[:, 1], -1, 1), atol=1e-7)


def test_to_env():
    spec = make("q99")
    actions = np.zeros((3, 7), np.float32)
    actions[:, 6] = [0.0, 0.5, 0.51]
    command, _ = spec.to_env(actions, GripperState())
    assert command.dtype == np.float32
    np.testing.assert_array_equal(command[:, 6], [-1, -1, 1])
    middle = (np.array(spec.low) + np.array(spec.high)) / 2
    np.testing.assert_allclose(command[0, :6], middle, atol=1e-7)


def test_to_env_keeps_the_grippers_memory():
    spec = dataclasses.replace(make("q99"), gripper_patience=2)
    actions = np.concatenate([np.zeros((3, 6)), np.ones((3, 1))], axis=-1, dtype=np.float32)
    full, _ = spec.to_env(actions, GripperState())
    state, one_by_one = GripperState(), []
    for action in actions:
        command, state = spec.to_env(action[None], state)
        one_by_one.append(command[0])
    np.testing.assert_array_equal(full, one_by_one)
    assert full[:, 6].tolist() == [-1, 1, 1]


def test_older_checkpoints_have_no_gripper_memory():
    raw = make("q99").to_json()
    del raw["gripper_repeat"], raw["gripper_patience"]
    assert ActionSpec.from_json(raw) == make("q99")


def test_json_round_trip():
    spec = make("q99", 0.65)
    assert ActionSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    raw = spec.to_json()
    raw["lo"] = raw.pop("low")
    with pytest.raises(ValueError, match=r"missing \['low'\], unknown \['lo'\]"):
        ActionSpec.from_json(raw)


def test_published_statistics_without_a_mask_are_read():
    results = {"action": {k: v for k, v in STATISTICS["action"].items() if k != "mask"}}
    assert make(found=results) == make()


def test_bad_statistics_and_kind():
    with pytest.raises(ValueError, match=r"lacks \['min', 'max', 'q01', 'q99'\]"):
        make(found={"action": {"mean": [0.0] * 7}})
    with pytest.raises(ValueError, match="is none of"):
        make("q95")


def test_states_map_their_quantiles_to_the_ends():
    results = {"proprio": {"q01": [-1.0, 0.0, 5.0], "q99": [3.0, 0.5, 5.0]}}
    spec = StateSpec.from_statistics(results, 3)
    values = spec.normalize(np.array([[-1.0, 0.25, 5.0], [3.0, 9.0, 7.0]]))
    np.testing.assert_allclose(values, [[-1, 0, 0], [1, 1, 0]], atol=1e-6)
    assert values.dtype == np.float32
    with pytest.raises(ValueError, match="record no robot state"):
        StateSpec.from_statistics({}, 3)
