"""Between a robot's numbers and those of a policy of today: one definition for data and inference.

    recorded  -> adapt -> relative actions -> scale -> pad          (training, and the state served)
    predicted -> scale back -> absolute actions -> adapt -> cut     (serving)

It lies in the checkpoint. Statistics are of the numbers after `adapt` and relative actions.

Legend: f steps of a chunk · a action dimension · s state dimension · w, v the model's widths
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from vla_jax.data.units import aloha, relative
from vla_jax.data.units.scaling import RULES, Scaling
from vla_jax.data.units.statistics import columns

ROBOTS = ("", "aloha")
# Frames whose chunks are measured at most, evenly over the dataset.
_MEASURED = 200_000


@dataclass(frozen=True)
class PolicyUnits:
    """How a robot's state and actions become the model's, and actions come back.

    Attributes:
        state: units of the state.
        actions: units of the actions.
        dim: a, what the robot takes.
        relative: True for every action dimension that counts from the state; empty = none does.
        robot: whose joints are brought to the pretrained space, see `ROBOTS`; "" = as they are.
        gripper: the robot's commands for closed and open, where the last number of a recorded
            action is 0 = closed to 1 = open; None = it is recorded as it is commanded.
    """

    state: Scaling
    actions: Scaling
    dim: int
    relative: tuple[bool, ...] = ()
    robot: str = ""
    gripper: tuple[float, float] | None = None

    def __post_init__(self):
        # A checkpoint of a later version may name another robot.
        if self.robot not in ROBOTS:
            raise ValueError(f"units: robot {self.robot!r} is none of {list(ROBOTS)}")

    def adapt_state(self, state: Float[np.ndarray, "*n s"]) -> Float[np.ndarray, "*n s"]:
        """The state in the pretrained space, in its own units still."""
        return aloha.encode_state(state) if self.robot == "aloha" else state

    def prepare_state(self, state: Float[np.ndarray, "*n s"]) -> Float[np.ndarray, "*n s"]:
        """A state as recorded -> normalized, not yet padded: what a prompt is written of."""
        return self.state.normalize(self.adapt_state(state))

    def prepare_actions(
        self, actions: Float[np.ndarray, "*n f a"], state: Float[np.ndarray, "*n s"]
    ) -> Float[np.ndarray, "*n f a"]:
        """A chunk as recorded -> normalized, not yet padded.

        Args:
            actions: in the robot's units.
            state: at the chunk's first step, likewise.
        """
        return self.actions.normalize(self.adapt_actions(actions, state))

    def adapt_actions(
        self, actions: Float[np.ndarray, "*n f a"], state: Float[np.ndarray, "*n s"]
    ) -> Float[np.ndarray, "*n f a"]:
        """A chunk as recorded -> in the pretrained space and relative, in its own units still."""
        if self.robot == "aloha":
            actions = aloha.encode_actions(actions)
        if self.relative:
            actions = relative.to_relative(actions, self.adapt_state(state), self.relative)
        return actions

    def restore(
        self, actions: Float[np.ndarray, "*n f w"], state: Float[np.ndarray, "*n s"]
    ) -> Float[np.ndarray, "*n f a"]:
        """A predicted chunk -> the robot's units.

        Args:
            actions: of the model, padding included.
            state: as the robot gave it when the chunk was asked for.
        """
        actions = self.actions.unnormalize(actions)
        if self.relative:
            # In the pretrained space, where the actions were made relative in training, too.
            actions = relative.to_absolute(actions, self.adapt_state(state), self.relative)
        # Openpi cuts the padding here: behind the absolute actions, before the robot's step.
        actions = actions[..., : self.dim]
        if self.robot == "aloha":
            actions = aloha.decode_actions(actions)
        if self.gripper is None:
            return actions
        closed, opened = self.gripper
        # Predictions are continuous and may leave 0 to 1.
        command = closed + (opened - closed) * np.clip(actions[..., -1:], 0.0, 1.0)
        return np.concatenate([actions[..., :-1], command], axis=-1)

    def reanchor(
        self,
        actions: Float[np.ndarray, "*n f w"],
        before: Float[np.ndarray, "*n s"],
        after: Float[np.ndarray, "*n s"],
    ) -> Float[np.ndarray, "*n f w"]:
        """A predicted chunk as it would be predicted, for the same motion, from another state.

        Args:
            actions: of the model, padding included.
            before: the state that the chunk was asked for at, as the robot gave it.
            after: the state that it is to count from.
        """
        if not self.relative:
            return actions
        width = len(self.actions.first)
        moved = relative.to_absolute(
            self.actions.unnormalize(actions), self.adapt_state(before), self.relative
        )
        moved = relative.to_relative(moved, self.adapt_state(after), self.relative)
        scaled = self.actions.normalize(moved[..., :width])
        # What pads an action has no units.
        return np.concatenate([scaled, actions[..., width:]], axis=-1)

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return {
            "state": self.state.to_json(),
            "actions": self.actions.to_json(),
            "dim": self.dim,
            "relative": list(self.relative),
            "robot": self.robot,
            "gripper": None if self.gripper is None else list(self.gripper),
        }

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "PolicyUnits":
        """Inverse of `to_json`."""
        state, actions = (Scaling.from_json(raw[name]) for name in ("state", "actions"))
        gripper = raw.get("gripper")
        return cls(
            state,
            actions,
            raw["dim"],
            tuple(raw["relative"]),
            raw["robot"],
            None if gripper is None else (gripper[0], gripper[1]),
        )

    @classmethod
    def from_statistics(
        cls,
        statistics: Mapping[str, Any],
        rule: str,
        counts: Sequence[int] = (),
        robot: str = "",
        gripper: tuple[float, float] | None = None,
    ) -> "PolicyUnits":
        """Makes the units from what `chunk_statistics` gives, or from a norm_stats.json.

        Args:
            statistics: of "state" and "actions".
            rule: of `scaling.RULES`.
            counts: see `relative.mask_of`.
            robot: see `PolicyUnits`.
            gripper: see `PolicyUnits`.

        Raises:
            ValueError: the rule is none, or the statistics lack what it needs.
        """
        state, actions = (
            Scaling.from_statistics(statistics.get(name) or {}, rule)
            for name in ("state", "actions")
        )
        dim = len(actions.first)
        # These rules spare the gripper even if the file says nothing about it.
        if RULES[rule].masks and not actions.mask:
            actions = replace(actions, mask=(*([True] * (dim - 1)), False))
        return cls(state, actions, dim, relative.mask_of(*counts), robot, gripper)


def chunk_statistics(
    actions: Float[np.ndarray, "n a"],
    states: Float[np.ndarray, "n s"],
    starts: Int[np.ndarray, "e"],
    chunk: int,
    counts: Sequence[int] = (),
    robot: str = "",
) -> dict[str, Any]:
    """Statistics of a dataset's states and of its chunks as they are scaled.

    Args:
        actions: of all trajectories, one after another, as recorded.
        states: of the same frames.
        starts: first row of each trajectory, and the end of the last.
        chunk: f; behind a trajectory's end its last action is repeated.
        counts: see `relative.mask_of`.
        robot: see `PolicyUnits`.
    """
    # Rounded up, so that no more than `_MEASURED` rows are left.
    stride = max(1, -(-len(actions) // _MEASURED))
    rows = np.arange(0, len(actions), stride)
    # The first start behind a row is the end of its trajectory.
    ends = starts[np.searchsorted(starts, rows, side="right")]
    frames = np.minimum(rows[:, None] + np.arange(chunk), ends[:, None] - 1)
    # Only `adapt_actions` and `adapt_state` are called, which scale nothing.
    none = Scaling("openpi_zscore", (), ())
    units = PolicyUnits(none, none, actions.shape[1], relative.mask_of(*counts), robot)
    chunks, first_states = actions[frames], states[rows]
    chunks = units.adapt_actions(chunks, first_states)
    return {
        "state": columns(units.adapt_state(states).astype(np.float32)),
        "actions": columns(chunks.reshape(-1, chunks.shape[-1]).astype(np.float32)),
    }
