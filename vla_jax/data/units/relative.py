"""Actions relative to the state the chunk starts from, and back; grippers stay absolute.

Source: openpi 15a9616 `transforms.py` (DeltaActions, AbsoluteActions).

Legend: f steps of the chunk · a action dimension · s state dimension
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float


def mask_of(*counts: int) -> tuple[bool, ...]:
    """(6, -1) -> six times True, then one False: the notation openpi's configs have."""
    return tuple(count > 0 for count in counts for _ in range(abs(count)))


def to_relative(
    actions: Float[np.ndarray, "*n f a"], state: Float[np.ndarray, "*n s"], mask: Sequence[bool]
) -> Float[np.ndarray, "*n f a"]:
    """Less the state, where the mask is True: the same state for the whole chunk.

    Args:
        actions: in robot units.
        state: at the chunk's first step; its first numbers are the actions' counterparts.
        mask: of the first numbers of an action; what is behind it stays.
    """
    return _shift(actions, state, mask, -1.0)


def to_absolute(
    actions: Float[np.ndarray, "*n f a"], state: Float[np.ndarray, "*n s"], mask: Sequence[bool]
) -> Float[np.ndarray, "*n f a"]:
    """Inverse of `to_relative`."""
    return _shift(actions, state, mask, 1.0)


def _shift(
    actions: Float[np.ndarray, "*n f a"],
    state: Float[np.ndarray, "*n s"],
    mask: Sequence[bool],
    sign: float,
) -> Float[np.ndarray, "*n f a"]:
    count = len(mask)
    # A copy, because the chunk may be a view of the dataset's arrays.
    moved = np.array(actions, copy=True)
    moved[..., :count] += sign * np.where(mask, state[..., :count], 0.0)[..., None, :]
    return moved
