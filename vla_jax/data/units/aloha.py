"""ALOHA's joints and grippers in the space that pi0 was pretrained in, and back.

The signs of some joints differ, and so does what a gripper's number means: ALOHA records the way
of the fingers between its own ends, pi0 the angle of the motor that moves them. One arm has six
joints and a gripper; the robot has two arms.

Source: openpi 15a9616 `policies/aloha_policy.py` (adapt_to_pi). LeRobot's SmolVLA has other ends.

Legend: j numbers of all arms, 7 an arm
"""

import numpy as np
from jaxtyping import Float

_SIGNS = np.array([1, -1, -1, 1, 1, 1, 1], np.float64)
_ARM = 7  # the last is the gripper
# The gripper of a state: way of the fingers in meters, then the crank that moves them.
_FINGERS = (0.01844, 0.05800)
_CRANK, _ROD = 0.022, 0.036
_ANGLE = (0.5476, 1.6296)  # what pi0 takes for closed and open
# The gripper of an action: angle of ALOHA's own commands for closed and open.
_COMMAND = (-0.6213, 1.4910)


def encode_state(state: Float[np.ndarray, "*n j"]) -> Float[np.ndarray, "*n j"]:
    """ALOHA's state -> pi0's."""
    fingers = _grippers(state) * (_FINGERS[1] - _FINGERS[0]) + _FINGERS[0]
    # Law of cosines for the triangle of crank, rod and fingers; noise may leave its range.
    ratio = (_CRANK**2 + fingers**2 - _ROD**2) / (2 * _CRANK * fingers)
    angle = np.arcsin(np.clip(ratio, -1.0, 1.0))
    return _with_grippers(state, (angle - _ANGLE[0]) / (_ANGLE[1] - _ANGLE[0]))


def encode_actions(actions: Float[np.ndarray, "*n j"]) -> Float[np.ndarray, "*n j"]:
    """Recorded actions -> those pi0 is to predict; inverse of `decode_actions`."""
    angle = _grippers(actions) * (_COMMAND[1] - _COMMAND[0]) + _COMMAND[0]
    return _with_grippers(actions, angle - _ANGLE[0])


def decode_actions(actions: Float[np.ndarray, "*n j"]) -> Float[np.ndarray, "*n j"]:
    """Pi0's actions -> ALOHA's commands."""
    angle = _grippers(actions) + _ANGLE[0]
    return _with_grippers(actions, (angle - _COMMAND[0]) / (_COMMAND[1] - _COMMAND[0]))


def _grippers(values: Float[np.ndarray, "*n j"]) -> Float[np.ndarray, "*n g"]:
    return values[..., _ARM - 1 :: _ARM]


def _with_grippers(
    values: Float[np.ndarray, "*n j"], grippers: Float[np.ndarray, "*n g"]
) -> Float[np.ndarray, "*n j"]:
    # np.resize repeats the seven signs for the second arm.
    turned = values * np.resize(_SIGNS, values.shape[-1])
    turned[..., _ARM - 1 :: _ARM] = grippers
    return turned
