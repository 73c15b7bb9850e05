"""CALVIN's annotations, and the episodes that they and the recordings make.

Axis letters: r recordings.
"""

import logging
import pickle
import struct
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from vla_jax.data.errors import DataError
from vla_jax.files import problem_of

log = logging.getLogger(__name__)
# What content that is not as expected makes pickle and the code below raise.
MISTAKES = (
    LookupError, TypeError, ValueError, AttributeError, OverflowError, EOFError, OSError,
    MemoryError, ImportError, RecursionError, pickle.UnpicklingError, struct.error,
    zipfile.BadZipFile,
)  # fmt: skip
LONGEST = 512  # frames of a piece of a recording


@dataclass(frozen=True)
class Annotation:
    """What happened in frames `start` .. `end` - 1: a task's name, and a person's words for it."""

    start: int
    end: int
    task: str
    text: str


class _Plain(pickle.Unpickler):
    """Makes numbers, text, containers and numpy arrays, and calls nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        # Unpickling calls whatever a file names; these four make arrays and nothing else.
        inside = module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray")
        if inside and name in ("ndarray", "dtype", "scalar", "_reconstruct"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"holds {module}.{name}, which is no data")


def load_object(path: Path) -> Any:
    """The Python object in an .npy file, as CALVIN publishes some; runs no code of the file's.

    Raises:
        ValueError, pickle.UnpicklingError: the file holds something else.
    """
    with open(path, "rb") as file:
        # Only the header is numpy's here, as its own reader would unpickle anything.
        older = np.lib.format.read_magic(file) == (1, 0)
        read = np.lib.format.read_array_header_1_0 if older else np.lib.format.read_array_header_2_0
        *_, kind = read(file)
        if kind != np.dtype(object):
            raise ValueError(f"an array of {kind}")
        return _Plain(file).load().item()


# First frame, last frame + 1, and the annotated spans in between.
Span = tuple[int, int, tuple[Annotation, ...]]


def annotation_file(folder: Path) -> Path:
    """Where the annotations of one split are, or should be."""
    candidates = [folder / "lang_annotations" / "auto_lang_ann.npy", folder / "auto_lang_ann.npy"]
    return next((path for path in candidates if path.exists()), candidates[0])


def read_annotations(folder: Path, required: bool) -> list[Annotation]:
    """The annotations of one split.

    Args:
        folder: `training` or `validation`.
        required: else none is returned where there are none.

    Raises:
        DataError: there are none, or they are not in CALVIN's form.
    """
    path = annotation_file(folder)
    if not path.exists():
        if required:
            raise DataError("does not exist: there are no annotated windows", path)
        return []
    try:
        tree = load_object(path)
        spans, language = tree["info"]["indx"], tree["language"]
        rows = zip(spans, language["task"], language["ann"], strict=True)
        return [Annotation(int(a), int(b), _text(task), _text(text)) for (a, b), task, text in rows]
    except MISTAKES as error:
        problem = problem_of(path, f"is not a CALVIN annotation file ({error!r})")
        raise DataError(problem, path) from error


def _text(value: Any) -> str:
    text = value.decode() if isinstance(value, bytes) else value
    if not isinstance(text, str):
        raise TypeError(f"{value!r} is no text")
    return str(text)


def episodes_of_spans(
    recordings: Int64[np.ndarray, "r 2"], annotations: Sequence[Annotation], folder: Path
) -> list[tuple[int, Span]]:
    """One episode for every annotation that lies within one recording, with its number.

    Raises:
        DataError: no annotation does.
    """
    order = recordings[np.argsort(recordings[:, 0])]
    # For each annotation the last recording that begins no later than it.
    before = np.searchsorted(order[:, 0], [a.start for a in annotations], side="right") - 1
    inside = [
        a.start < a.end and r >= 0 and a.end - 1 <= order[r, 1]
        for a, r in zip(annotations, before.tolist(), strict=True)
    ]
    if not any(inside):
        raise DataError("no annotation lies within a recording of ep_start_end_ids.npy", folder)
    if not all(inside):
        lost = [(a.start, a.end) for a, ok in zip(annotations, inside, strict=True) if not ok]
        log.warning(
            "%s: left out %d of %d annotations, which no recording holds: %s%s",
            folder, len(lost), len(annotations), lost[:5], " ..." if len(lost) > 5 else "",
        )  # fmt: skip
    return [
        (number, (a.start, a.end, (a,)))
        for number, (a, ok) in enumerate(zip(annotations, inside, strict=True))
        if ok
    ]


def cut(recordings: Int64[np.ndarray, "r 2"], annotations: Sequence[Annotation]) -> list[Span]:
    """Every frame of every recording once, in pieces of `LONGEST` frames at most.

    No annotated span is cut in two, except where they overlap without end.
    """
    episodes = []
    for first, last in recordings.tolist():
        spans = [a for a in annotations if a.end > first and a.start <= last]
        for start, stop in _pieces(first, last + 1, spans):
            episodes.append(
                (start, stop, tuple(a for a in spans if a.end > start and a.start < stop))
            )
    return episodes


def _pieces(first: int, stop: int, spans: Sequence[Annotation]) -> Iterator[tuple[int, int]]:
    open_spans = np.zeros(stop - first + 1, np.int64)  # spans that a cut before frame i divides
    for span in spans:
        # A cut at a span's first frame divides nothing, so it opens one frame later.
        open_spans[min(max(span.start + 1 - first, 0), stop - first)] += 1
        open_spans[min(max(span.end - first, 0), stop - first)] -= 1
    free = np.cumsum(open_spans) == 0
    begin = first
    while stop - first > LONGEST:
        ahead = free[first - begin + 1 : first - begin + 1 + LONGEST]
        candidates = np.flatnonzero(ahead) + 1
        # The latest cut that divides no span makes the fewest pieces.
        piece = int(candidates[-1]) if len(candidates) else LONGEST
        yield first, first + piece
        first += piece
    yield first, stop
