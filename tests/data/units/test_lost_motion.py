"""Clipping that takes most of a dimension away is refused, a little less is told."""

import logging

import numpy as np
import pytest

from vla_jax.config import ConfigError
from vla_jax.data.units.lost_motion import (
    check_clipping,
    clipped_shares,
    lost_gripper,
    lost_motion,
)
from vla_jax.data.units.normalize import ActionSpec


def spec(normalization="none", clip=0.65, low=(-1.0, -1.0), high=(1.0, 1.0)):
    return ActionSpec(2, normalization, clip, low, high, None)


def actions(share):
    """Dimension 0 rests at 0; dimension 1 is 1.2 in a share of 100 frames, else 0.1."""
    column = np.where(np.arange(100) < 100 * share, 1.2, 0.1)
    return np.stack([np.zeros(100), column], axis=1).astype(np.float32)


def test_shares_are_counted_by_dimension():
    assert clipped_shares(actions(0.25), spec()) == [0.0, 0.25]
    # At the edge is not beyond it, and a constant is not clipped.
    assert clipped_shares(np.array([[0.65, -0.65]]), spec()) == [0.0, 0.0]
    assert clipped_shares(np.array([[7.0, 0.0]]), spec(low=(3.0, -1.0), high=(3.0, 1.0))) == [0, 0]


def test_most_of_a_dimension_is_refused_with_the_way_out():
    with pytest.raises(ConfigError) as error:
        check_clipping("mine", actions(0.8), spec())
    message = str(error.value)
    assert "'mine', by dimension: 1: 80% of the frames" in message
    for way_out in (
        "data.normalization = none with data.clip = 0.65",
        "q99 or bounds",
        "data.clip",
    ):
        assert way_out in message
    check_clipping("mine", actions(0.8), spec(clip=2.0))


def test_some_is_told_and_a_little_is_not(caplog):
    with caplog.at_level(logging.WARNING):
        check_clipping("mine", actions(0.02), spec())
        check_clipping("mine", actions(0.5), spec("q99", 1.0))  # the quantiles' own business
        assert not caplog.records
        check_clipping("mine", actions(0.3), spec())
    assert "1: 30% of the frames" in caplog.text


def test_what_clipping_cuts_is_told_once(caplog):
    recorded = actions(0.3)
    both = spec("bounds").normalize, spec("bounds").unnormalize
    assert len(lost_motion(recorded, *both)) == 1
    with caplog.at_level(logging.WARNING):
        clipped = check_clipping("mine", recorded, spec("bounds"))
    assert clipped == {1: "30%"}
    assert lost_motion(recorded, *both, clipped=clipped) == []


@pytest.mark.parametrize(
    ("opened", "told"),
    [
        ([0.0, 0.08], "0 to 0.08, and from 0 = closed to 1 = open that is always closed"),
        ([85.0, 85.0], "always open"),
        ([-1.0, 0.0], "always closed"),
        ([0.0, 1.0], ""),
        ([-1.0, 1.0], ""),
        ([1.0, 1.0], ""),
        ([0.0, 0.0], ""),
        ([], ""),
    ],
)
def test_a_gripper_that_would_never_move(opened, told):
    lines = lost_gripper(np.array(opened, np.float32))
    assert len(lines) == bool(told)
    assert told in "".join(lines)
