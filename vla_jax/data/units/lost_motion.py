"""Motion that was recorded and does not reach the model, because of statistics or clipping.

One owner judges it: what `data.clip` takes away is refused where it leaves a constant, and told
where it is much; what the statistics take away is told.

Axis letters: n frames, a action dimension, d dimensions.
"""

import logging
from collections.abc import Callable, Collection

import numpy as np
from jaxtyping import Float

from vla_jax.config import ConfigError, DataConfig
from vla_jax.data.dataset import Dataset
from vla_jax.data.units.normalize import ActionSpec
from vla_jax.data.units.prepare import Units

log = logging.getLogger(__name__)
_CUT = 0.1  # share of the frames that may lie beyond what the model is shown; q99 alone cuts 2 %
_CUT_NORMAL = 0.5  # likewise of `normal`, where a third lies beyond one deviation
_CLIPPED = 0.05  # share of a dimension's frames that `data.clip` may change without a word
_REFUSED = 0.5  # a dimension that is cut in most frames is a constant to the model
_SPAN = 0.02  # of the model's [-1, 1] that a dimension which moves should cover
_FRAMES = 100_000  # looked at for clipping, evenly over the dataset


def warn_of_options(config: DataConfig) -> None:
    """Tells of choices that are legal and seldom meant, before any data are read."""
    if config.normalization == "q99" and config.clip < 1:
        log.warning(
            "data.clip = %s cuts actions that q99 has already cut at its quantiles", config.clip
        )
    if config.normalization == "normal" and config.clip < 2:
        log.warning(
            "data.normalization = normal with data.clip = %s cuts actions that lie further than "
            "that many standard deviations from the mean", config.clip,
        )  # fmt: skip


def check_motion(recorded: Dataset, units: Units) -> None:
    """Tells of recorded motion that the model is not shown; refuses what becomes a constant.

    Args:
        recorded: the training part of a dataset.
        units: of that dataset.

    Raises:
        ConfigError: `data.clip` cuts most frames of a dimension; with the shares, and the way out.
    """
    name, spec, lines = recorded.name, units.action, []
    clipped = check_clipping(name, recorded.actions, spec)
    if spec.normalization != "none":
        cut = _CUT_NORMAL if spec.normalization == "normal" else _CUT
        both = spec.normalize, spec.unnormalize
        lines += lost_motion(recorded.actions, *both, "action", cut, clipped)
    if spec.gripper is not None:
        lines += lost_gripper(recorded.actions[:, -1])
    if units.state is not None and recorded.proprio is not None:
        both = units.state.normalize, units.state.unnormalize
        lines += lost_motion(recorded.proprio, *both, "state")
    for line in lines:
        log.warning("%s: %s", name, line)


def lost_motion(
    recorded: Float[np.ndarray, "n d"],
    normalize: Callable[[np.ndarray], np.ndarray],
    unnormalize: Callable[[np.ndarray], np.ndarray],
    label: str = "dimension",
    cut: float = _CUT,
    clipped: Collection[int] = (),
) -> list[str]:
    """One line for each dimension whose recorded motion is lost on the way to the model.

    Args:
        recorded: in robot units.
        normalize: robot units -> model units.
        unnormalize: its inverse within the range that is kept.
        label: what a dimension is called, in the lines.
        cut: share of the frames that may be cut off.
        clipped: dimensions whose frames are known to be cut off.
    """
    if not len(recorded):
        return []
    low, high = recorded.min(axis=0), recorded.max(axis=0)
    ends = normalize(np.stack([low, high]))
    shown = np.sort(unnormalize(np.stack([-np.ones_like(low), np.ones_like(low)])), axis=0)
    # Statistics are float32 and reach the end of a range only up to rounding.
    slack = 1e-4 * np.abs(shown).max(axis=0) + 1e-9
    lines = []
    for i in np.flatnonzero(low < high).tolist():
        span = f"moves from {low[i]:.4g} to {high[i]:.4g}"
        if ends[0, i] == ends[1, i]:
            # Equal quantiles mean that at least 98 % of the frames have this value.
            usual = np.median(recorded[:, i])
            fraction = float((recorded[:, i] != usual).mean())
            lines.append(
                f"{label} {i} {span}, in {fraction:.2%} of the frames, and always {ends[0, i]:g} "
                "for the model, as its 1 % and 99 % quantiles are equal. Use data.normalization = "
                "bounds if the motion matters"
            )
            continue
        column = recorded[:, i]
        outside = (column < shown[0, i] - slack[i]) | (column > shown[1, i] + slack[i])
        if outside.mean() > cut:
            if i not in clipped:
                lines.append(
                    f"{label} {i} {span}, and the model is shown {shown[0, i]:.4g} to "
                    f"{shown[1, i]:.4g}: {outside.mean():.0%} of the frames are cut off. Are the "
                    "statistics of these data?"
                )
        elif abs(ends[1, i] - ends[0, i]) < _SPAN:
            lines.append(
                f"{label} {i} {span}, which is {ends[0, i]:.3g} to {ends[1, i]:.3g} of -1 to 1 for "
                "the model. Are the statistics of these data, and in the same units?"
            )
    return lines


def lost_gripper(opened: Float[np.ndarray, "n"]) -> list[str]:
    """A line about a gripper that a policy would never move; [] if there is nothing to say.

    Args:
        opened: of every frame, as the spec makes it: 0 is closed, 1 open.
    """
    if not len(opened):
        return []
    low, high = float(opened.min()), float(opened.max())
    # One that never moves is no motion lost, as long as it is a state of the gripper.
    if low < 0.5 < high or (low == high and 0 <= low <= 1):
        return []
    state = "open" if low >= 0.5 else "closed"
    return [
        f"the gripper's numbers are {low:.4g} to {high:.4g}, and from 0 = closed to 1 = open that "
        f"is always {state}. Scale them in the spec's `standardize`"
    ]


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


def check_clipping(
    name: str, actions: Float[np.ndarray, "n a"], spec: ActionSpec
) -> dict[int, str]:
    """Tells of clipping that changes many actions; refuses what leaves a dimension constant.

    Args:
        name: of the dataset.
        actions: of its training part, in robot units.
        spec: how they are normalized.

    Returns:
        The dimensions of which `data.clip` cuts much, with the share of the frames.

    Raises:
        ConfigError: most frames of a dimension are cut; with the shares, and the way out.
    """
    if spec.normalization != "none" and spec.clip >= 1:
        return {}  # what lies beyond the statistics is cut, not by `data.clip`
    shares = clipped_shares(actions, spec)
    notable = {i: f"{fraction:.0%}" for i, fraction in enumerate(shares) if fraction > _CLIPPED}
    if not notable:
        return {}
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
    return notable
