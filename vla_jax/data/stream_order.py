"""Windows of datasets that are read from front to back, in place of random access.

Numbers and texts of all episodes are collected in one pass and then at hand, so that statistics,
windows, filters and batches are those of the index. Images are not: their episodes pass by, in an
order that is new every time, and a pool of some of them is held, encoded, from which windows are
drawn until an episode has none left. Every window comes once before any comes again.

Each process reads its own share of the episodes. Memory grows with the pool alone. Which windows
come is a function of the seed, the processes and the sample number a run begins at: a run that is
resumed sees other windows next than it would have seen.

Axis letters: e trajectories, k some of them, n windows.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int64, Integer

from vla_jax.data.dataset import Prepared
from vla_jax.data.errors import DataError
from vla_jax.data.mixture import Mixture
from vla_jax.data.sampler import MixtureOrder, SequentialOrder, Windows
from vla_jax.data.source_streamed import Frames, StreamSource

_COUNTED = 1 << 20  # windows located at a time
_MASK = (1 << 64) - 1


class StreamedOrder:
    """An order whose windows, of datasets that are streamed, are those that can be had now."""

    def __init__(
        self, order: MixtureOrder | SequentialOrder, streams: "dict[int, _Ascending | _Shuffled]"
    ):
        """Replaces the windows of the datasets in `streams`, by their number in the mixture."""
        self._order, self._streams = order, streams

    def __call__(
        self, samples: Integer[np.ndarray, "n"]
    ) -> tuple[Int64[np.ndarray, "n"], Int64[np.ndarray, "n"]]:
        """Dataset and window of each sample; their images stay at hand until the next call."""
        dataset, window = self._order(samples)
        for number, stream in self._streams.items():
            members = dataset == number
            window[members] = stream.draw(window[members])
        return dataset, window


def streamed(
    mixture: Mixture,
    order: MixtureOrder | SequentialOrder,
    seed: int,
    start: int,
    process_index: int,
    process_count: int,
) -> tuple[MixtureOrder | SequentialOrder | StreamedOrder, list[Prepared]]:
    """What a loader draws from: its order, and datasets whose images can be read.

    Nothing changes where no dataset of the mixture is a stream.

    Args:
        mixture: of the loader.
        order: in which it would visit a mixture with random access.
        seed: of the run.
        start: sample number it begins at.
        process_index: which share of the episodes is this process's, if the order is shuffled; in
            sequence every process reads all of them.
        process_count: number of shares.

    Raises:
        DataError: there are more processes than trajectories.
    """
    streams: dict[int, _Ascending | _Shuffled] = {}
    datasets = list(mixture.datasets)
    for number, dataset in enumerate(mixture.datasets):
        if not isinstance(dataset.source, StreamSource):
            continue
        # Loaders of one mixture must not drop each other's images.
        source = dataset.source.holding()
        datasets[number] = dataclasses.replace(dataset, source=source)
        episodes = _Episodes(dataset, mixture.windows[number])
        if isinstance(order, SequentialOrder):
            streams[number] = _Ascending(source, episodes)
            continue
        assigned = np.array_split(episodes.used, process_count)[process_index]
        if not len(assigned):
            raise DataError(
                f"{dataset.name}: {len(episodes.used)} trajectories cannot be streamed to "
                f"{process_count} processes; set data.reader=index",
                source.root,
            )
        # numpy takes no negative seeds.
        key = [seed & _MASK, number, process_index, start & _MASK]
        streams[number] = _Shuffled(source, episodes, assigned, mixture.pool, key)
    return (StreamedOrder(order, streams) if streams else order), datasets


class _Episodes:
    """The windows of each trajectory, and the episode of the source that it is."""

    def __init__(self, dataset: Prepared, windows: Windows):
        self.windows = windows
        self.cameras, self.numbers = dataset.in_source()
        counts = np.zeros(len(self.numbers), np.int64)
        # In blocks, as arrays over all windows at once could fill the memory.
        for begin in range(0, len(windows), _COUNTED):
            block = np.arange(begin, min(begin + _COUNTED, len(windows)))
            counts += np.bincount(windows.locate(block).trajectory, minlength=len(counts))
        self.counts = counts
        self.first_window = np.cumsum(counts) - counts  # windows are numbered by trajectory
        self.used = np.flatnonzero(counts)  # trajectories


class _Shuffled:
    """Draws from a pool of episodes that pass by, pass after pass."""

    def __init__(
        self,
        source: StreamSource,
        episodes: _Episodes,
        assigned: Int64[np.ndarray, "k"],
        pool: int,
        key: Sequence[int],
    ):
        self._source, self._episodes = source, episodes
        self._random = np.random.default_rng(key)
        self._share = assigned
        self._coming: Iterator[tuple[int, Frames]] = iter(())
        self._slots = min(pool, len(assigned))
        # Of each slot: its trajectory, its windows in random order, and how many are left.
        self._trajectory = np.full(self._slots, -1)
        self._windows: list[np.ndarray] = [np.zeros(0, np.int64)] * self._slots
        self._left = np.zeros(self._slots, np.int64)
        self._done: list[int] = []  # trajectories whose last window was drawn by the last call

    def draw(self, windows: Int64[np.ndarray, "n"]) -> Int64[np.ndarray, "n"]:
        """As many windows as were asked for."""
        # Not before this call: until now the loader was decoding their last windows.
        for trajectory in self._done:
            if trajectory not in self._trajectory:  # it may have come again with the next pass
                self._source.held.pop(int(self._episodes.numbers[trajectory]), None)
        self._done.clear()
        drawn = np.empty(len(windows), np.int64)
        for i in range(len(windows)):
            self._refill()
            # Weighted by what a slot has left, so that all windows held are equally likely.
            below = np.cumsum(self._left)
            slot = int(np.searchsorted(below, self._random.integers(below[-1]), side="right"))
            self._left[slot] -= 1
            drawn[i] = self._windows[slot][self._left[slot]]
            if not self._left[slot]:
                self._done.append(int(self._trajectory[slot]))
                self._trajectory[slot] = -1
        return drawn

    def _refill(self) -> None:
        """Fills empty slots; a pass begins when the one before has not left a window."""
        self._fill()
        if self._left.any():
            return
        seed = int(self._random.integers(1 << 62))
        numbers = self._episodes.numbers[self._share]
        self._coming = self._source.passes(numbers, self._episodes.cameras, seed)
        self._fill()
        if not self._left.any():
            raise DataError("no episode of the first pass came again", self._source.root)

    def _fill(self) -> None:
        episodes = self._episodes
        for slot in np.flatnonzero(self._left == 0).tolist():
            number, frames = next(self._coming, (-1, {}))
            if number < 0:
                return
            # Numbers ascend, as a dataset keeps the order of its source.
            trajectory = int(np.searchsorted(episodes.numbers, number))
            count, first = int(episodes.counts[trajectory]), int(episodes.first_window[trajectory])
            self._source.held[number] = frames
            self._trajectory[slot], self._left[slot] = trajectory, count
            self._windows[slot] = first + self._random.permutation(count)


class _Ascending:
    """Visits windows in the order of their numbers."""

    def __init__(self, source: StreamSource, episodes: _Episodes):
        self._source, self._episodes = source, episodes
        self._coming: Iterator[tuple[int, Frames]] | None = None

    def draw(self, windows: Int64[np.ndarray, "n"]) -> Int64[np.ndarray, "n"]:
        """These windows; no call may go back behind the one before."""
        if not len(windows):
            return windows
        episodes, held = self._episodes, self._source.held
        needed = episodes.numbers[np.unique(episodes.windows.locate(windows).trajectory)]
        first = int(needed[0])
        if self._coming is None:
            used = episodes.numbers[episodes.used]
            self._coming = self._source.passes(used[used >= first], episodes.cameras, None)
        # A list of its own, as `held` shrinks meanwhile.
        for number in [number for number in held if number < first]:
            del held[number]
        missing = set(needed.tolist()) - set(held)
        while missing:
            number, frames = next(self._coming)
            if number >= first:
                held[number] = frames
            missing.discard(number)
        return windows
