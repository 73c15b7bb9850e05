"""The common way to standardize: columns of recorded features, one after another, and a gripper.

A recipe says which columns; specs that need more are functions. Everything is data, so octo's and
openvla's variants of a dataset are one recipe with a word changed.

Axis letters: t steps, d columns.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float32

from vla_jax.data.spec import DatasetSpec, Episode, Path, Trajectory
from vla_jax.data.units.gripper import RECORDINGS

# Google's own conversions keep the instruction with the observation, the others with the step.
OBSERVED = "observation/natural_language_instruction"
STEP = "language_instruction"


@dataclass(frozen=True)
class Take:
    """Some columns of one feature.

    Attributes:
        path: of the feature; steps of any shape count as flat.
        columns: which of them.
        convert: what to make of these columns, [t, d] -> [t, e].
    """

    path: Path
    columns: slice
    convert: Callable[[np.ndarray], np.ndarray] | None = None

    @property
    def name(self) -> str:
        """The feature's name in an episode."""
        return self.path if isinstance(self.path, str) else self.path[0]

    def __call__(self, episode: Episode, steps: int) -> np.ndarray:
        """The columns, [t, d]."""
        # A single number is recorded as [t] in some datasets and as [t, 1] in others.
        values = episode[self.name].reshape(steps, -1)[:, self.columns]
        return values if self.convert is None else self.convert(values)


@dataclass(frozen=True)
class Zeros:
    """Columns that were not recorded.

    Attributes:
        count: d.
        padding: they only fill up openvla's fixed width of 8; octo has none.
    """

    count: int
    padding: bool = False

    def __call__(self, episode: Episode, steps: int) -> Float32[np.ndarray, "t d"]:
        """Zeros, [t, d]."""
        return np.zeros((steps, self.count), np.float32)


Part = Take | Zeros


def take(path: Path, start: int | None = None, stop: int | None = None, convert=None) -> Take:
    """Columns `start:stop` of a feature; `take("action", -1)` is its last."""
    return Take(path, slice(start, stop), convert)


def zeros(count: int) -> Zeros:
    """Columns of zeros that belong to the dataset's encoding."""
    return Zeros(count)


def pad(count: int = 1) -> Zeros:
    """Columns of zeros that octo leaves out."""
    return Zeros(count, padding=True)


@dataclass(frozen=True)
class Recipe:
    """`DatasetSpec.standardize` as data.

    Attributes:
        action: parts of the action; the last column is the gripper as it was recorded.
        gripper: the convention of that, a key of `vla_jax.data.units.gripper.RECORDINGS`.
        state: parts of the robot's state; without any there is none.
        language: path of the instruction, or episode -> instruction; "" for none.
        stride: every how-manieth step is kept.
    """

    action: tuple[Part, ...]
    gripper: str
    state: tuple[Part, ...]
    language: Path | Callable[[Episode], str]
    stride: int = 1

    def __call__(self, episode: Episode) -> Trajectory:
        """Standardizes one episode."""
        steps = _steps(episode, self.action)
        action = _join(self.action, episode, steps)
        # The whole column at once, as some conventions depend on the steps before or behind.
        action[:, -1] = RECORDINGS[self.gripper].to_open(action[:, -1])
        state = _join(self.state, episode, steps) if self.state else None
        # The stride is applied last, so that the gripper's convention has seen every step.
        return Trajectory(action, self._text(episode), state, slice(None, None, self.stride))

    def _text(self, episode: Episode) -> str | np.ndarray:
        if callable(self.language):
            return self.language(episode)
        return episode[_name(self.language)] if self.language else ""

    @property
    def features(self) -> dict[str, Path]:
        """All features that are read."""
        parts = [part for part in (*self.action, *self.state) if isinstance(part, Take)]
        paths = {part.name: part.path for part in parts}
        if self.language and not callable(self.language):
            paths[_name(self.language)] = self.language
        return paths

    def without_padding(self) -> "Recipe":
        """The same without what only fills up openvla's fixed width."""
        state = tuple(p for p in self.state if not (isinstance(p, Zeros) and p.padding))
        return replace(self, state=state)


def recipe(
    images: Mapping[str, str],
    *,
    action: Sequence[Part],
    gripper: str,
    state: Sequence[Part] = (),
    language: Path | Callable[[Episode], str] = STEP,
    features: Mapping[str, Path] | None = None,
    depth: Mapping[str, str] | None = None,
    stride: int = 1,
    gripper_env: tuple[float, float] | None = None,
    encoding: tuple[str, str] = ("eef_pos", "none"),
    hz: float | None = None,
    **spec_fields,
) -> DatasetSpec:
    """A spec from a recipe.

    Args:
        images: camera role -> name below `observation/`.
        action: see `Recipe`.
        gripper: see `Recipe`.
        state: see `Recipe`.
        language: see `Recipe`.
        features: what `language` reads, where it is a function.
        depth: camera role -> name below `observation/`.
        stride: see `Recipe`.
        gripper_env: where it is not the convention's own.
        encoding: of action and state.
        hz: of the kept steps.
        spec_fields: more of `DatasetSpec`.
    """
    standardizer = Recipe(tuple(action), gripper, tuple(state), language, stride)
    recorded = RECORDINGS[gripper]
    return DatasetSpec(
        images={role: f"observation/{name}" for role, name in images.items()},
        features={**standardizer.features, **(features or {})},
        standardize=standardizer,
        gripper_env=gripper_env or recorded.env,
        hz=hz,
        action=encoding[0],
        state=encoding[1],
        gripper_binary=recorded.binary,
        depth={role: f"observation/{name}" for role, name in (depth or {}).items()},
        **spec_fields,
    )


def _name(path: Path) -> str:
    return path if isinstance(path, str) else path[0]


def _steps(episode: Episode, parts: Sequence[Part]) -> int:
    # Columns of zeros have no length of their own, so a recorded part tells it.
    return next(len(episode[part.name]) for part in parts if isinstance(part, Take))


def _join(parts: Sequence[Part], episode: Episode, steps: int) -> Float32[np.ndarray, "t d"]:
    # Some datasets record float64 or integers.
    return np.concatenate([part(episode, steps) for part in parts], axis=1).astype(np.float32)
