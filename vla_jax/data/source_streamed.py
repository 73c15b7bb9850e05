"""A source whose numbers are at hand and whose images pass by, episode after episode.

Axis letters: e episodes, k some of them.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int64

from vla_jax.data.features import Feature
from vla_jax.data.places import NamedPath
from vla_jax.data.source import Frame, Source, find_place

Frames = Mapping[str, Sequence[Frame]]  # camera -> all frames of an episode


@runtime_checkable
class Passes(Protocol):
    """Reads episodes from front to back."""

    def __call__(
        self, wanted: Int64[np.ndarray, "k"], cameras: Sequence[str], seed: int | None
    ) -> Iterator[tuple[int, Frames]]:
        """Every wanted episode once, by its number.

        Args:
            wanted: numbers of the episodes, ascending.
            cameras: paths of the images.
            seed: of the order, as far as there is a choice; None: as they lie.
        """
        ...


class StreamSource:
    """See `vla_jax.data.source.Source`.

    Attributes:
        columns: numbers and texts.
        passes: reads the images.
        held: number of an episode -> its images; whoever draws windows fills it.
    """

    def __init__(self, columns: Source, passes: Passes):
        """Joins numbers and images of the same episodes."""
        self.columns, self.passes = columns, passes
        self.held: dict[int, Frames] = {}  # encoded, as decoded images would not fit
        self.name, self.digest, self.root = columns.name, columns.digest, columns.root
        self.starts, self.skipped = columns.starts, columns.skipped
        self.numbers, self.every, self.content = columns.numbers, columns.every, columns.content

    def holding(self) -> "StreamSource":
        """The same episodes, with images held for somebody else."""
        # Shallow: numbers and texts are shared, as they may be large.
        other = copy.copy(self)
        other.held = {}
        return other

    @property
    def features(self) -> Mapping[str, Feature]:
        """Every feature."""
        return self.columns.features

    @property
    def cameras(self) -> list[str]:
        """Paths of the image features."""
        return self.columns.cameras

    @property
    def num_episodes(self) -> int:
        """Number of episodes."""
        return self.columns.num_episodes

    def low(self, path: str) -> np.ndarray:
        """A numeric feature."""
        return self.columns.low(path)

    def text(self, path: str) -> tuple[np.ndarray, list[str]]:
        """A text feature."""
        return self.columns.text(path)

    def read(self, camera: str, first: int, last: int) -> Sequence[Frame]:
        """Images of frames `first`..`last`, inclusive, of one episode.

        Of one that is held, in any thread; for another one the stream is begun anew.
        """
        episode, step = find_place(self.starts, first)
        frames = self.held.get(episode)
        if frames is None:
            # Slow: good for single images, such as those that tell a camera's size.
            _, frames = next(self.passes(np.array([episode]), [camera], None))
        return frames[camera][step : step + last - first + 1]

    def place(self, frame: int) -> tuple[NamedPath, int, int]:
        """(file, episode, frame) for messages."""
        return self.columns.place(frame)
