"""A scripted expert that stacks the green cube on the yellow one.

It knows where things are. It exists to test the way from a policy's action to the simulator
(`tests/eval_servers/test_simpler_sim.py`); it is no baseline.
"""

from __future__ import annotations

from typing import List, NamedTuple

import numpy as np

TASK = "widowx_stack_cube"
OPEN, CLOSED = 1.0, -1.0
_CUBE = 0.03  # meters
_ABOVE = 0.08  # meters over a cube's middle where it is safe to move
_NEAR = 0.006  # meters between the fingers and the place that will do
_PATIENCE = 6  # steps to wait for fingers that do not get there
_REACH = 0.024  # meters of a step, within what Bridge's statistics allow


class _Phase(NamedTuple):
    """Go to a place, then stay there for some steps."""

    place: np.ndarray
    gripper: float
    stay: int = 0


class Expert:
    """One attempt; call `act` at every step."""

    def __init__(self, reach: float = _REACH) -> None:
        """Move at most `reach` meters a step, along each axis."""
        self._reach = reach
        self._phases: List[_Phase] = []
        self._told = np.zeros(3)  # where the controller was told to be
        self._waited = self._stayed = 0

    def act(self, scene: np.ndarray) -> np.ndarray:
        """The next action, float32 [7]: meters, no turn, gripper 1 = open.

        Args:
            scene: where the fingers, the green and the yellow cube are, [3, 3], in meters in the
                robot's base frame.
        """
        fingers = scene[0].astype(np.float64)
        if not self._phases:
            self._phases, self._told = _plan(scene), fingers
        if len(self._phases) > 1 and self._done(self._phases[0], fingers):
            self._phases.pop(0)
            self._waited = self._stayed = 0
        phase = self._phases[0]
        # The controller adds to where it was told to be, not to where it is.
        move = np.clip(phase.place - self._told, -self._reach, self._reach)
        self._told = self._told + move
        return np.concatenate([move, np.zeros(3), [phase.gripper]]).astype(np.float32)

    def _done(self, phase: _Phase, fingers: np.ndarray) -> bool:
        if np.abs(phase.place - self._told).max() > 1e-6:
            return False
        self._waited += 1
        if np.abs(phase.place - fingers).max() > _NEAR and self._waited < _PATIENCE:
            return False
        self._stayed += 1
        return self._stayed > phase.stay


def _plan(scene: np.ndarray) -> List[_Phase]:
    up = np.array([0.0, 0.0, _ABOVE])
    green, yellow = scene[1].astype(np.float64), scene[2].astype(np.float64)
    top = yellow + [0.0, 0.0, _CUBE]
    return [
        _Phase(green + up, OPEN),
        _Phase(green, OPEN, 1),
        _Phase(green, CLOSED, 3),
        _Phase(green + up, CLOSED),
        _Phase(top + up, CLOSED),
        _Phase(top + [0.0, 0.0, 0.005], CLOSED, 1),
        _Phase(top + [0.0, 0.0, 0.005], OPEN, 4),
        _Phase(top + up, OPEN),
    ]
