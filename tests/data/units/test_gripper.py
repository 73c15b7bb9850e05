"""Grippers that take states, changes, or open late."""

import numpy as np
import pytest

from vla_jax.data.units.gripper import Gripper, GripperState


def run(gripper: Gripper, decisions) -> list[float]:
    commands, _ = gripper.commands(np.array(decisions, bool), GripperState())
    return commands.tolist()


def test_a_state():
    assert run(Gripper(closed=0.0, opened=0.08), [1, 0, 1]) == pytest.approx([0.08, 0.0, 0.08])


def test_polarity_is_data():
    assert run(Gripper(closed=1.0, opened=-1.0), [1, 0]) == [-1.0, 1.0]


def test_changes_are_repeated_whatever_is_decided_meanwhile():
    gripper = Gripper(closed=1.0, opened=-1.0, repeat=2)
    assert run(gripper, [1, 1, 0, 0, 0, 1, 0, 0]) == [0, 0, 1, 1, 0, -1, -1, 0]


def test_the_first_decision_is_no_change():
    assert run(Gripper(closed=1.0, opened=-1.0, repeat=3), [0, 0, 0]) == [0, 0, 0]


def test_patience():
    gripper = Gripper(closed=-1.0, opened=1.0, patience=2)
    assert run(gripper, [1, 0, 1, 1, 1, 0, 1, 1]) == [-1, -1, -1, 1, 1, -1, -1, 1]


@pytest.mark.parametrize("gripper", [Gripper(1.0, -1.0, repeat=2), Gripper(-1.0, 1.0, patience=3)])
def test_step_by_step_is_the_same(gripper):
    decisions = np.random.default_rng(0).random(40) < 0.6
    state, collected = GripperState(), []
    for decision in decisions:
        command, state = gripper.commands(np.array([decision]), state)
        collected += command.tolist()
    assert collected == run(gripper, decisions)
    assert gripper.has_memory
    assert not Gripper(-1.0, 1.0).has_memory


# Decisions of RoboVLMs' golden SIMPLER run, and what its wrapper commanded; its changes have size
# 2, which the environment clips.
DECISIONS = [0, 0, 1, 1, 1, 0, 0, 1, 0, 1, 1, 0]
GOOGLE = [0, 0, -2, -2, 0, 2, 2, -2, -2, -2, -2, 2]
WIDOWX = [-1, -1, -1, 1, 1, -1, -1, -1, -1, -1, 1, -1]


def test_the_originals_wrapper():
    google = Gripper(closed=1.0, opened=-1.0, repeat=2)
    assert run(google, DECISIONS) == [x / 2 for x in GOOGLE]
    assert run(Gripper(closed=-1.0, opened=1.0, patience=2), DECISIONS) == WIDOWX
