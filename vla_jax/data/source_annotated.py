"""Annotated spans of long recordings, each an episode of its own.

`launch/convert_data.py calvin --episodes=segments` keeps every frame once and lists the annotated
spans, which overlap, with each episode. Axis letters: e spans, n frames of all spans.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence

import numpy as np

from vla_jax.data.errors import DataError, FeatureError
from vla_jax.data.features import STEPS, Feature
from vla_jax.data.places import NamedPath
from vla_jax.data.source import Frame, Source, find_place, text_codes

# JSON: a list of {"start", "end" (exclusive), "task", "text"}, counted from the first frame.
ANNOTATIONS = "episode_metadata/annotations"
NEEDED = (ANNOTATIONS, "episode_metadata/start")  # at hand in the source
_TEXT = STEPS + "language_instruction"
_SHIFTED = ("episode_metadata/start", "episode_metadata/end")


class SpanSource:
    """The annotated spans of the episodes of another source; see `vla_jax.data.source.Source`."""

    def __init__(self, source: Source):
        """Finds the spans; `source` has `NEEDED` at hand.

        Raises:
            DataError: there are none, or they do not lie within their episodes.
        """
        self._source, self.name, self.root = source, source.name, source.root
        self.skipped = source.skipped
        codes, table = source.text(ANNOTATIONS)
        lengths, spans = np.diff(source.starts), []
        for episode, code in enumerate(codes.tolist()):
            where = source.place(int(source.starts[episode]))[:2]
            try:
                listed = [
                    (episode, int(span["start"]), int(span["end"]), str(span["text"]))
                    for span in json.loads(table[code])
                ]
            except (ValueError, KeyError, TypeError) as error:
                problem = f"{ANNOTATIONS!r} is not a list of spans ({error!r})"
                raise FeatureError(problem, *where) from error
            for span in listed:
                if not 0 <= span[1] < span[2] <= lengths[episode]:
                    problem = f"has {lengths[episode]} frames, a span is {span[1:]}"
                    raise FeatureError(problem, *where)
            spans += listed
        self.numbers = np.arange(len(spans))
        # How many spans the recordings held that had to be left out is not known.
        self.every = None if source.skipped else range(len(spans))
        self.content = source.content
        if not spans:
            raise DataError(f"no span in {ANNOTATIONS!r} is annotated", source.root)
        self._owner = np.array([s[0] for s in spans], np.int64)
        self._begin, self._end = (np.array([s[i] for s in spans], np.int64) for i in (1, 2))
        self._texts = [s[3] for s in spans]
        self.starts = np.concatenate([[0], np.cumsum(self._end - self._begin)])
        self.digest = hashlib.sha256(json.dumps([source.digest, spans]).encode()).hexdigest()

    def _rows(self) -> np.ndarray:
        """Frame of the source that each frame is."""
        first = self._source.starts[self._owner] + self._begin
        # Within a span the frames of both differ by a constant.
        return np.arange(self.starts[-1]) + np.repeat(
            first - self.starts[:-1], np.diff(self.starts)
        )

    @property
    def features(self) -> Mapping[str, Feature]:
        """Every feature of the source."""
        return self._source.features

    @property
    def cameras(self) -> list[str]:
        """Paths of the image features."""
        return self._source.cameras

    @property
    def num_episodes(self) -> int:
        """Number of spans."""
        return len(self._owner)

    def low(self, path: str) -> np.ndarray:
        """Numbers over the frames of the spans, or over the spans."""
        values = self._source.low(path)
        if path.startswith(STEPS):
            return values[self._rows()]
        if path in _SHIFTED:
            # The episode itself begins at this frame of the original recording.
            begin = self._source.low(_SHIFTED[0])[self._owner]
            return begin + (self._begin if path == _SHIFTED[0] else self._end)
        return values[self._owner]

    def text(self, path: str) -> tuple[np.ndarray, list[str]]:
        """Codes and table; the instruction is that of the span, on all of its frames."""
        if path == _TEXT:
            codes, table = text_codes(self._texts)
            return np.repeat(codes, np.diff(self.starts)), table
        codes, table = self._source.text(path)
        return codes[self._rows() if path.startswith(STEPS) else self._owner], table

    def read(self, camera: str, first: int, last: int) -> Sequence[Frame]:
        """Images of frames `first`..`last`, inclusive, of one span."""
        begin = self._at(first)
        return self._source.read(camera, begin, begin + last - first)

    def place(self, frame: int) -> tuple[NamedPath, int, int]:
        """(file, episode, frame) of the recording, for messages."""
        return self._source.place(self._at(frame))

    def _at(self, frame: int) -> int:
        span, step = find_place(self.starts, frame)
        return int(self._source.starts[self._owner[span]] + self._begin[span]) + step
