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


def standardise(
    spec: DatasetSpec, episode: Episode, steps: int, action_dim: int, state_dim: int | None
) -> Trajectory:
    """Standardises an episode.

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
    try:
        found = spec.standardise(episode)
        if not isinstance(found, Trajectory):
            raise TypeError(f"the spec makes a {type(found).__name__}, not a Trajectory")
        action = _numbers("actions", found.action)
        state = None if found.proprio is None else _numbers("the robot's states", found.proprio)
        problem = _misfit(action, state, steps, action_dim, state_dim)
        if not problem:
            language, keep = _language(found.language), _kept(found.keep, steps)
    except _MISTAKES as error:
        raise FeatureError(f"cannot be standardised: {type(error).__name__}: {error}") from error
    if problem:
        raise FeatureError(problem)
    for what, values in (("action", action), ("robot state", state)):
        if values is None:
            continue
        bad = ~np.isfinite(values[keep]).all(axis=1)
        if bad.any():
            frame = int(np.arange(len(values))[keep][np.argmax(bad)])
            listing = values[frame].tolist()
            raise ActionError(f"the {what} is not finite: {listing}", frame=frame)
    return Trajectory(action, language, state, keep)


def _numbers(what: str, values: Any) -> np.ndarray:
    """As float32; what that cannot hold becomes infinite, which is noticed later."""
    if values.dtype.kind not in "fiub":
        raise TypeError(f"{what} are {values.dtype} {values.shape}, not numbers")
    with np.errstate(over="ignore"):
        return values.astype(np.float32)


def _language(given: object) -> str | np.ndarray | tuple[str | np.ndarray, ...]:
    """Texts in the forms that `Trajectory` describes, whatever holds them."""
    if isinstance(given, tuple):
        return tuple(_one_language(entry) for entry in given)
    return _one_language(given)


def _one_language(given: object) -> str | np.ndarray:
    if given is None:
        return ""
    if isinstance(given, str | bytes):
        return _text(given)
    found = np.asarray(given)
    if found.dtype.kind not in "SUO" or found.ndim > 1:
        raise TypeError(f"the language is {found.dtype} {found.shape}, not text")
    if not found.ndim:
        return _text(found.item())
    out = np.empty(len(found), object)
    out[:] = [_text(entry) for entry in found.tolist()]
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
        keep.indices(steps)
        return keep
    given = np.asarray(keep)
    if given.ndim != 1 or given.dtype.kind not in "biu":
        raise TypeError(f"keep is {keep!r}; it must be a slice, or a mask over the steps")
    if given.dtype.kind == "b" and len(given) != steps:
        raise ValueError(f"keep is a mask over {len(given)} steps, the episode has {steps}")
    frames = np.flatnonzero(given) if given.dtype.kind == "b" else given
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
    for what, values in (("actions", action), ("the robot's states", state)):
        if values is None:
            continue
        if values.ndim != 2:
            return f"{what} are {values.dtype} {values.shape}, not numbers [{steps} steps, any]"
        if len(values) != steps:
            return (
                f"{what} have {len(values)} rows, the episode {steps} steps; "
                "Trajectory.keep leaves steps out"
            )
    if action.shape[1] != action_dim:
        return f"actions have {action.shape[1]} dimensions, the model {action_dim}"
    width = 0 if state is None else state.shape[1]
    if state_dim is not None and width != state_dim:
        return f"the robot's state has {width} numbers, in the episodes before {state_dim}"
    return ""


def instructions(found: Trajectory) -> list[str]:
    """The distinct texts of an episode, blank ones left out."""
    alternatives = found.language if isinstance(found.language, tuple) else (found.language,)
    texts = []
    for steps in alternatives:
        if isinstance(steps, str):
            spoken = [steps]
        else:  # one a step, or one an episode
            kept = steps[found.keep] if len(steps) == len(found.action) else steps
            spoken = [str(text) for text in kept]
        texts += [text for text in spoken if text.strip()][:1]
    return list(dict.fromkeys(texts))
