"""The share of the recorded motion that `data.clip` takes away from the model.

Axis letters: n frames, a action dimension.
"""

import logging

import numpy as np
from jaxtyping import Float

from vla_jax.config import ConfigError
from vla_jax.data.units.normalize import ActionSpec

log = logging.getLogger(__name__)
_TOLD = 0.05  # share of a dimension's frames that is worth a warning; q99 alone cuts 0.02
_REFUSED = 0.5  # a dimension that is cut in most frames is a constant to the model
_FRAMES = 100_000  # looked at, evenly over the dataset


def clipped_shares(actions: Float[np.ndarray, "n a"], spec: ActionSpec) -> list[float]:
    """The share of the frames that clipping changes, for each arm dimension.

    Args:
        actions: in robot units.
        spec: how they are normalized.
    """
    # The step is rounded up; `or 1` is for a dataset without frames.
    sample = np.asarray(actions[:: -(-len(actions) // _FRAMES) or 1, : len(spec.low)], np.float64)
    low, high = np.asarray(spec.low), np.asarray(spec.high)
    # In units of half the range, so that constant dimensions need no exception.
    outside = np.abs(2 * sample - low - high) > (spec.clip + 1e-6) * (high - low) + 1e-9
    return np.where(high > low, outside.mean(axis=0), 0.0).tolist()


def check_clipping(name: str, actions: Float[np.ndarray, "n a"], spec: ActionSpec) -> None:
    """Tells of clipping that changes many actions, and refuses what leaves a dimension constant.

    Args:
        name: of the dataset.
        actions: of its training part, in robot units.
        spec: how they are normalized.

    Raises:
        ConfigError: most frames of a dimension are cut; with the shares, and the way out.
    """
    if spec.normalization != "none" and spec.clip >= 1:
        return  # what lies beyond the statistics is cut, not by `data.clip`
    shares = clipped_shares(actions, spec)
    notable = {i: f"{fraction:.0%}" for i, fraction in enumerate(shares) if fraction > _TOLD}
    if not notable:
        return
    listing = ", ".join(f"{i}: {fraction}" for i, fraction in notable.items())
    problem = (
        f"data.normalization = {spec.normalization} with data.clip = {spec.clip:g} cuts off "
        f"actions of {name!r}, by dimension: {listing} of the frames"
    )
    if max(shares) > _REFUSED:
        raise ConfigError(
            f"{problem}. The model would never see these move: set data.normalization to q99 or "
            "bounds and data.clip to 1, or for numbers as recorded data.clip to the largest one"
        )
    log.warning("%s; data.normalization = q99 with data.clip = 1 keeps them", problem)
