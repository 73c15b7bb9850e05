"""One episode through its dataset's spec, checked.

Axis letters: t steps.
"""

import zlib
from typing import Any

import numpy as np

from vla_jax.data.errors import ActionError, FeatureError
from vla_jax.data.spec import DatasetSpec, Episode, Trajectory

# What functions that meet numbers they do not expect raise.
_MISTAKES = (
    ValueError, KeyError, IndexError, TypeError, AttributeError, ArithmeticError, zlib.error,
)  # fmt: skip


def standardize(
    spec: DatasetSpec, episode: Episode, steps: int, action_dim: int, state_dim: int | None
) -> Trajectory:
    """Standardizes an episode.

    Args:
        spec: of the dataset.
        episode: as recorded.
        steps: t.
        action_dim: what the model takes.
        state_dim: of the episodes before, 0 without states; None: any.

    Raises:
        FeatureError: the spec fails, or what it makes does not fit the episode or the others.
        ActionError: a number that is used is not finite; with its frame in the episode.
    """
    trajectory = apply(spec, episode)
    language, keep = "", slice(None)
    try:
        action = _numbers("actions", trajectory.action)
        state = (
            None
            if trajectory.proprio is None
            else _numbers("the robot's states", trajectory.proprio)
        )
        problem = _misfit(action, state, steps, action_dim, state_dim)
        if not problem:
            language, keep = _language(trajectory.language), _kept(trajectory.keep, steps)
    except _MISTAKES as error:
        raise _failed(error) from error
    # Raised out here, as the clause above would take it for a mistake of the spec's code.
    if problem:
        raise FeatureError(problem)
    for title, values in (("action", action), ("robot state", state)):
        if values is None:
            continue
        # Frames that are not used may hold anything.
        bad = ~np.isfinite(values[keep]).all(axis=1)
        if bad.any():
            frame = int(np.arange(len(values))[keep][np.argmax(bad)])
            listing = values[frame].tolist()
            raise ActionError(f"the {title} is not finite: {listing}", frame=frame)
    return Trajectory(action, language, state, keep)


def action_width(spec: DatasetSpec, episode: Episode) -> int:
    """Numbers of an action that the spec makes of an episode.

    Raises:
        FeatureError: the spec fails, or what it makes are no actions.
    """
    try:
        action = _numbers("actions", apply(spec, episode).action)
    except TypeError as error:
        raise _failed(error) from error
    shape = f"{action.dtype} {action.shape}"
    if action.ndim != 2:
        raise FeatureError(f"actions are {shape}, not numbers [steps, any]")
    if not action.shape[1]:
        raise FeatureError(f"actions are {shape}, without a single number a step")
    if spec.has_gripper and action.shape[1] == 1:
        raise FeatureError(
            f"actions are {shape}, a gripper alone; gripper_env=None takes it as any other number"
        )
    return action.shape[1]


def apply(spec: DatasetSpec, episode: Episode) -> Trajectory:
    """What the spec makes of an episode, unchecked.

    Raises:
        FeatureError: the spec fails.
    """
    try:
        trajectory = spec.standardize(episode)
    except Exception as error:  # a person's own code, which may do anything
        raise _failed(error) from error
    if not isinstance(trajectory, Trajectory):
        kind = type(trajectory).__name__
        raise _failed(TypeError(f"the spec makes a {kind}, not a Trajectory"))
    return trajectory


def _failed(error: Exception) -> FeatureError:
    return FeatureError(f"cannot be standardized: {type(error).__name__}: {error}")


def _numbers(title: str, values: Any) -> np.ndarray:
    """Numbers as float32; one too large for it becomes infinite, which is noticed later."""
    if not hasattr(values, "dtype"):
        raise TypeError(f"{title} are a {type(values).__name__}, not an array")
    if values.dtype.kind not in "fiub":
        raise TypeError(f"{title} are {values.dtype} {values.shape}, not numbers")
    with np.errstate(over="ignore"):
        return values.astype(np.float32)


def _language(language: object) -> str | np.ndarray | tuple[str | np.ndarray, ...]:
    """Texts in the forms that `Trajectory` describes, whatever holds them."""
    if isinstance(language, tuple):
        return tuple(_one_language(entry) for entry in language)
    return _one_language(language)


def _one_language(language: object) -> str | np.ndarray:
    if language is None:
        return ""
    if isinstance(language, str | bytes):
        return _text(language)
    texts = np.asarray(language)
    if texts.dtype.kind not in "SUO" or texts.ndim > 1:
        raise TypeError(f"the language is {texts.dtype} {texts.shape}, not text")
    if not texts.ndim:
        return _text(texts.item())
    # Filled in afterwards, as np.array would make strings of one fixed width.
    out = np.empty(len(texts), object)
    out[:] = [_text(entry) for entry in texts.tolist()]
    return out


def _text(entry: object) -> str:
    if entry is None:
        return ""
    if isinstance(entry, bytes):
        return entry.decode("utf-8", errors="replace")
    if not isinstance(entry, str):
        raise TypeError(f"the language holds {entry!r}, not text")
    return str(entry)


def _kept(keep: object, steps: int) -> slice:
    """The frames to keep as a slice; a mask or numbers of frames as far as they are one."""
    if keep is None:
        return slice(None)
    if isinstance(keep, slice):
        keep.indices(steps)  # raises where its ends are no integers
        return keep
    selection = np.asarray(keep)
    if selection.ndim != 1 or selection.dtype.kind not in "biu":
        raise TypeError(f"keep is {keep!r}; it must be a slice, or a mask over the steps")
    if selection.dtype.kind == "b" and len(selection) != steps:
        raise ValueError(f"keep is a mask over {len(selection)} steps, the episode has {steps}")
    frames = np.flatnonzero(selection) if selection.dtype.kind == "b" else selection
    if not len(frames):
        return slice(0, 0)
    strides = np.unique(np.diff(frames))
    if frames[0] < 0 or frames[-1] >= steps or len(strides) > 1 or (strides < 1).any():
        raise ValueError(
            "keep leaves frames out in between, so that actions on both sides would be taken for "
            "neighbors; keep one stretch, evenly"
        )
    return slice(int(frames[0]), int(frames[-1]) + 1, int(strides[0]) if len(strides) else 1)


def _misfit(
    action: np.ndarray, state: np.ndarray | None, steps: int, action_dim: int, state_dim: int | None
) -> str:
    for title, values in (("actions", action), ("the robot's states", state)):
        if values is None:
            continue
        if values.ndim != 2:
            return f"{title} are {values.dtype} {values.shape}, not numbers [{steps} steps, any]"
        if len(values) != steps:
            return (
                f"{title} have {len(values)} rows, the episode {steps} steps; "
                "Trajectory.keep leaves steps out"
            )
    if action.shape[1] != action_dim:
        return f"actions have {action.shape[1]} dimensions, the model {action_dim}"
    width = 0 if state is None else state.shape[1]
    if state_dim is not None and width != state_dim:
        return f"the robot's state has {width} numbers, in the episodes before {state_dim}"
    return ""


def instructions(trajectory: Trajectory) -> list[str]:
    """The distinct texts of an episode, blank ones left out."""
    alternatives = (
        trajectory.language if isinstance(trajectory.language, tuple) else (trajectory.language,)
    )
    texts = []
    for steps in alternatives:
        if isinstance(steps, str):
            spoken = [steps]
        else:  # one a step, or one an episode
            used = steps[trajectory.keep] if len(steps) == len(trajectory.action) else steps
            spoken = [str(text) for text in used]
        # An episode is told one thing: of a text a step, the first that says something.
        texts += [text for text in spoken if text.strip()][:1]
    return list(dict.fromkeys(texts))
