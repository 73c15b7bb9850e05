"""Trajectories that somebody makes: a `dlimp.DLataset`, or any iterable of dicts.

A trajectory is a nested dict whose leaves have one entry a step, as dlimp's are: encoded images
(bytes) or pixels, numbers, texts (bytes). `observation/image_0` has the path
`steps/observation/image_0`, so the same `DatasetSpec` fits. The trajectories may come in another
order every time, but they must be the same: they are recognized by their numbers and texts.

Axis letters: k some episodes.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from vla_jax.data.decode import image_size
from vla_jax.data.errors import DataError, EmptyTrajectoryError, FeatureError, MissingCameraError
from vla_jax.data.features import STEPS, Feature
from vla_jax.data.formats import Reader
from vla_jax.data.source import Frame, find_place, text_codes
from vla_jax.data.source_streamed import Frames, StreamSource
from vla_jax.rules import flatten

_ENCODED = (b"\xff\xd8", b"\x89P")  # JPEG, PNG
_ROOT = Path("given trajectories")
Given = Iterable[Mapping[str, Any]]


def given_reader(trajectories: Given | Mapping[str, Given]) -> Reader:
    """A reader of trajectories in place of files; it ignores the folder.

    Args:
        trajectories: can be iterated over any number of times; or split -> such ones. Without
            names they are the split "train".
    """
    named: dict[str, Any] = {"train": trajectories}
    if isinstance(trajectories, Mapping):
        named = {str(split): source for split, source in trajectories.items()}

    def open_given(
        folder: Any, split: str, low: Sequence[str], *_: Any, skip: bool
    ) -> StreamSource:
        if split not in named:
            raise DataError(f"no split {split!r} was given; given were {sorted(named)}")
        columns = _Columns(named[split], low, skip)
        return StreamSource(columns, columns.passes)

    def features(_: Any) -> dict[str, Feature]:
        # The first trajectory speaks for all; `_Columns` holds the others against it.
        for raw in _steps(next(iter(named.values()))):
            return _features(_flat(raw))
        raise DataError("there are no trajectories", _ROOT)

    return Reader((), lambda _: sorted(named), features, open_given)


class _Columns:
    """Numbers and texts of given trajectories; see `vla_jax.data.source.Source`."""

    name = "given"

    def __init__(self, trajectories: Given, low: Sequence[str], skip: bool):
        self._trajectories, self._low = trajectories, sorted(low)
        self.root, self.skipped = _ROOT, []
        self._numbers: dict[bytes, list[int]] = {}  # equal ones are told apart by their order
        parts: dict[str, list[np.ndarray]] = {path: [] for path in self._low}
        lengths: list[int] = []
        numbers: list[int] = []
        number = -1
        self._features: dict[str, Feature] = {}
        for number, raw in enumerate(_steps(trajectories)):
            flat = _flat(raw)
            # The first sound look decides; the others are held against it.
            self._features = self._features or _features(flat)
            try:
                length = self._length(flat, number)
            except DataError as error:
                if not skip:
                    raise
                self.skipped.append((error, 1))
                continue
            self._numbers.setdefault(self._key(flat), []).append(len(lengths))
            lengths.append(length)
            numbers.append(number)
            for path in self._low:
                parts[path].append(flat[path])
        if not lengths:
            raise DataError("there are no trajectories", self.root)
        self.starts = np.cumsum([0, *lengths])
        self.numbers, self.every = np.array(numbers, np.int64), range(number + 1)
        keys = b"".join(sorted(self._numbers))
        self.digest = hashlib.sha256(keys + self.starts.tobytes()).hexdigest()
        self.content = self.digest
        self._columns = {path: np.concatenate(rows) for path, rows in parts.items()}

    def _length(self, flat: Mapping[str, np.ndarray], number: int) -> int:
        missing = [path for path in self._low if path not in flat]
        if missing:
            problem = f"no feature {missing}; it has {sorted(flat)}"
            raise FeatureError(problem, self.root, number)
        blind = [path for path in self.cameras if path not in flat]
        if blind:
            problem = f"no camera {blind}, which the first one has; it has {sorted(flat)}"
            raise MissingCameraError(problem, self.root, number)
        lengths = {path: len(flat[path]) for path in (*self._low, *self.cameras)}
        if len(set(lengths.values())) > 1:
            raise FeatureError(f"features of different lengths: {lengths}", self.root, number)
        if not any(lengths.values()):
            raise EmptyTrajectoryError("the trajectory has no steps", self.root, number)
        for path in (*self._low, *self.cameras):
            reference, values = self._features[path], flat[path]
            if not _is_like(values, reference):
                problem = (
                    f"{path!r} is {values.dtype} {list(values.shape[1:])} a step, in the first one "
                    f"{reference.dtype} {list(reference.shape)}"
                )
                raise FeatureError(problem, self.root, number)
        return next(iter(lengths.values()))

    def _key(self, flat: Mapping[str, np.ndarray]) -> bytes:
        digest = hashlib.blake2b(digest_size=16)
        for path in self._low:
            values = flat[path]
            texts = values.dtype == object
            # The bytes of an array of objects are addresses in memory.
            digest.update(repr(values.tolist()).encode() if texts else values.tobytes())
        return digest.digest()

    def passes(
        self, wanted: Int64[np.ndarray, "k"], cameras: Sequence[str], seed: int | None
    ) -> Iterator[tuple[int, Frames]]:
        """See `vla_jax.data.source_streamed.Passes`; the order is that of the trajectories."""
        todo, occurrences = set(wanted.tolist()), Counter()
        for place, raw in enumerate(_steps(self._trajectories)):
            flat = _flat(raw)
            try:
                self._length(flat, place)
            except DataError:  # the first pass has left it out
                continue
            key = self._key(flat)
            # Trajectories with the same numbers and texts are told apart by their order.
            same, occurrences[key] = self._numbers.get(key, []), occurrences[key] + 1
            if len(same) < occurrences[key]:
                problem = "was not among the trajectories of the first pass; they must not change"
                raise DataError(problem, self.root, place)
            number = same[occurrences[key] - 1]
            if number in todo:
                todo.discard(number)
                yield number, {camera: list(flat[camera]) for camera in cameras}
        if todo:
            raise DataError(
                f"{len(todo)} trajectories of the first pass did not come again", self.root
            )

    @property
    def features(self) -> Mapping[str, Feature]:
        return self._features

    @property
    def cameras(self) -> list[str]:
        return sorted(path for path, f in self._features.items() if f.kind == "image")

    @property
    def num_episodes(self) -> int:
        return len(self.starts) - 1

    def low(self, path: str) -> np.ndarray:
        return self._columns[path]

    def text(self, path: str) -> tuple[np.ndarray, list[str]]:
        return text_codes([_text(value) for value in self._columns[path].tolist()])

    def read(self, camera: str, first: int, last: int) -> Sequence[Frame]:
        raise DataError("images of given trajectories cannot be read at random", *self.place(first))

    def place(self, frame: int) -> tuple[Path, int, int]:
        number, step = find_place(self.starts, frame)
        return self.root, int(self.numbers[number]), step


def _steps(trajectories: Given) -> Iterator[Mapping[str, Any]]:
    # An iterator is used up by the first pass.
    if iter(trajectories) is trajectories:
        raise DataError("given trajectories must be iterable more than once, not an iterator")
    numpy_iterator = getattr(trajectories, "as_numpy_iterator", None)  # of tf.data, so of dlimp
    return numpy_iterator() if numpy_iterator else iter(trajectories)


def _flat(trajectory: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Path -> [t, ...]; what has no steps is left out."""
    columns = {}
    for path, leaf in flatten(trajectory).items():
        values = leaf.numpy() if hasattr(leaf, "numpy") else leaf
        # As objects: numpy's own byte strings lose the zeros at an image's end.
        ragged = (
            isinstance(values, (list, tuple)) and values and isinstance(values[0], (bytes, str))
        )
        array = np.array(values, object) if ragged else np.asarray(values)
        array = array.astype(object) if array.dtype.kind in "SU" else array
        if array.ndim:
            columns[path if path.startswith(STEPS) else STEPS + path] = array
    return columns


def _features(flat: Mapping[str, np.ndarray]) -> dict[str, Feature]:
    features = {}
    for path, values in flat.items():
        if values.dtype == object:
            sample = next((v for v in values.tolist() if len(v)), b"")
            if isinstance(sample, bytes) and sample[:2] in _ENCODED:
                features[path] = Feature("image", (*image_size(sample), 3), "uint8", "")
            elif isinstance(sample, bytes) and not _is_text(sample):
                features[path] = Feature("tensor", (), "object")  # numbers as bytes, such as kuka's
            else:
                features[path] = Feature("text")
        elif values.dtype == np.uint8 and values.ndim == 4 and values.shape[3] == 3:
            features[path] = Feature("image", values.shape[1:], "uint8", "")
        else:
            features[path] = Feature("tensor", values.shape[1:], values.dtype.name)
    return features


def _is_like(values: np.ndarray, reference: Feature) -> bool:
    """Whether values are of the kind and shape that the first trajectory's are."""
    # Pictures may have other sizes in other trajectories; they are resized when drawn.
    if reference.kind == "image" and values.dtype != object:
        return values.dtype == np.uint8 and values.ndim == 4 and values.shape[3] == 3
    if values.dtype == object:
        return values.ndim == 1 and (reference.kind != "tensor" or reference.dtype == "object")
    numbers = reference.kind == "tensor" and reference.dtype != "object"
    return numbers and values.shape[1:] == reference.shape


def _is_text(value: bytes) -> bool:
    try:
        value.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _text(value: Any) -> str:
    return value.decode("utf-8", errors="replace") if isinstance(value, bytes) else str(value)
