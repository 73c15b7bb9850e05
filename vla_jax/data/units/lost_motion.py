"""Motion that was recorded and does not reach the model, because of statistics or clipping.

Axis letters: n frames, d dimensions.
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

_CUT = 0.1  # share of the frames that may lie beyond what the model is shown; q99 alone cuts 2 %
_SPAN = 0.02  # of the model's [-1, 1] that a dimension which moves should cover


def lost_motion(
    recorded: Float[np.ndarray, "n d"],
    normalize: Callable[[np.ndarray], np.ndarray],
    unnormalize: Callable[[np.ndarray], np.ndarray],
    label: str = "dimension",
    cut: float = _CUT,
) -> list[str]:
    """One line for each dimension whose recorded motion is lost on the way to the model.

    Args:
        recorded: in robot units.
        normalize: robot units -> model units.
        unnormalize: its inverse within the range that is kept.
        label: what a dimension is called, in the lines.
        cut: share of the frames that may be clipped.
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


def unpadded(columns: dict[str, list], size: int) -> dict[str, list]:
    """Statistics without the zeros that openpi pads them with, where they are longer than `size`.

    Whatever is of another length and no padding stays as it is.
    """
    numbers: Sequence[Sequence[float]] = [v for k, v in columns.items() if k != "mask"]
    # A number other than 0 behind `size` is no padding.
    if not numbers or len(numbers[0]) <= size or any(any(v[size:]) for v in numbers):
        return columns
    return {key: list(values)[:size] for key, values in columns.items()}
