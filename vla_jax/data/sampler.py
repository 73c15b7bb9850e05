"""From a sample number to frames: its dataset and window, where that lies, and what it masks.

Order. All is a pure function of (seed, n), so nothing needs to be stored. After n samples dataset d
has been drawn floor(C[d+1] n) - floor(C[d] n) times, where C are the cumulative shares, counted in
whole blocks; within a block it is random whose turn it is. The k-th draw of a dataset is element
k mod size of its epoch k div size, permuted anew every epoch, so each window comes once before any
comes again. All in integers: the shares never drift, and going to any sample costs one block.
Permutations are Feistel networks with cycle walking (Black & Rogaway 2002, "Ciphers with arbitrary
finite domains"), the round function is the splitmix64 finalizer (Steele et al. 2014).

Windows. A window of w frames ends at frame t; its frame j is t - w + 1 + j. Left of the trajectory
the index is clamped to 0 and masked. Element [j, k] of the action chunk is the action at frame
t - w + 1 + j + k; beyond the trajectory the index is clamped to the last frame and masked. A row j
that is itself padding has no valid element: nothing is predicted from a frame that was not seen.

Two ways to number the windows. Sliding: one ends at every frame. Segment: every window comes w
times, and of copy i the first i steps are hidden, so that a model sees histories of every length.
Source: the windows of RoboVLMs' OXE loader (`window_sample` "sliding" and "range").

Axis letters: e trajectories, n samples or frames, w window, f chunk, s span (w + future frames).
"""

import enum
import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int64, Integer, Shaped

# Four rounds of a pseudo-random function make a strong permutation (Luby & Rackoff 1988).
_ROUNDS = 4
_SHARE_BITS = 40  # resolution of the shares
_MASK = (1 << 64) - 1


class Stream(enum.IntEnum):
    """Who draws from `uniform`; a number once given stays, or runs of the past cannot be repeated.

    Attributes:
        FEW_SHOT: which trajectories are kept; its seed is the filter's own.
        INSTRUCTIONS: which of an episode's sentences a sample gets.
        GOALS: the last frame whose action counts.
    """

    FEW_SHOT = 0
    INSTRUCTIONS = 1
    GOALS = 2


def feistel(
    index: Integer[np.ndarray, "n"], size: int, key: Integer[np.ndarray, "n"]
) -> Int64[np.ndarray, "n"]:
    """Images of `index` under a pseudo-random permutation of range(size), one key an element."""
    # The fewest bits that hold `size` and can be cut into two equal halves.
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = np.stack([_mix(key.astype(np.uint64) + np.uint64(r)) for r in range(_ROUNDS)])
    value = index.astype(np.uint64)
    todo = np.arange(len(value))
    while len(todo):
        left, right = value[todo] >> half, value[todo] & mask
        for key_of_round in keys[:, todo]:
            left, right = right, left ^ (_mix(right + key_of_round) & mask)
        value[todo] = (left << half) | right
        # Cycle walking: what fell outside goes through again until it is inside.
        todo = todo[value[todo] >= np.uint64(size)]
    return value.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _keys(seed: int, stream: int, counter: Integer[np.ndarray, "n"]) -> np.ndarray:
    """A 64-bit key for each counter, from the seed and the number of the stream."""
    # splitmix64's increment moves a seed of 0 off 0, which the mixer maps to itself.
    base = np.array([seed & _MASK, stream & _MASK], np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    word = _mix(_mix(base[:1]) ^ base[1:])
    # An odd factor keeps different counters apart.
    return _mix(word + counter.astype(np.uint64) * np.uint64(0xD1342543DE82EF95))


def uniform(
    seed: int, stream: Stream, samples: Integer[np.ndarray, "n"], count: int
) -> Float64[np.ndarray, "n k"]:
    """`count` numbers in [0, 1) for every sample, from its number alone.

    Args:
        seed: of the run.
        stream: streams are independent of one another and of the order.
        samples: sample numbers.
        count: k.
    """
    # The order's streams count up from 0.
    keys = _keys(seed, -1 - stream, samples)[:, None]
    steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    # The upper 53 bits: as many as a float64 can hold.
    return (_mix(keys + steps) >> np.uint64(11)).astype(np.float64) * 2.0**-53


class MixtureOrder:
    """Sample number -> (dataset, window), for ever."""

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int, block: int):
        """Fixes the order.

        Args:
            sizes: windows of each dataset.
            weights: relative weight of one window of each dataset, so that equal weights mean every
                window of the mixture is equally likely (octo: `balance_weights`).
            seed: of the permutations.
            block: samples over which the shares come out even.

        Raises:
            ValueError: a dataset is empty, or its share is below one sample a block.
        """
        self.sizes, self.seed, self.block = [int(s) for s in sizes], seed, block
        # A weight is that of one window, so a dataset's share grows with its size.
        mass = np.asarray(weights, np.float64) * np.asarray(sizes, np.float64)
        if not mass.size or mass.min() <= 0:
            raise ValueError(f"every dataset needs windows and weight: {sizes=} {weights=}")
        self.shares = (mass / mass.sum()).tolist()
        if min(self.shares) * block < 1:
            need = int(np.ceil(1 / min(self.shares)))
            raise ValueError(
                f"the smallest share is below one in {block}: set data.block >= {need}"
            )
        # By the block: a permutation of 32 numbers costs numpy as much as one of thousands.
        # Two, as a batch may lie across the border of blocks.
        self._blocks = functools.lru_cache(maxsize=2)(self._compute_block)
        scale = 1 << _SHARE_BITS
        # Python integers: they do not overflow at any sample number.
        self._edges = [round(float(c) * scale) for c in np.cumsum([0.0, *self.shares])]
        # Rounding must leave no slot without a dataset.
        self._edges[-1] = scale

    def __call__(
        self, samples: Integer[np.ndarray, "n"]
    ) -> tuple[Int64[np.ndarray, "n"], Int64[np.ndarray, "n"]]:
        """Dataset and window of each sample."""
        blocks, slots = np.divmod(samples.astype(np.int64), self.block)
        dataset, window = np.zeros_like(slots), np.zeros_like(slots)
        for block in np.unique(blocks):
            selected = blocks == block
            datasets, windows = self._blocks(int(block))
            dataset[selected], window[selected] = (
                datasets[slots[selected]],
                windows[slots[selected]],
            )
        return dataset, window

    def _compute_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Dataset and window of every slot of a block."""
        start, stop = self._cumulative(block), self._cumulative(block + 1)
        slots = np.arange(self.block)
        # The slots are shuffled; the datasets' counts then cut them into turns.
        place = feistel(slots, self.block, _keys(self.seed, 0, np.full(self.block, block)))
        edges = np.cumsum([b - a for a, b in zip(start, stop, strict=True)])
        dataset = np.searchsorted(edges, place, side="right")
        draw = np.zeros(self.block, np.int64)
        for d, drawn in enumerate(start):
            members = np.flatnonzero(dataset == d)
            draw[members] = drawn + np.arange(len(members))  # the how-manieth of its dataset
        return dataset, self._window(dataset, draw)

    def _cumulative(self, blocks: int) -> list[int]:
        """Draws of each dataset in the first `blocks` blocks; they sum to blocks * block."""
        at = [(edge * blocks * self.block) >> _SHARE_BITS for edge in self._edges]
        return [b - a for a, b in itertools.pairwise(at)]

    def _window(self, dataset: np.ndarray, draw: np.ndarray) -> np.ndarray:
        window = np.empty_like(draw)
        for d in np.unique(dataset):
            members = dataset == d
            # Stream 0 orders the slots, so the datasets' streams begin at 1.
            epoch, element = np.divmod(draw[members], self.sizes[d])
            window[members] = feistel(element, self.sizes[d], _keys(self.seed, 1 + int(d), epoch))
        return window


class SequentialOrder:
    """Every window of every dataset once, in order; for evaluation."""

    def __init__(self, sizes: Sequence[int]):
        """Fixes the order of datasets with these numbers of windows."""
        self._starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __call__(
        self, samples: Integer[np.ndarray, "n"]
    ) -> tuple[Int64[np.ndarray, "n"], Int64[np.ndarray, "n"]]:
        """Dataset and window of each sample below `len(self)`."""
        samples = samples.astype(np.int64)
        dataset = np.searchsorted(self._starts, samples, side="right") - 1
        return dataset, samples - self._starts[dataset]


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
