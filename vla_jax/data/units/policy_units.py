"""Between a robot's numbers and those of a policy of today: one definition for data and inference.

    recorded  -> adapt -> relative actions -> scale -> pad          (training, and the state served)
    predicted -> scale back -> absolute actions -> adapt -> cut     (serving)

It lies in the checkpoint. Statistics are of the numbers after `adapt` and relative actions.

Legend: f steps of a chunk · a action dimension · s state dimension · w, v the model's widths
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from vla_jax.data.units import aloha, relative
from vla_jax.data.units.scaling import Scaling

ROBOTS = ("", "aloha")


@dataclass(frozen=True)
class PolicyUnits:
    """How a robot's state and actions become the model's, and actions come back.

    Attributes:
        state: units of the state.
        actions: units of the actions.
        dim: a, what the robot takes.
        relative: True for every action dimension that counts from the state; empty = none does.
        robot: whose joints are brought to the pretrained space, see `ROBOTS`; "" = as they are.
    """

    state: Scaling
    actions: Scaling
    dim: int
    relative: tuple[bool, ...] = ()
    robot: str = ""

    def __post_init__(self):
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
        if self.robot == "aloha":
            actions = aloha.encode_actions(actions)
        if self.relative:
            actions = relative.to_relative(actions, self.adapt_state(state), self.relative)
        return self.actions.normalize(actions)

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
            actions = relative.to_absolute(actions, self.adapt_state(state), self.relative)
        actions = actions[..., : self.dim]
        return aloha.decode_actions(actions) if self.robot == "aloha" else actions

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "state": self.state.to_json(),
            "actions": self.actions.to_json(),
            "dim": self.dim,
            "relative": list(self.relative),
            "robot": self.robot,
        }

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "PolicyUnits":
        """Inverse of `to_json`."""
        state, actions = (Scaling.from_json(raw[name]) for name in ("state", "actions"))
        return cls(state, actions, raw["dim"], tuple(raw["relative"]), raw["robot"])
