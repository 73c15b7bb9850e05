"""From a recorded gripper to "open or closed?", and from there to an environment's command.

numpy only: serving imports it. Source of the two kinds of environment with a memory: RoboVLMs'
wrapper for SIMPLER, whose Google robot takes changes and whose WidowX opens late.

Axis letters: n steps.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from vla_jax.data import ops


@dataclass(frozen=True)
class Recording:
    """A convention in which datasets record their gripper.

    Attributes:
        to_open: what was recorded in one episode, float32 [n] -> 1 = open, 0 = closed, float32 [n].
        env: the robot's own command for (closed, open).
        binary: whether only 0 and 1 are meant, so that a value in between is neither.
    """

    to_open: Callable[[np.ndarray], np.ndarray]
    env: tuple[float, float]
    binary: bool


# Name -> convention. Those with a sign record -1 and 1, which clipping to 0..1 makes 0 and 1.
RECORDINGS: dict[str, Recording] = {
    # Openness, or something that octo and openvla take for it without a change.
    "as_recorded": Recording(lambda x: x, (0.0, 1.0), binary=False),
    "open_flag": Recording(lambda x: x, (0.0, 1.0), binary=True),
    "open_sign": Recording(lambda x: np.clip(x, 0, 1), (-1.0, 1.0), binary=True),
    # Openness that moves through the middle; see `ops.binarize_gripper`.
    "open_moving": Recording(ops.binarize_gripper, (0.0, 1.0), binary=True),
    "closed": Recording(lambda x: 1 - x, (1.0, 0.0), binary=False),
    "closed_flag": Recording(lambda x: 1 - x, (1.0, 0.0), binary=True),
    "closed_sign": Recording(lambda x: 1 - np.clip(x, 0, 1), (1.0, -1.0), binary=True),
    "closed_clipped": Recording(lambda x: 1 - np.clip(x, 0, 1), (1.0, 0.0), binary=False),
    "closed_byte": Recording(lambda x: 1 - x / np.float32(255), (255.0, 0.0), binary=False),
    # Commands to change: 1 close, -1 open, 0 stay; see `ops.absolute_gripper`.
    "closing": Recording(ops.absolute_gripper, (0.0, 1.0), binary=True),
    # No gripper, or one that never moves; the recorded value does not count.
    "always_closed": Recording(np.zeros_like, (0.0, 1.0), binary=True),
    "always_open": Recording(np.ones_like, (0.0, 1.0), binary=True),
}


def targets(opened: Float[np.ndarray, "n"], binary: bool, rule: str) -> Float[np.ndarray, "n"]:
    """The numbers a model is to predict for a gripper, float32.

    Args:
        opened: 1 = open, 0 = closed, as standardized.
        binary: whether the dataset means only those two.
        rule: declared: what is meant, so binary ones are cut at 0.5 and the others are held within
            0..1. recorded: as it is (octo, openvla). exact: open is what equals 1 (RoboVLMs).
    """
    if rule == "declared":
        opened = opened > 0.5 if binary else np.clip(opened, 0, 1)
    elif rule == "exact":
        opened = opened == 1
    return np.asarray(opened, np.float32)


@dataclass(frozen=True)
class GripperState:
    """The commands a gripper has got in this episode.

    Attributes:
        was_open: the last decision; None before the first.
        opens: how many decisions in a row have been "open".
        change: command being repeated, if `left` > 0.
        left: how many more times.
    """

    was_open: bool | None = None
    opens: int = 0
    change: float = 0.0
    left: int = 0


@dataclass(frozen=True)
class Gripper:
    """The way an environment takes its gripper's commands.

    Attributes:
        closed: its command for closed (relative: for "close now").
        opened: its command for open.
        repeat: 0: it takes a state, the two commands above. Otherwise it takes changes: a change is
            commanded this many steps, whatever is decided meanwhile, and between changes it gets
            the middle of the two.
        patience: it is told to open only after this many decisions for open in a row.
    """

    closed: float
    opened: float
    repeat: int = 0
    patience: int = 1

    @property
    def has_memory(self) -> bool:
        """Whether a command depends on the decisions before it."""
        return self.repeat > 0 or self.patience > 1

    def commands(
        self, is_open: Bool[np.ndarray, "n"], state: GripperState
    ) -> tuple[Float[np.ndarray, "n"], GripperState]:
        """Decisions of successive steps -> commands, and the state after them."""
        all_commands = []
        for decision in is_open.tolist():
            command, state = self._step(decision, state)
            all_commands.append(command)
        return np.array(all_commands, np.float32), state

    def _step(self, is_open: bool, state: GripperState) -> tuple[float, GripperState]:
        opens = state.opens + 1 if is_open else 0
        # Until there are enough in a row the gripper counts as closed.
        is_open = opens >= self.patience
        command = self.opened if is_open else self.closed
        if not self.repeat:
            return command, GripperState(is_open, opens)
        change, left = state.change, state.left
        # A change under way is finished first, and an episode's first decision is no change.
        if not left and state.was_open not in (None, is_open):
            change, left = command, self.repeat
        sent = change if left else (self.closed + self.opened) / 2
        return sent, GripperState(is_open, opens, change, max(left - 1, 0))
