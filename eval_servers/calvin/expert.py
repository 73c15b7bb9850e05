"""A scripted expert for lifting a block off the table and pressing the LED's button.

It knows where everything is. It exists to test the way from a policy's action to the simulator
(`tests/eval_servers/test_calvin_sim.py`) and to record demonstrations; it is no baseline.
"""

from __future__ import annotations

from typing import List, NamedTuple, Tuple

import numpy as np

from eval_servers.calvin.initial import BLOCKS

TASKS = (
    "lift_red_block_table",
    "lift_blue_block_table",
    "lift_pink_block_table",
    "turn_on_led",
    "turn_off_led",
)
STEP = 0.02  # meters of a full action
OPEN, CLOSED = 1.0, -1.0
_NEAR = 0.008  # meters between the commanded and the wanted place that will do
_REACHED = 0.012  # meters between the tool and the wanted place that will do
_PATIENCE = 12  # steps to wait for a tool that does not get there, as on a pressed button
_BUTTON = (-0.12, -0.12, 0.46)  # of scene D, meters
_ABOVE = 0.09  # meters
_CLOSING = 8  # steps until the fingers hold


class _Phase(NamedTuple):
    """Go to a place, then stay there for some steps."""

    place: Tuple[float, ...]
    gripper: float
    stay: int = 0


class Expert:
    """One attempt at one task; call `act` at every step."""

    def __init__(self, task: str, limit: float = 1.0) -> None:
        """Make a script for one task.

        Args:
            task: one of `TASKS`.
            limit: the largest action; a policy whose actions are clipped moves no faster.

        Raises:
            ValueError: if there is no script for the task.
        """
        if task not in TASKS:
            raise ValueError("no script for {!r}; there is one for {}".format(task, TASKS))
        self._task, self._limit = task, limit
        self._phases: List[_Phase] = []
        self._target = np.zeros(3)
        self._waited = self._stayed = 0

    def act(self, robot: np.ndarray, scene: np.ndarray) -> np.ndarray:
        """The next action.

        Args:
            robot: robot_obs, float [15].
            scene: scene_obs, float [24].

        Returns:
            float64 [7], arm within +-limit: what calvin_env's `step` takes.
        """
        tool = np.asarray(robot[:3], np.float64)
        if not self._phases:
            self._phases = _plan(self._task, np.asarray(scene, np.float64))
            # The simulator adds up actions onto its own target, which starts at the tool.
            self._target = tool
        self._advance(tool)
        phase = self._phases[0]
        move = np.clip((np.array(phase.place) - self._target) / STEP, -self._limit, self._limit)
        self._target = self._target + move * STEP
        return np.concatenate([move, np.zeros(3), [phase.gripper]])

    def disturbed(self, metres: np.ndarray) -> None:
        """Take note that the last action was executed with this [3] added to its motion."""
        self._target = self._target + metres

    def _advance(self, tool: np.ndarray) -> None:
        """On to the next phase if the tool has been at this one's place for long enough."""
        phase = self._phases[0]
        if np.linalg.norm(self._target - phase.place) > _NEAR:
            return
        if np.linalg.norm(tool - phase.place) > _REACHED and self._waited < _PATIENCE:
            self._waited += 1
        elif self._stayed < phase.stay:
            self._stayed += 1
        elif len(self._phases) > 1:
            self._phases.pop(0)
            self._waited = self._stayed = 0


def _plan(task: str, scene: np.ndarray) -> List[_Phase]:
    if task.startswith("lift"):
        x, y, z = scene[BLOCKS[task.split("_")[1]]][:3]
        return [
            _Phase((x, y, z + _ABOVE), OPEN),
            _Phase((x, y, z), OPEN),
            _Phase((x, y, z), CLOSED, stay=_CLOSING),
            _Phase((x, y, z + 0.15), CLOSED),
        ]
    x, y, z = _BUTTON
    return [
        _Phase((x, y, z + _ABOVE), CLOSED),
        _Phase((x, y, z - 0.01), CLOSED),
        _Phase((x, y, z + _ABOVE), CLOSED),
    ]
