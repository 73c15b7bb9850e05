"""What `Dataset` needs of a reader: episodes in order, columns in memory, images on demand.

Axis letters: e episodes, n frames of all episodes.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int64

from vla_jax.data.errors import DataError
from vla_jax.data.features import Feature
from vla_jax.data.places import NamedPath

# An encoded image (no bytes: no image), or its pixels: uint8 [h, x, 3], RGB.
Frame = bytes | memoryview | np.ndarray


@runtime_checkable
class Source(Protocol):
    """One split of one dataset, opened.

    Frames are numbered over the whole split. A path such as `steps/action` names a feature; those
    recorded once a step begin with `steps/`, the others are recorded once an episode.
    `RLDSIndex` is the fastest one; see `vla_jax.data.formats` for the others.

    Attributes:
        name: the dataset's own name.
        digest: changes when the episodes would; independent of where they lie.
        starts: int64 [e+1], first frame of each episode; the last entry is n.
        numbers: int64 [e], number of each episode within the split as it was recorded: what was
            left out counts.
        content: a digest of the numbers and texts themselves; "" if they are at hand only once.
        skipped: what is wrong with episodes that were left out, and how many each concerns.
    """

    name: str
    digest: str
    starts: Int64[np.ndarray, "starts"]
    numbers: Int64[np.ndarray, "e"]
    content: str
    skipped: list[tuple[DataError, int]]

    @property
    def root(self) -> NamedPath:
        """Folder of the data, for messages; not on a disk if the data are not."""
        ...

    @property
    def every(self) -> range | None:
        """Numbers of all episodes that the split is said to have.

        None if what was left out may have been any number of episodes.
        """
        ...

    @property
    def features(self) -> Mapping[str, Feature]:
        """Every feature, {path: Feature}."""
        ...

    @property
    def cameras(self) -> list[str]:
        """Paths of the image features."""
        ...

    @property
    def num_episodes(self) -> int:
        """The number of episodes."""
        ...

    def low(self, path: str) -> np.ndarray:
        """A numeric feature: [n, ...] over all frames, or [e, ...] over episodes."""
        ...

    def text(self, path: str) -> tuple[np.ndarray, list[str]]:
        """A text feature: int32 codes over all frames (or episodes), and the table they index."""
        ...

    def read(self, camera: str, first: int, last: int) -> Sequence[Frame]:
        """Images of frames `first`..`last`, inclusive, of one episode; from any thread.

        Raises:
            DataError: what cannot be read, with its place.
        """
        ...

    def place(self, frame: int) -> tuple[NamedPath, int, int]:
        """(file, episode within it, frame within the episode) of a frame, for messages."""
        ...


@runtime_checkable
class Fetching(Protocol):
    """A `Source` of an object store that can ask for many images at once."""

    def fetch(self, spans: Sequence[tuple[str, int, int]]) -> None:
        """Gets what calls of `read` with these arguments will want, once each."""
        ...


def find_place(starts: Int64[np.ndarray, "starts"], frame: int) -> tuple[int, int]:
    """Episode of a frame, and the frame's number within it."""
    # From the right, so that an episode's first frame is its own and not the one's before.
    episode = int(np.searchsorted(starts, frame, side="right")) - 1
    return episode, frame - int(starts[episode])


def text_codes(values: Sequence[Any]) -> tuple[np.ndarray, list[str]]:
    """Texts as int32 codes and the table of the distinct ones, in order of appearance."""
    table: dict[str, int] = {}  # dicts keep the order of insertion
    codes = [table.setdefault(str(value), len(table)) for value in values]
    return np.array(codes, np.int32), list(table)
