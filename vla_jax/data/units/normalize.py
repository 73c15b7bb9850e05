"""From robot units to the model's [-1, 1] and back. numpy only: serving imports it.

Axis letters: a action dimension.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from jaxtyping import Float

from vla_jax.data.units.gripper import Gripper, GripperState

NORMALIZATIONS = ("q99", "bounds", "normal", "none")
_EPSILON = 1e-8  # as in octo and openvla; keeps near-constant dimensions finite


@dataclass(frozen=True)
class ActionSpec:
    """All that is needed to turn model outputs into robot actions; it lives in the checkpoint.

    Arm dimensions map [low, high] to [-1, 1], are clipped to +-clip and stretched to +-1 again
    (RoboVLMs: clip 0.65). A dimension with low == high is constant: 0 to the model, `low` to the
    robot. A gripper, where there is one, is last: 1 = open, 0 = closed, and not scaled.

    Attributes:
        dim: a, arm dimensions and the gripper, if there is one.
        normalization: where low and high come from: q99 (1 % and 99 % quantiles), bounds (min and
            max), normal (mean -+ std, so `clip` counts standard deviations), none (-1 and 1).
        clip: see above.
        low: of each arm dimension, in robot units.
        high: of each arm dimension, in robot units.
        gripper_env: the environment's gripper command for (closed, open); None: no gripper, all
            dimensions are the arm's.
        hz: control rate in 1/s the data were recorded at, None when unknown.
        gripper_repeat: see `Gripper.repeat`.
        gripper_patience: see `Gripper.patience`.
    """

    dim: int
    normalization: str
    clip: float
    low: tuple[float, ...]
    high: tuple[float, ...]
    gripper_env: tuple[float, float] | None
    hz: float | None = None
    gripper_repeat: int = 0
    gripper_patience: int = 1

    @property
    def gripper(self) -> Gripper | None:
        """The environment's gripper, which takes the commands; None if there is none."""
        if self.gripper_env is None:
            return None
        return Gripper(*self.gripper_env, self.gripper_repeat, self.gripper_patience)

    @classmethod
    def from_statistics(
        cls,
        statistics: Mapping[str, Any],
        normalization: str,
        clip: float,
        gripper_env: tuple[float, float] | None,
        hz: float | None = None,
    ) -> "ActionSpec":
        """Reads one dataset's entry of dataset_statistics.json (ours or openvla's).

        Dimensions whose `mask` is False are not scaled, constant or not (openvla forces constant
        ones to 0 even then, which closes an always-open gripper).

        Raises:
            ValueError: listing what is missing or illegal.
        """
        action = statistics.get("action", {})
        names = {"q99": ("q01", "q99"), "bounds": ("min", "max"), "normal": ("mean", "std")}
        extremes = ("min", "max")
        if not {"min", "max"} <= set(action) and {"mean", "std"} <= set(action):
            extremes = ("mean", "std")  # openpi records no more
        if normalization not in NORMALIZATIONS:
            raise ValueError(f"normalization {normalization!r} is none of {NORMALIZATIONS}")
        needed = dict.fromkeys([*extremes, *names.get(normalization, ())])
        missing = [k for k in needed if k not in action]
        if missing:
            raise ValueError(f"statistics['action'] lacks {missing}; it has {sorted(action)}")
        dim = len(action[extremes[0]])
        # Where only mean and std are known, the mean of a constant dimension is its value.
        smallest, other = (_array(action[k]) for k in extremes)
        # Constant is where min is max, or std is 0 where only mean and std were recorded.
        constant = other == (smallest if extremes[0] == "min" else 0)
        if normalization == "none":
            low, high = -np.ones(dim), np.ones(dim)
        else:
            low, high = (_array(action[k]) for k in names[normalization])
            if normalization == "normal":
                # Until here the two are mean and std.
                low, high = low - high, low + high
            low, high = np.where(constant, smallest, low), np.where(constant, smallest, high)
        arm = dim if gripper_env is None else dim - 1
        # Without a mask all but the gripper is scaled, as openvla does.
        mask = np.asarray(action.get("mask", [True] * arm + [False] * (dim - arm)), bool)
        # Without a gripper there is nothing that must not be scaled, whatever others' masks say.
        mask = mask | (gripper_env is None)
        # -1 and 1 map to themselves, so what the mask spares is not scaled.
        low, high = np.where(mask, low, -1.0), np.where(mask, high, 1.0)
        return cls(
            dim=dim,
            normalization=normalization,
            clip=float(clip),
            low=tuple(low[:arm].tolist()),
            high=tuple(high[:arm].tolist()),
            gripper_env=gripper_env and (float(gripper_env[0]), float(gripper_env[1])),
            hz=None if hz is None else float(hz),
        )

    def normalize(self, action: Float[np.ndarray, "*n a"]) -> Float[np.ndarray, "*n a"]:
        """Robot units -> model units, float32; the gripper is untouched."""
        low, high = _array(self.low), _array(self.high)
        arm, gripper = self._parts(action)
        arm = 2 * (arm - low) / (high - low + _EPSILON) - 1
        arm = np.where(high == low, 0.0, np.clip(arm, -self.clip, self.clip) / self.clip)
        return np.concatenate([arm, gripper], axis=-1).astype(np.float32)

    def unnormalize(self, action: Float[np.ndarray, "*n a"]) -> Float[np.ndarray, "*n a"]:
        """Inverse of `normalize` within the clipped range; the gripper stays in 0..1."""
        arm, gripper = self._parts(action)
        arm = self._unnormalize_arm(arm)
        return np.concatenate([arm, gripper], axis=-1).astype(np.float32)

    def to_env(
        self, action: Float[np.ndarray, "n a"], state: GripperState
    ) -> tuple[Float[np.ndarray, "n a"], GripperState]:
        """The commands that the environment's step() takes, one step after another.

        Args:
            action: normalized arm, and for the gripper a probability, or 0 and 1; above 0.5 is
                open.
            state: of the gripper.
        """
        arm, predicted = self._parts(action)
        arm, gripper = self._unnormalize_arm(arm), self.gripper
        if gripper is None:
            return arm.astype(np.float32), state
        commands, state = gripper.commands(predicted[:, 0] > 0.5, state)
        return np.concatenate([arm, commands[:, None]], axis=-1).astype(np.float32), state

    def _parts(self, action: Any) -> tuple[np.ndarray, np.ndarray]:
        """The arm's numbers, and the gripper's one or none."""
        values = np.asarray(action)
        return values[..., : len(self.low)], values[..., len(self.low) :]

    def _unnormalize_arm(self, arm: np.ndarray) -> np.ndarray:
        low, high = _array(self.low), _array(self.high)
        scaled = (np.asarray(arm, np.float64) * self.clip + 1) / 2
        return np.where(high == low, low, scaled * (high - low + _EPSILON) + low)

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "ActionSpec":
        """Inverse of `to_json`.

        Raises:
            ValueError: naming missing and unknown keys; what is about the gripper's memory may be
                missing.
        """
        names = {field.name for field in fields(cls)}
        # Checkpoints from before these fields lack them.
        late = {"gripper_repeat", "gripper_patience"}
        missing, unknown = sorted(names - set(raw) - late), sorted(set(raw) - names)
        if missing or unknown:
            raise ValueError(f"action spec: missing {missing}, unknown {unknown}")
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}
        return cls(**values)


@dataclass(frozen=True)
class StateSpec:
    """From a robot's state to the model's [-1, 1]: low and high map to -1 and 1, clipped there.

    Attributes:
        low: p numbers in robot units, the 1 % quantiles.
        high: p numbers in robot units, the 99 % quantiles. Where both are equal the model sees 0.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]

    @classmethod
    def from_statistics(cls, statistics: Mapping[str, Any], dim: int) -> "StateSpec":
        """Reads one dataset's entry of dataset_statistics.json.

        Raises:
            ValueError: it has no state, or one of another size.
        """
        proprio = statistics.get("proprio")
        if not proprio:
            raise ValueError(f"the data record no robot state, and the model takes {dim} numbers")
        if not {"q01", "q99"} <= set(proprio):
            raise ValueError("the statistics have no quantiles of the robot state")
        if len(proprio["q01"]) != dim:
            size = len(proprio["q01"])
            raise ValueError(f"the recorded state has {size} numbers, the model takes {dim}")
        return cls(tuple(proprio["q01"]), tuple(proprio["q99"]))

    def normalize(self, state: Float[np.ndarray, "*n p"]) -> Float[np.ndarray, "*n p"]:
        """Robot units -> model units, float32."""
        low, high = _array(self.low), _array(self.high)
        scaled = 2 * (np.asarray(state) - low) / (high - low + _EPSILON) - 1
        return np.where(high == low, 0.0, np.clip(scaled, -1, 1)).astype(np.float32)

    def unnormalize(self, state: Float[np.ndarray, "*n p"]) -> Float[np.ndarray, "*n p"]:
        """Inverse of `normalize` within the clipped range."""
        low, high = _array(self.low), _array(self.high)
        return ((np.asarray(state) + 1) / 2 * (high - low) + low).astype(np.float32)


def _array(values: Any) -> Float[np.ndarray, "d"]:
    return np.asarray(values, np.float64)
