"""How a policy's action becomes the simulator's, as data: one profile per way it is published.

A policy answers in its data's units: meters, Euler angles, and its own two gripper commands. The
simulator's arm takes meters and an axis-angle vector. Its grippers differ: WidowX takes a state (1
open, -1 closed), the Google robot takes changes (positive closes), which must be held for a while
because one step's change is smaller than the way. None of this is the policy's business, and all of
it changes scores, so a score names its profile.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Dict, NamedTuple, Optional, Tuple

import numpy as np

from eval_servers.simpler.tasks import GOOGLE, WIDOWX

_CHANGED = 0.5  # size of a change that is one


@dataclass(frozen=True)
class Gripper:
    """Translation of a policy's openness into one robot's gripper commands.

    Attributes:
        changes: it takes changes instead of states.
        binary: openness is cut at one half before changes are taken.
        full: the change commanded when openness goes from 1 to 0; the simulator clips at 1.
        repeat: steps for which a change of more than one half is held, whatever is decided
            meanwhile (the "sticky" gripper).
        patience: it is told to open only after so many decisions for open in a row.
    """

    changes: bool
    binary: bool = True
    full: float = 1.0
    repeat: int = 1
    patience: int = 1


class GripperState(NamedTuple):
    """Memory of a gripper within one episode.

    Attributes:
        before: openness at the last step; None at the first.
        opens: decisions for open in a row.
        held: the change that is held.
        left: for how many more steps.
    """

    before: Optional[float] = None
    opens: int = 0
    held: float = 0.0
    left: int = 0


@dataclass(frozen=True)
class Profile:
    """How one published evaluation turns actions and ends episodes.

    Attributes:
        name: of it.
        grippers: robot -> its gripper.
        action_scale: multiplies way and axis-angle.
        advances: tell a task of two halves (open the drawer, put it in) to go on as soon as the
            drawer is open, not only after the simulator's own 100 steps.
        stops: end an episode at its first success instead of judging it at its last step.
    """

    name: str
    grippers: Dict[str, Gripper]
    action_scale: float = 1.0
    advances: bool = False
    stops: bool = False

    def to_json(self) -> Dict[str, Any]:
        """Return the profile as plain values, for a protocol."""
        return asdict(self)


PROFILES: Dict[str, Profile] = {
    # SimplerEnv's own, for policies that answer with openness (its octo).
    "official": Profile(
        "official",
        {GOOGLE: Gripper(True, binary=False, full=1.0, repeat=15), WIDOWX: Gripper(False)},
    ),
    # RoboVLMs' eval/simpler.
    "robovlms": Profile(
        "robovlms",
        {GOOGLE: Gripper(True, full=2.0, repeat=2), WIDOWX: Gripper(False, patience=2)},
        advances=True,
    ),
}

# Robot -> the commands that its data's policies answer with, and the arm's largest number: the 1 %
# and 99 % quantiles of Bridge and of RT-1's data reach 0.21 and 0.59 (meters, radians).
COMMANDS: Dict[str, Dict[str, float]] = {
    WIDOWX: {"closed": -1.0, "open": 1.0},
    GOOGLE: {"closed": 0.0, "open": 1.0},
}
REACH: Dict[str, float] = {WIDOWX: 0.2, GOOGLE: 0.45}


def convert(
    action: np.ndarray, robot: str, profile: Profile, state: GripperState
) -> Tuple[np.ndarray, GripperState]:
    """A policy's action -> the simulator's, float64 [7], and what its gripper remembers.

    Args:
        action: float [7]: way in meters; roll, pitch, yaw in radians about fixed axes; the gripper
            in the robot's `COMMANDS`.
        robot: GOOGLE or WIDOWX.
        profile: how.
        state: of the gripper.
    """
    commands = COMMANDS[robot]
    span = commands["open"] - commands["closed"]
    openness = (float(action[6]) - commands["closed"]) / span
    gripper, state = grip(profile.grippers[robot], openness, state)
    turn = axis_angle(action[3:6]) * profile.action_scale
    way = np.asarray(action[:3], np.float64) * profile.action_scale
    return np.concatenate([way, turn, [gripper]]), state


def grip(gripper: Gripper, openness: float, state: GripperState) -> Tuple[float, GripperState]:
    """The command for one step, and the state after it.

    Args:
        gripper: see `Gripper`.
        openness: 1 = open, 0 = closed.
        state: before.
    """
    is_open = openness > 0.5
    # One decision for closed starts the count again.
    opens = state.opens + 1 if is_open else 0
    if not gripper.changes:
        return (1.0 if opens >= gripper.patience else -1.0), GripperState(openness, opens)
    if gripper.binary:
        openness = float(is_open)
    # The first step has nothing to compare with, so the gripper stays.
    command = 0.0 if state.before is None else gripper.full * (state.before - openness)
    held, left = state.held, state.left
    # One step's change is smaller than the way of the fingers, hence the repeat.
    if not left and abs(command) > _CHANGED:
        held, left = command, gripper.repeat
    if left:
        command, left = held, left - 1
    return command, GripperState(openness, opens, held, left)


def axis_angle(euler: np.ndarray) -> np.ndarray:
    """Roll, pitch, yaw about fixed x, y, z, in radians [3] -> axis times angle, float64 [3].

    The angle is in [0, 2 pi]: it comes from the half-angle formulas without a change of sign, as in
    transforms3d, which both published wrappers use. That matters only when it is scaled.
    """
    half = np.asarray(euler, np.float64) / 2
    (cos_r, cos_p, cos_y), (sin_r, sin_p, sin_y) = np.cos(half), np.sin(half)
    w = cos_r * cos_p * cos_y + sin_r * sin_p * sin_y
    v = np.array(
        [
            sin_r * cos_p * cos_y - cos_r * sin_p * sin_y,
            cos_r * sin_p * cos_y + sin_r * cos_p * sin_y,
            cos_r * cos_p * sin_y - sin_r * sin_p * cos_y,
        ]
    )
    length = float(np.linalg.norm(v))
    # Near zero the ratio below is 0 / 0; its limit is twice the vector part.
    if length < 1e-9:
        return 2 * v
    return v * (2 * np.arctan2(length, w) / length)
