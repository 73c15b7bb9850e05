"""A policy's actions into SimplerEnv's, by hand; tests/parity has RoboVLMs' own wrapper."""

import json

import numpy as np
import pytest

from eval_servers.simpler.profiles import (
    PROFILES,
    Gripper,
    GripperState,
    Profile,
    axis_angle,
    convert,
    grip,
)
from eval_servers.simpler.tasks import GOOGLE, WIDOWX

OFFICIAL, ROBOVLMS = PROFILES["official"], PROFILES["robovlms"]


def run(gripper, openness):
    state, collected = GripperState(), []
    for value in openness:
        command, state = grip(gripper, value, state)
        collected.append(command)
    return collected


@pytest.mark.parametrize(
    ("euler", "expected"),
    [
        ((0, 0, 0), (0, 0, 0)),
        ((np.pi / 2, 0, 0), (np.pi / 2, 0, 0)),
        ((0, -0.3, 0), (0, -0.3, 0)),
        ((0, 0, 1e-12), (0, 0, 1e-12)),
        # Half-turn quaternion (1, 1, 1, 1) / 2: a third of a turn about the cube's diagonal.
        ((np.pi / 2, 0, np.pi / 2), np.full(3, 2 * np.pi / 3 / np.sqrt(3))),
        # Roll first, then pitch about the fixed axis: quaternion (1, 1, 1, -1) / 2.
        ((np.pi / 2, np.pi / 2, 0), np.array([1, 1, -1]) * 2 * np.pi / 3 / np.sqrt(3)),
        # Beyond a half turn the angle goes on growing.
        ((1.5 * np.pi, 0, 0), (1.5 * np.pi, 0, 0)),
    ],
)
def test_axis_angle(euler, expected):
    assert np.allclose(axis_angle(np.array(euler)), expected, rtol=0, atol=1e-12)


def test_axis_angle_is_the_same_rotation():
    def matrix(axis, angle):
        c, s = np.cos(angle), np.sin(angle)
        plane = {"x": (1, 2), "y": (2, 0), "z": (0, 1)}[axis]
        outcome = np.eye(3)
        outcome[np.ix_(plane, plane)] = [[c, -s], [s, c]]
        return outcome

    for euler in np.random.default_rng(0).uniform(-3, 3, (50, 3)):
        expected = matrix("z", euler[2]) @ matrix("y", euler[1]) @ matrix("x", euler[0])
        vector = axis_angle(euler)
        angle = np.linalg.norm(vector)
        x, y, z = vector / angle
        cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
        result = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
        assert np.allclose(result, expected, rtol=0, atol=1e-12)


def test_the_robovlms_google_gripper_holds_a_change_for_two_steps():
    # closed from the start: nothing. Opens at 2: held at 2 and 3, though it closes at 3 already,
    # and the closing is lost. Opens at 5 (against closed at 4).
    openness = [0, 0, 1, 0, 0, 1, 1, 1]
    assert run(ROBOVLMS.grippers[GOOGLE], openness) == [0, 0, -2, -2, 0, -2, -2, 0]


def test_the_official_google_gripper_holds_a_change_for_fifteen_steps():
    openness = [1.0] + [0.0] * 20
    assert run(OFFICIAL.grippers[GOOGLE], openness) == [0] + [1] * 15 + [0] * 5


def test_the_official_google_gripper_passes_small_changes_on():
    result = run(OFFICIAL.grippers[GOOGLE], [1.0, 0.75, 0.5, 0.75])
    assert np.allclose(result, [0, 0.25, 0.25, -0.25])
    # Not more than one half: no change to hold. The same decision cut at one half is one.
    assert run(OFFICIAL.grippers[GOOGLE], [0.75, 0.25, 0.25]) == [0, 0.5, 0]
    assert run(Gripper(True, repeat=2), [0.75, 0.25, 0.25, 0.25]) == [0, 1, 1, 0]


def test_widowx_opens_at_once_or_late():
    openness = [1, 1, 0, 1, 0, 1, 1, 1]
    assert run(OFFICIAL.grippers[WIDOWX], openness) == [1, 1, -1, 1, -1, 1, 1, 1]
    assert run(ROBOVLMS.grippers[WIDOWX], openness) == [-1, 1, -1, -1, -1, -1, 1, 1]


def test_the_scale_multiplies_way_and_turn_and_not_the_gripper():
    profile = Profile("mine", {WIDOWX: Gripper(False)}, action_scale=2.0)
    action = np.array([0.01, -0.02, 0.03, 0.0, 0.1, 0.0, 1.0])
    result, _ = convert(action, WIDOWX, profile, GripperState())
    assert np.allclose(result, [0.02, -0.04, 0.06, 0, 0.2, 0, 1])


def test_each_robot_has_its_own_commands():
    def told(robot, command, before):
        action = np.append(np.zeros(6), command)
        return convert(action, robot, ROBOVLMS, GripperState(before, opens=5))[0][6]

    assert told(WIDOWX, -1.0, 1.0) == -1
    assert told(WIDOWX, 1.0, 1.0) == 1
    assert told(GOOGLE, 0.0, 1.0) == 2  # closing is positive there
    assert told(GOOGLE, 1.0, 0.0) == -2


def test_profiles_are_data():
    parsed = json.loads(json.dumps({name: profile.to_json() for name, profile in PROFILES.items()}))
    assert parsed["official"]["grippers"][GOOGLE]["repeat"] == 15
    assert parsed["robovlms"]["grippers"][GOOGLE]["repeat"] == 2
    assert parsed["robovlms"]["advances"]
    assert not parsed["official"]["advances"]
    assert not any(profile["stops"] for profile in parsed.values())
