"""What a dataset has to say about itself, so that every dataset afterwards looks the same."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from numbers import Real
from typing import Any

import numpy as np
from jaxtyping import Float

from vla_jax.cameras import CAMERAS

# One episode as recorded: the spec's own short names -> [t, ...] arrays, text as arrays of str.
Episode = Mapping[str, np.ndarray]
# Path of a feature below `steps/`, or alternatives of which the first present is taken.
Path = str | tuple[str, ...]


@dataclass(frozen=True)
class Trajectory:
    """One standardized episode; all arrays have the episode's length t.

    Attributes:
        action: [t, a] in the dataset's own units; of a robot with a gripper (see
            `DatasetSpec.gripper_env`) that is the last number, 1 = open, 0 = closed. Kept as
            float32.
        language: the instruction, "" or None if there is none, or one text a step (the first one
            counts); or a tuple of such, of which every sample gets one. A text is str or bytes.
        proprio: [t, p] in the dataset's own units, or None.
        keep: the frames that may be used, a step of more than 1 for fewer a second; elsewhere
            actions need not make sense. A slice, or a mask over the steps, or numbers of them,
            without irregular gaps.
    """

    action: Float[np.ndarray, "t a"]
    language: Any
    proprio: Float[np.ndarray, "t p"] | None = None
    keep: Any = field(default_factory=lambda: slice(None))


@dataclass(frozen=True)
class ActionEncoding:
    """What the numbers of an action are.

    Attributes:
        dim: how many there are.
        grippers: which of them command a gripper; the others are scaled by the statistics.
    """

    dim: int
    grippers: tuple[int, ...]

    @property
    def mask(self) -> list[bool]:
        """True for the numbers that normalization scales."""
        return [i not in self.grippers for i in range(self.dim)]


# Source: octo and openvla, `ActionEncoding`. "Delta" means from this step to the next.
ACTION_ENCODINGS: dict[str, ActionEncoding] = {
    # Hand: delta xyz, delta rotation (roll, pitch, yaw), gripper.
    "eef_pos": ActionEncoding(7, (6,)),
    # 7 joints' deltas, gripper.
    "joint_pos": ActionEncoding(8, (7,)),
    # Twice: 6 joint positions, gripper.
    "joint_pos_bimanual": ActionEncoding(14, (6, 13)),
    # The same, then the base's linear and angular velocity.
    "joint_pos_bimanual_nav": ActionEncoding(16, (6, 13)),
    # Delta xy of a wheeled robot, in its own frame.
    "nav_2d": ActionEncoding(2, ()),
}
# What the state's numbers are, padded or not. Source: octo and openvla, `StateEncoding`.
STATE_ENCODINGS: dict[str, str] = {
    "none": "no state was recorded",
    "pos_euler": "hand: xyz, roll, pitch, yaw; gripper",
    "pos_quat": "hand: xyz, quaternion; gripper",
    "joint": "joint angles; gripper",
    "joint_bimanual": "twice: 6 joint angles, gripper",
    "pos_nav": "xy and yaw of a wheeled robot",
    "robot_obs": "CALVIN: hand xyz, roll, pitch, yaw; gripper width; 7 joints; gripper command",
}


def _missing(episode: Episode) -> Trajectory:
    raise NotImplementedError


@dataclass(frozen=True)
class DatasetSpec:
    """How one dataset is read.

    Attributes:
        images: camera role (`vla_jax.cameras.CAMERAS`) -> image feature.
        features: short name -> the numeric and text features that `standardize` reads.
        standardize: one raw episode -> one `Trajectory`.
        gripper_env: the environment's gripper command for (closed, open), of a robot whose actions
            end in a gripper. None: all numbers of an action are joints or motions alike, scaled by
            their statistics; so are the fingers of a hand, and the grippers of a robot with two.
        hz: control rate in 1/s of the kept steps, None when it varies or is not known.
        action: what the actions' numbers are, a key of `ACTION_ENCODINGS`; "": any.
        state: what the state's numbers are, a key of `STATE_ENCODINGS`.
        gripper_binary: whether the gripper is only ever open or closed.
        depth: camera role -> depth feature.
        swap: two camera roles that are exchanged in every other trajectory, at random.
        noop: the dataset's own threshold for `data.filters.noop`, where that is 0.
    """

    images: Mapping[str, Path]
    features: Mapping[str, Path]
    standardize: Callable[[Episode], Trajectory] = _missing
    gripper_env: tuple[float, float] | None = None
    hz: float | None = None
    action: str = ""
    state: str = "none"
    gripper_binary: bool = False
    depth: Mapping[str, Path] = field(default_factory=dict)
    swap: tuple[str, str] | None = None
    noop: float = 0.0
    # So specs were written for version 0.1, and their files are the users' own.
    standardise: InitVar[Callable[[Episode], Trajectory] | None] = None

    def __post_init__(self, standardise: Callable[[Episode], Trajectory] | None) -> None:
        """Takes `standardize` by its older name, too."""
        if standardise is not None:
            object.__setattr__(self, "standardize", standardise)
        if self.standardize is _missing:
            raise TypeError("a DatasetSpec needs `standardize`, from an episode to a Trajectory")
        if problems := _problems(self):
            raise ValueError("; ".join(problems))

    def mask(self, dim: int) -> list[bool]:
        """True for those of an action's `dim` numbers that normalization scales.

        Raises:
            ValueError: the encoding has another number of them, or its last is no gripper, though
                the spec has commands for one.
        """
        encoding = ACTION_ENCODINGS[self.action] if self.action else None
        if encoding and encoding.dim != dim:
            raise ValueError(
                f"{self.action} actions have {encoding.dim} dimensions, the model {dim}: set "
                f"model.action_dim to {encoding.dim}, or to 0 for what the data have"
            )
        if not self.has_gripper:
            return [True] * dim
        if not encoding:
            # A gripper between 0 and 1 needs no scaling.
            return [True] * (dim - 1) + [False]
        if dim - 1 not in encoding.grippers:
            raise ValueError(
                f"{self.action} actions do not end in a gripper, though the spec has commands for "
                "one; gripper_env = None takes all numbers alike"
            )
        return encoding.mask

    @property
    def has_gripper(self) -> bool:
        """Whether the last number of an action commands a gripper."""
        return self.gripper_env is not None


def _problems(spec: DatasetSpec) -> list[str]:
    """All that is wrong with what a spec says, whatever the data are."""
    problems = []
    for name in ("images", "features", "depth"):
        paths = getattr(spec, name)
        if not isinstance(paths, Mapping) or not all(map(_is_path, paths.values())):
            problems.append(f"{name}={paths!r}: a dict from names to paths, each a str or a tuple")
        elif name != "features" and (unknown := sorted({*paths} - {*CAMERAS})):
            problems.append(f"{name}: roles {unknown} are none of {list(CAMERAS)}")
    ends = spec.gripper_env
    if ends is not None:
        is_pair = isinstance(ends, Sequence) and len(ends) == 2 and all(map(_is_number, ends))
        if not is_pair or ends[0] == ends[1]:
            problems.append(
                f"gripper_env={ends!r}: two different commands, for closed and for open, or None"
            )
    if spec.hz is not None and not (_is_number(spec.hz) and spec.hz > 0):
        problems.append(f"hz={spec.hz!r}: control steps a second, above 0, or None")
    if not (_is_number(spec.noop) and spec.noop >= 0):
        problems.append(f"noop={spec.noop!r}: a number, 0 or more")
    for name, legal in (("action", ["", *ACTION_ENCODINGS]), ("state", list(STATE_ENCODINGS))):
        if (value := getattr(spec, name)) not in legal:
            problems.append(f"{name}={value!r}: is none of {legal}")
    swap = spec.swap
    if swap is not None and (isinstance(swap, str) or len({*swap}) != 2 or {*swap} - {*CAMERAS}):
        problems.append(f"swap={swap!r}: two of {list(CAMERAS)}, or None")
    return problems


def _is_path(value: object) -> bool:
    return all(isinstance(p, str) for p in (value if isinstance(value, tuple | list) else (value,)))


def _is_number(value: object) -> bool:
    # numpy's numbers are registered as such; bool is one to Python alone.
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
