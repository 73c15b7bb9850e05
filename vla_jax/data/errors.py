"""What can be wrong with a dataset, each kind by name and with the place where it is wrong."""

import logging
import threading
from collections import Counter, deque
from typing import Any

log = logging.getLogger(__name__)


class DataError(ValueError):
    """A dataset that cannot be used as asked; the message names file, episode and frame.

    Attributes:
        file: shard or metadata file, "" when unknown.
        episode: number of the episode within the shard, -1 when it does not apply.
        frame: number of the frame within the episode, -1 when it does not apply.
    """

    def __init__(self, problem: str, file: Any = "", episode: int = -1, frame: int = -1):
        place = [str(file)] if str(file) else []
        place += [f"episode {episode}"] if episode >= 0 else []
        place += [f"frame {frame}"] if frame >= 0 else []
        super().__init__(f"{', '.join(place)}: {problem}" if place else problem)
        self.problem, self.file, self.episode, self.frame = problem, str(file), episode, frame


class TruncatedShardError(DataError):
    """A shard that ends early, or holds another number of episodes than dataset_info.json says."""


class CorruptRecordError(DataError):
    """A record whose checksum or protobuf structure is wrong."""


class FeatureError(DataError):
    """A feature that does not exist, or does not hold what features.json says."""


class EmptyTrajectoryError(DataError):
    """An episode without steps."""


class ImageDecodeError(DataError):
    """An image that is neither a sound JPEG nor a sound PNG."""


class TextLengthError(ValueError):
    """A prompt with more tokens than there are text columns."""


class MissingCameraError(FeatureError):
    """A dataset, or an episode of it, without a camera that the model takes."""


class ActionError(DataError):
    """An action or a robot state that is not a finite number."""


# By name, for those that an index keeps on disk.
KINDS: dict[str, type[DataError]] = {
    kind.__name__: kind
    for kind in (
        DataError, TruncatedShardError, CorruptRecordError, FeatureError, EmptyTrajectoryError,
        ImageDecodeError, MissingCameraError, ActionError,
    )
}  # fmt: skip
_SHOWN = 5  # of each kind in full; beyond that they are counted
_FEW = 4  # parts below which a share says nothing
_RECENT, _JUDGED = 256, 64  # windows whose share counts, and how many it takes to judge


class Skips:
    """What a run does about a part of the data that is wrong: it stops, or goes on without.

    Nothing is left out in silence: every part is counted by kind, and logged with its place. More
    than a share of everything is not left out at all: what is wrong then is not single parts.

    Attributes:
        name: of the dataset, for messages.
        on_error: "error" or "skip", see `data.on_error`.
        most: share of the parts that may be left out, see `data.max_skipped_share`.
        counts: kind of error -> parts left out.
        examples: kind of error -> the first ones, each with the parts it concerns.
    """

    def __init__(self, name: str, on_error: str = "error", most: float = 0.5):
        """Nothing has been left out yet."""
        self.name, self.on_error, self.most = name, on_error, most
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[tuple[DataError, int]]] = {}
        # Only the last ones: a share over a whole run would hide what goes wrong late.
        self._recent: deque[bool] = deque(maxlen=_RECENT)
        self._lock = threading.Lock()

    @property
    def allowed(self) -> bool:
        """Whether parts that are wrong may be left out."""
        return self.on_error == "skip"

    def add(self, error: DataError, parts: int = 1) -> None:
        """Leaves out `parts` (episodes, windows) because of `error`, or raises it."""
        if not self.allowed:
            raise error
        kind = type(error).__name__
        # The loader's decoding threads add at the same time.
        with self._lock:
            shown = self.counts[kind] < _SHOWN
            self.counts[kind] += parts
            if shown:
                self.examples.setdefault(kind, []).append((error, parts))
        if shown:
            log.warning("%s: skipped %d: %s: %s", self.name, parts, kind, error)

    def check(self, total: int) -> None:
        """Holds what has been left out of `total` parts against the share that may be.

        Raises:
            DataError: it is more.
        """
        lost = self.counts.total()
        if lost >= _FEW and lost > self.most * total:
            raise DataError(self._too_many(lost, str(total)))

    def drew(self, sound: bool) -> None:
        """Counts a window that was drawn; `sound` says whether it could be used.

        Raises:
            DataError: of the last ones more than the share that may be left out could not.
        """
        if not self.allowed:
            return
        with self._lock:
            self._recent.append(sound)
            # Only a window that failed can raise the share, so it is counted only then.
            drawn, lost = len(self._recent), self._recent.count(False) if not sound else 0
        if drawn >= _JUDGED and lost > self.most * drawn:
            raise DataError(self._too_many(lost, f"the last {drawn}"))

    def causes(self) -> list[str]:
        """One line for each kind of error: how many parts, which ones, why."""
        lines = []
        with self._lock:
            for kind, count in sorted(self.counts.items()):
                shown = self.examples.get(kind, [])
                listing = "; ".join(str(error) for error, _ in shown)
                unlisted = count - sum(parts for _, parts in shown)
                more = f"; and {unlisted} more" if unlisted > 0 else ""
                lines.append(f"{count} {kind}: {listing}{more}")
        return lines

    def _too_many(self, lost: int, total: str) -> str:
        listing = "\n  ".join(self.causes())
        return (
            f"{self.name}: {lost} of {total} parts would be skipped, more than "
            f"data.max_skipped_share = {self.most:g} allows. What is wrong with them:\n  {listing}"
        )

    def __str__(self) -> str:
        with self._lock:
            listing = ", ".join(f"{n} {kind}" for kind, n in sorted(self.counts.items()))
        return f"{self.name}: skipped {listing or 'nothing'}"
