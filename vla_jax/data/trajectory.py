"""Windows and chunks: index arithmetic over trajectories, vectorised, with masks.

A window of w frames ends at frame t; its frame j is t - w + 1 + j. Left of the trajectory the
index is clamped to 0 and masked. Element [j, k] of the action chunk is the action at frame
t - w + 1 + j + k; beyond the trajectory the index is clamped to the last frame and masked. A row j
that is itself padding has no valid element: nothing is predicted from a frame that was not seen.

Axis letters: n samples, w window, f chunk.
"""

import numpy as np
from jaxtyping import Bool, Int64


def num_windows(lengths: Int64[np.ndarray, "e"], window: int, left_pad: bool) -> np.ndarray:
    """Windows of each trajectory: one ending at every frame, or at every frame with full history.

    Args:
        lengths: frames of each trajectory.
        window: w.
        left_pad: also windows that reach left of the start. RoboVLMs trains without.
    """
    return lengths if left_pad else np.maximum(lengths - window + 1, 0)


def history(
    ends: Int64[np.ndarray, "n"], window: int
) -> tuple[Int64[np.ndarray, "n w"], Bool[np.ndarray, "n w"]]:
    """Frames of the windows ending at `ends`, clamped, and which of them exist."""
    frames = ends[:, None] + np.arange(1 - window, 1)
    return np.maximum(frames, 0), frames >= 0


def chunks(
    ends: Int64[np.ndarray, "n"], lengths: Int64[np.ndarray, "n"], window: int, chunk: int
) -> tuple[Int64[np.ndarray, "n w f"], Bool[np.ndarray, "n w f"]]:
    """Frames of the actions supervised at every window step, clamped, and which count.

    Args:
        ends: last frame of each window.
        lengths: frames of the trajectory of each window.
        window: w.
        chunk: f.
    """
    rows = ends[:, None] + np.arange(1 - window, 1)
    frames = rows[:, :, None] + np.arange(chunk)
    last = lengths[:, None, None] - 1
    mask = (rows[:, :, None] >= 0) & (frames <= last)
    return np.clip(frames, 0, last), mask
