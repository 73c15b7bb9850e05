"""A scripted expert that picks a thing up and puts it where the task wants it.

It knows where things are. It exists to test the way from a policy's action to the simulator
(`tests/eval_servers/test_libero_sim.py`) and to record demonstrations; it is no baseline.
"""

from __future__ import annotations

from typing import Dict, List, NamedTuple, Optional, Tuple

import numpy as np

from eval_servers.libero.suites import tasks

OPEN, CLOSED = -1.0, 1.0
_GAIN = 1 / 0.025  # action for a meter to go: full speed until 2.5 cm before
_PATIENCE = 40  # steps of one phase, after which the next begins all the same

# A word for a thing -> where the hand closes, in meters from the thing's origin. A bowl is taken by
# its rim, with one finger inside.
_GRASPED = {"bowl": (0.0, 0.047, 0.032)}
# A word for a place -> heights of the hand above the place's origin: on the way, and letting go.
_HEIGHTS = {"basket": (0.1, 0.07), "plate": (0.15, 0.055)}
_LOW = 0.2  # meters; what lies lower stands on the floor, which is at 0
_PALM = 0.03  # meters from where the hand closes up to its palm, which must not touch a thing's top
_SENTENCES = (("pick up the ", " and place it "), ("put the ", " on "), ("put the ", " in "))
_BEYOND = ("wine bottle", "in the top drawer")  # what the hand cannot take from straight above
_ABOVE = 0.12  # meters above a thing from where the hand comes straight down


class _Phase(NamedTuple):
    """Go to a place, then stay there for some steps."""

    place: np.ndarray
    gripper: float
    near: float = 0.01  # meters that will do
    stay: int = 0
    held: bool = False  # the place is where the thing shall be, not the hand


class Expert:
    """One attempt; call `act` at every step."""

    def __init__(self, instruction: str, limit: float = 1.0) -> None:
        """Make a script from what the policy is told.

        Args:
            instruction: of a task that `scripted` lists.
            limit: the largest action; a policy whose actions are clipped moves no faster.

        Raises:
            ValueError: if there is no script for it.
        """
        parts = _parts(instruction)
        if parts is None:
            raise ValueError("no script for {!r}".format(instruction))
        self._thing, self._place = parts
        self._limit = limit
        self._phases: List[_Phase] = []
        self._steps = self._stayed = 0
        self._reach = 0.0  # meters from the thing's origin to the hand that holds it

    def act(self, scene: np.ndarray) -> np.ndarray:
        """The next action, float64 [7].

        Args:
            scene: where the hand, the thing and its place are, [3, 3] in meters.
        """
        hand, thing, place = np.asarray(scene, np.float64)
        if not self._phases or (self._phases[0].held and self._lost(hand, thing)):
            self._phases = self._plan(thing, place)
            self._reach = float(np.linalg.norm(self._phases[1].place - thing))
        # Several phases may be done at once, as when the hand starts in the right place.
        while len(self._phases) > 1 and self._done(hand, thing):
            self._phases.pop(0)
            self._steps = self._stayed = 0
        self._steps += 1
        phase = self._phases[0]
        move = np.clip(_error(phase, hand, thing) * _GAIN, -self._limit, self._limit)
        return np.concatenate([move, np.zeros(3), [phase.gripper]])

    def _done(self, hand: np.ndarray, thing: np.ndarray) -> bool:
        phase = self._phases[0]
        if np.linalg.norm(_error(phase, hand, thing)) > phase.near and self._steps < _PATIENCE:
            return False
        self._stayed += 1
        return self._stayed > phase.stay

    def _lost(self, hand: np.ndarray, thing: np.ndarray) -> bool:
        """Whether what the hand should carry is not there; it is taken up again then."""
        carrying = self._phases[0].gripper == CLOSED
        return carrying and bool(np.linalg.norm(hand - thing) > self._reach + 0.05)

    def _plan(self, thing: np.ndarray, place: np.ndarray) -> List[_Phase]:
        grasp = thing + _of(_GRASPED, self._thing, (0.0, 0.0, 0.005))
        if thing[2] < _LOW:
            grasp[2] = max(grasp[2], 2 * thing[2] - _PALM)
        carried, released = place[2] + _of(_HEIGHTS, self._place, (0.15, 0.05))
        over, down = np.array(place), np.array(place)
        # What stands on the floor hangs as far below the hand as the hand is above the floor now.
        over[2] = carried + grasp[2] if grasp[2] < _LOW else max(carried, grasp[2] + _ABOVE)
        down[2] = released
        up = np.array([grasp[0], grasp[1], over[2]])
        return [
            _Phase(grasp + [0, 0, _ABOVE], OPEN, near=0.008, stay=2),
            _Phase(grasp, OPEN, near=0.008),
            _Phase(grasp, CLOSED, near=1.0, stay=10),
            _Phase(up, CLOSED, near=0.03),
            _Phase(over, CLOSED, near=0.015, held=True),
            _Phase(down, CLOSED, near=0.015, held=True),
            _Phase(down, OPEN, near=1.0, stay=8, held=True),
            _Phase(over, OPEN, near=0.0),
        ]


def scripted(suite: str) -> List[int]:
    """The tasks of a plain suite that there is a script for, by number."""
    return [number for number, task in enumerate(tasks(suite)) if _parts(task.instruction)]


def _error(phase: _Phase, hand: np.ndarray, thing: np.ndarray) -> np.ndarray:
    """Return the way the hand has to go, [3]; seen from above, it is the held thing that counts."""
    error = phase.place - hand
    if phase.held:
        error[:2] = phase.place[:2] - thing[:2]
    return error


def _parts(instruction: str) -> Optional[Tuple[str, str]]:
    """(thing, place) of "pick up the X and place it on the Y" and "put the X in the Y"."""
    if any(words in instruction for words in _BEYOND):
        return None
    for verb, joint in _SENTENCES:
        thing, separator, place = instruction[len(verb) :].partition(joint)
        if instruction.startswith(verb) and separator:
            return thing, place
    return None


def _of(table: Dict[str, Tuple], text: str, default: Tuple) -> np.ndarray:
    return np.array(next((value for word, value in table.items() if word in text.split()), default))
