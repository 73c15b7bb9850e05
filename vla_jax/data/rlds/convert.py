"""Any source as an RLDS dataset, which TFDS and our index read."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vla_jax import progress
from vla_jax.data.decode import decode, image_size
from vla_jax.data.errors import FeatureError, ImageDecodeError
from vla_jax.data.features import STEPS, Feature
from vla_jax.data.places import NamedPath
from vla_jax.data.rlds.writer import RLDSWriter, encode_image
from vla_jax.data.source import Frame, Source

log = logging.getLogger(__name__)
_WRITTEN = ("image", "tensor", "text")  # kinds of features
_READ = 32  # images read at a time, so that an episode need not fit into memory as pixels
_FLAGS = ("is_first", "is_last", "is_terminal")
# What tf.train.Example has no place for is stored as bytes.
_BY_BYTES = ("float64", "uint32", "uint64", "float16")


def write_rlds(
    sources: Mapping[str, Source],
    out: str | Path,
    name: str,
    encoding: str = "jpeg",
    description: str = "",
) -> dict[str, int]:
    """Writes every feature of every episode; returns the number of episodes of each split.

    Images that are encoded already are stored byte for byte. Pixels are encoded: as JPEG of quality
    95 without chroma subsampling, or as PNG without loss. RLDS's `is_first`, `is_last` and
    `is_terminal` are added where the source does not have them.

    Args:
        sources: split -> its episodes, opened with every number and text in `low`.
        out: version folder to make; it appears when all is written.
        name: of the dataset, lower case with underscores.
        encoding: of pixels, "jpeg" or "png".
        description: for people.

    Raises:
        DataError: of the source.
        FileExistsError: `out` exists and is not empty.
    """
    first = next(iter(sources.values()))
    stored = {path: f for path, f in first.features.items() if f.kind in _WRITTEN}
    left_out = sorted(path for path, f in first.features.items() if f.kind not in _WRITTEN)
    if left_out:
        log.warning("left out, as RLDS has no place for them here: %s", left_out)
    _check_names(stored, first.root)
    described = {path: _stored_as(path, f, first, encoding) for path, f in stored.items()}
    for flag in _FLAGS:
        described.setdefault(STEPS + flag, Feature("tensor", (), "bool"))
    counts = {}
    with RLDSWriter(out, name, described, _version(out), description) as writer:
        for split, source in sources.items():
            columns = {path: _column(source, path) for path in stored}
            for episode in progress.bar(range(source.num_episodes), desc=split, unit="episode"):
                writer.write(split, _episode(source, episode, described, columns))
            counts[split] = source.num_episodes
    return counts


def _version(out: str | Path) -> str:
    numbers = Path(out).name.split(".")
    if len(numbers) == 3 and all(number.isdigit() for number in numbers):
        return ".".join(numbers)
    return "1.0.0"


def _check_names(features: Mapping[str, Feature], root: NamedPath) -> None:
    # TFDS nests features by the slashes in their names.
    clashes = sorted(p for p in features if any(other.startswith(p + "/") for other in features))
    if clashes:
        raise FeatureError(f"cannot be a feature and a group of features: {clashes}", root)


def _stored_as(path: str, feature: Feature, source: Source, encoding: str) -> Feature:
    if feature.kind == "tensor" and feature.dtype in _BY_BYTES:
        return replace(feature, encoding="bytes")
    if feature.kind != "image":
        return feature
    # Declared sizes can be wrong, the first image cannot.
    sample = source.read(path, 0, 0)[0]
    height, width = image_size(sample)
    if feature.shape[:2] not in ((height, width), (None, None)):
        log.warning(
            "%s: declared as %s, its images are %d x %d", path, feature.shape, height, width
        )
    feature = replace(feature, shape=(height, width, 3))
    if isinstance(sample, np.ndarray):
        return replace(feature, encoding=encoding)
    return replace(feature, encoding="png" if bytes(sample[:4]) == b"\x89PNG" else "jpeg")


def _column(source: Source, path: str) -> Any:
    """Values of all frames or episodes; images are read episode by episode instead."""
    feature = source.features[path]
    if feature.kind == "image":
        return None
    if feature.kind == "text":
        codes, table = source.text(path)
        return np.array([text.encode() for text in table], object)[codes]
    return source.low(path)


def _episode(
    source: Source, episode: int, described: Mapping[str, Feature], columns: Mapping[str, Any]
) -> dict[str, Any]:
    first, stop = int(source.starts[episode]), int(source.starts[episode + 1])
    encoded: dict[str, Any] = {}
    for path, feature in described.items():
        # Only flags that the source lacks have no column.
        if path not in columns:
            # A recording says nothing about why it ended, so its last step is the terminal one.
            encoded[path] = np.arange(first, stop) == (
                first if path.endswith("first") else stop - 1
            )
        elif feature.kind == "image":
            encoded[path] = _images(source, path, first, stop, feature)
        else:
            values = columns[path]
            encoded[path] = values[first:stop] if path.startswith(STEPS) else values[episode]
    return encoded


def _images(source: Source, path: str, first: int, stop: int, feature: Feature) -> list[bytes]:
    images = []
    for begin in range(first, stop, _READ):
        for frame in source.read(path, begin, min(begin + _READ, stop) - 1):
            try:
                images.append(_encoded(frame, feature))
            except ValueError as error:
                problem = getattr(error, "problem", str(error))
                place = source.place(first + len(images))
                raise ImageDecodeError(f"{path!r}: {problem}", *place) from error
    return images


def _encoded(frame: Frame, feature: Feature) -> bytes:
    if isinstance(frame, np.ndarray):
        return encode_image(frame, feature)
    data = bytes(frame)
    if data[:2] == b"\xff\xd8" or data[:4] == b"\x89PNG":
        decode(data)  # what is no picture would make a dataset that nobody can read
        return data
    return encode_image(decode(data), feature)  # TIFF and others, which TFDS does not read
