"""Windows and chunks: index arithmetic over trajectories, vectorized, with masks.

A window of w frames ends at frame t; its frame j is t - w + 1 + j. Left of the trajectory the
index is clamped to 0 and masked. Element [j, k] of the action chunk is the action at frame
t - w + 1 + j + k; beyond the trajectory the index is clamped to the last frame and masked. A row j
that is itself padding has no valid element: nothing is predicted from a frame that was not seen.

Two ways to number the windows. Sliding: one ends at every frame. Segment: every window comes w
times, and of copy i the first i steps are hidden, so that a model sees histories of every length.
Source: the windows of RoboVLMs' OXE loader (`window_sample` "sliding" and "range").

Axis letters: e trajectories, n samples or frames, w window, f chunk, s span (w + future frames).
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int64, Shaped


class Place(NamedTuple):
    """Where windows lie.

    Attributes:
        trajectory: int64 [n].
        end: int64 [n], last frame of the window, within the trajectory.
        hidden: int64 [n], steps at the window's start that are not shown.
    """

    trajectory: Int64[np.ndarray, "n"]
    end: Int64[np.ndarray, "n"]
    hidden: Int64[np.ndarray, "n"]


class Windows:
    """All windows of a dataset, by number; `len` is how many there are."""

    def __init__(
        self,
        lengths: Int64[np.ndarray, "e"],
        window: int,
        left_pad: bool,
        segment: bool = False,
        ends: Bool[np.ndarray, "n"] | None = None,
    ):
        """Numbers them.

        Args:
            lengths: frames of each trajectory.
            window: w.
            left_pad: also windows that reach left of a trajectory's start.
            segment: every window w times, see above.
            ends: over the frames of all trajectories, one after another: True where a window may
                end; None = everywhere.
        """
        self._copies = window if segment else 1
        self._first_end = 0 if left_pad else window - 1
        counts = num_windows(lengths, window, left_pad)
        self._starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self._chosen: np.ndarray | None = None
        if ends is not None and not ends.all():
            trajectory = np.repeat(np.arange(len(lengths)), counts)
            first = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)
            # The window numbered i ends at frame i - its trajectory's first number + first_end.
            frame = np.arange(self._starts[-1]) + (first - self._starts[:-1])[trajectory]
            self._chosen = np.flatnonzero(ends[frame + self._first_end])
        count = self._starts[-1] if self._chosen is None else len(self._chosen)
        self._count = int(count) * self._copies

    def __len__(self) -> int:
        return self._count

    def locate(self, numbers: Int64[np.ndarray, "n"]) -> Place:
        """Where the windows with these numbers lie."""
        # The copies of one window are neighbors.
        numbers, hidden = np.divmod(numbers, self._copies)
        if self._chosen is not None:
            numbers = self._chosen[numbers]
        # From the right: trajectories without windows start where the next one does.
        trajectory = np.searchsorted(self._starts, numbers, side="right") - 1
        return Place(trajectory, numbers - self._starts[trajectory] + self._first_end, hidden)


def num_windows(
    lengths: Int64[np.ndarray, "e"], window: int, left_pad: bool
) -> Int64[np.ndarray, "e"]:
    """Windows of each trajectory: one ending at every frame, or at every frame with full history.

    Args:
        lengths: frames of each trajectory.
        window: w.
        left_pad: also windows that reach left of the start. RoboVLMs trains without.
    """
    return lengths if left_pad else np.maximum(lengths - window + 1, 0)


def spans(
    ends: Int64[np.ndarray, "n"],
    lengths: Int64[np.ndarray, "n"],
    window: int,
    future: int,
    hidden: Int64[np.ndarray, "n"] | int = 0,
) -> tuple[Int64[np.ndarray, "n s"], Bool[np.ndarray, "n s"]]:
    """Frames of the windows and `future` frames after them, clamped, and which count.

    Args:
        ends: last frame of each window.
        lengths: frames of the trajectory of each window.
        window: w.
        future: how many frames beyond the window's end.
        hidden: steps at the window's start that do not count.
    """
    # Relative to the last frame of the window.
    rows = np.arange(1 - window, future + 1)
    frames = ends[:, None] + rows
    first = np.maximum(ends - window + 1 + hidden, 0)[:, None]
    last = lengths[:, None] - 1
    return np.clip(frames, 0, last), (frames >= first) & (frames <= last)


def unfold(values: Shaped[np.ndarray, "n s *rest"], size: int) -> Shaped[np.ndarray, "n w f *rest"]:
    """[n, s, ...] -> [n, s - size + 1, size, ...]: element [j, k] is j + k."""
    return values[:, np.arange(values.shape[1] - size + 1)[:, None] + np.arange(size)]


def history(
    ends: Int64[np.ndarray, "n"], window: int, hidden: Int64[np.ndarray, "n"] | int = 0
) -> tuple[Int64[np.ndarray, "n w"], Bool[np.ndarray, "n w"]]:
    """Frames of the windows ending at `ends`, and which of them are seen.

    Steps left of the trajectory, and hidden ones, repeat the first frame that is seen.
    """
    frames = ends[:, None] + np.arange(1 - window, 1)
    first = np.maximum(ends - window + 1 + hidden, 0)[:, None]
    # A clamped frame repeats the first one that is shown.
    return np.maximum(frames, first), frames >= first


def chunks(
    ends: Int64[np.ndarray, "n"],
    lengths: Int64[np.ndarray, "n"],
    window: int,
    chunk: int,
    hidden: Int64[np.ndarray, "n"] | int = 0,
    padded_rows: bool = False,
) -> tuple[Int64[np.ndarray, "n w f"], Bool[np.ndarray, "n w f"]]:
    """Frames of the actions supervised at every window step, clamped, and which count.

    Args:
        ends: last frame of each window.
        lengths: frames of the trajectory of each window, as far as they may be supervised.
        window: w.
        chunk: f.
        hidden: steps at each window's start that are not shown.
        padded_rows: also count real actions of rows that are themselves padding or hidden, as
            RoboVLMs does.
    """
    frames, mask = spans(ends, lengths, window, chunk - 1, hidden)
    wanted = unfold(mask, chunk)
    return unfold(frames, chunk), wanted if padded_rows else wanted & mask[:, :window, None]
