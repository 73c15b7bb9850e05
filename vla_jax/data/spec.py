"""What a dataset has to say about itself, so that every dataset afterwards looks the same."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float32

# One episode as recorded: the spec's own short names -> [t, ...] arrays, text as arrays of str.
Episode = Mapping[str, np.ndarray]
# Path of a feature below `steps/`, or alternatives of which the first present is taken.
Path = str | tuple[str, ...]


@dataclass(frozen=True)
class Trajectory:
    """One standardised episode; all arrays have the episode's length t.

    Attributes:
        action: float32 [t, a]; arm in the dataset's own units, gripper last, 1 = open, 0 = closed.
        language: the instruction, "" if there is none, or one str a step (the first text counts);
            or a tuple of such, of which every sample gets one.
        proprio: float32 [t, p] in the dataset's own units, or None.
        keep: the frames that may be used; outside it actions need not make sense.
    """

    action: Float32[np.ndarray, "t a"]
    language: str | np.ndarray | tuple[str | np.ndarray, ...]
    proprio: Float32[np.ndarray, "t p"] | None = None
    keep: slice = field(default_factory=lambda: slice(None))


@dataclass(frozen=True)
class DatasetSpec:
    """How one dataset is read.

    Attributes:
        images: camera role (`vla_jax.types.CAMERAS`) -> image feature.
        features: short name -> the numeric and text features that `standardise` reads.
        standardise: one raw episode -> one `Trajectory`.
        gripper_env: the environment's gripper command for (closed, open).
        hz: control rate in 1/s, None when it varies.
    """

    images: Mapping[str, Path]
    features: Mapping[str, Path]
    standardise: Callable[[Episode], Trajectory]
    gripper_env: tuple[float, float]
    hz: float | None = None
