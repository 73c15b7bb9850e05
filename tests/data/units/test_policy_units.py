"""Units of today's policies: their rules, relative actions, and the way there and back."""

import json

import numpy as np
import pytest

from vla_jax.data.units.policy_units import PolicyUnits
from vla_jax.data.units.relative import mask_of
from vla_jax.data.units.scaling import RULES, Scaling, pad

STATISTICS = {
    "mean": [0.1, -0.2, 0.3], "std": [0.5, 0.0, 2.0],
    "q01": [-1.0, 2.0, 0.0], "q99": [1.0, 2.0, 4.0],
    "min": [-2.0, 2.0, -1.0], "max": [2.0, 2.0, 5.0],
}  # fmt: skip
RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("openpi_zscore", [0.4 / (0.5 + 1e-6), 2.2 / 1e-6, -0.3 / (2 + 1e-6)]),
        ("lerobot_zscore", [0.4 / (0.5 + 1e-8), 2.2 / 1e-8, -0.3 / (2 + 1e-8)]),
        ("openpi_quantile", [3 / (2 + 1e-6) - 1, -1.0, 0 - 1.0]),
        ("lerobot_quantile", [0.5, -1.0, -1.0]),
        ("openvla_quantile", [3 / (2 + 1e-8) - 1, -1.0, -1.0]),
        ("oft_bounds", [5 / (4 + 1e-8) - 1, -1.0, 2 / (6 + 1e-8) - 1]),
    ],
)
def test_each_project_has_its_own_epsilon(rule, expected):
    units = Scaling.from_statistics(STATISTICS, rule)
    normalized = units.normalize(np.array([0.5, 2.0, 0.0]))
    np.testing.assert_allclose(normalized, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_the_way_back(rule):
    # Within the range: some rules clip. A range of 0 forgets its number but for rounding.
    values = RNG.uniform(0.0, 1.0, (5, 3))
    values[:, 1] = -0.2 if rule == "lerobot_zscore" else 2.0
    units = Scaling.from_statistics(STATISTICS, rule)
    np.testing.assert_allclose(units.unnormalize(units.normalize(values)), values, atol=1e-7)


def test_masked_numbers_stay_and_padding_comes_back_untouched():
    units = Scaling.from_statistics(STATISTICS | {"mask": [True, True, False]}, "oft_quantile")
    values = np.array([0.5, 2.0, 0.25])
    assert units.normalize(values)[2] == 0.25
    behind = units.unnormalize(pad(units.normalize(values), 6))
    np.testing.assert_array_equal(behind[3:], 0.0)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="none of"):
        Scaling.from_statistics(STATISTICS, "quantile")
    with pytest.raises(ValueError, match=r"openpi_quantile needs \['q01', 'q99'\]"):
        Scaling.from_statistics({"mean": [0.0], "std": [1.0]}, "openpi_quantile")
    with pytest.raises(ValueError, match="4 numbers, statistics of 3"):
        Scaling.from_statistics(STATISTICS, "openpi_zscore").normalize(np.zeros(4))
    with pytest.raises(ValueError, match="4 numbers do not fit the model's 3"):
        pad(np.zeros(4), 3)


@pytest.mark.parametrize("robot", ["", "aloha"])
def test_chunks_go_there_and_back(robot):
    state = RNG.uniform(0.2, 0.8, 14)
    actions = RNG.uniform(0.2, 0.8, (5, 14))
    statistics = {"mean": RNG.normal(size=14), "std": RNG.uniform(0.5, 1, 14)}
    scaling = Scaling.from_statistics(statistics, "openpi_zscore")
    units = PolicyUnits(scaling, scaling, 14, mask_of(6, -1, 6, -1), robot)
    units = PolicyUnits.from_json(json.loads(json.dumps(units.to_json())))
    predicted = pad(units.prepare_actions(actions, state), 32)
    assert predicted.shape == (5, 32)
    np.testing.assert_allclose(units.restore(predicted, state), actions, atol=1e-9)


def test_an_unknown_robot_is_refused():
    scaling = Scaling.from_statistics(STATISTICS, "openpi_zscore")
    with pytest.raises(ValueError, match="none of"):
        PolicyUnits(scaling, scaling, 3, robot="alpaca")
