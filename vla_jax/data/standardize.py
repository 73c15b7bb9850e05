"""One episode through its dataset's spec, checked.

Axis letters: t steps.
"""

import zlib

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
        problem = _misfit(found, steps, action_dim, state_dim)
    except _MISTAKES as error:
        raise FeatureError(f"cannot be standardised: {type(error).__name__}: {error}") from error
    if problem:
        raise FeatureError(problem)
    for what, values in (("action", found.action), ("robot state", found.proprio)):
        if values is None:
            continue
        bad = ~np.isfinite(values[found.keep]).all(axis=1)
        if bad.any():
            frame = int(np.arange(len(values))[found.keep][np.argmax(bad)])
            listing = values[frame].tolist()
            raise ActionError(f"the {what} is not finite: {listing}", frame=frame)
    return found


def _misfit(found: Trajectory, steps: int, action_dim: int, state_dim: int | None) -> str:
    state = found.proprio
    for what, values in (("actions", found.action), ("the robot's states", state)):
        if values is None:
            continue
        if values.ndim != 2 or values.dtype.kind not in "fiub":
            return f"{what} are {values.dtype} {values.shape}, not numbers [{steps} steps, any]"
        if len(values) != steps:
            return (
                f"{what} have {len(values)} rows, the episode {steps} steps; "
                "Trajectory.keep leaves steps out"
            )
    if found.action.shape[1] != action_dim:
        return f"actions have {found.action.shape[1]} dimensions, the model {action_dim}"
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
