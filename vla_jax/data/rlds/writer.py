"""Writes RLDS datasets that TFDS (`builder_from_directory`) and our index read; no TensorFlow."""

import io
import json
import os
import shutil
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

from vla_jax.data.errors import FeatureError
from vla_jax.data.features import STEPS, Feature, to_json
from vla_jax.data.rlds import records
from vla_jax.rules import flatten


class RLDSWriter:
    """Writes episodes into TFRecord shards; a context manager.

    Everything goes into a folder beside the target, which takes its place when the writer closes
    without an error. Shards are cut by size, so an episode is all that is held in memory.
    """

    def __init__(
        self,
        directory: str | Path,
        name: str,
        features: Mapping[str, Any],
        version: str = "1.0.0",
        description: str = "",
        shard_bytes: int = 256 << 20,
    ):
        """Prepares to write.

        Args:
            directory: the version folder to make, such as `data/my_robot/1.0.0`; what
                `data.datasets[].dir` will name.
            name: of the dataset, lower case with underscores.
            features: nested or slash-path dict of `features.image`, `tensor`, `text`; those
                recorded once a step are under `steps`, the others under `episode_metadata`.
            version: major.minor.patch.
            description: for people.
            shard_bytes: a new shard is begun when one is this large.

        Raises:
            FileExistsError: the directory exists and is not empty.
            FeatureError: no step features.
        """
        self._target = Path(directory).expanduser()
        if self._target.exists() and any(self._target.iterdir()):
            raise FileExistsError(f"{self._target} exists and is not empty")
        self._features: dict[str, Feature] = flatten(features)
        if not any(path.startswith(STEPS) for path in self._features):
            raise FeatureError("an RLDS dataset needs features under 'steps'", self._target)
        self._info = {"name": name, "version": version, "description": description}
        self._shard_bytes = shard_bytes
        # Beside the target, so that closing is one rename.
        self._work = self._target.with_name(f".{self._target.name}.{os.getpid()}")
        shutil.rmtree(self._work, ignore_errors=True)
        self._work.mkdir(parents=True)
        self._splits: dict[str, _Split] = {}

    def __enter__(self) -> "RLDSWriter":
        return self

    def __exit__(self, kind: type | None, *error: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def write(self, split: str, episode: Mapping[str, Any]) -> None:
        """Appends one episode to a split.

        Args:
            split: such as "train" or "val".
            episode: {"steps": {path: [t, ...]}, "episode_metadata": {path: value}}, nested or with
                slash paths. Images are uint8 [t, h, x, 3], or a list of t encoded images, which are
                stored as they are; a text may be one str for all steps.

        Raises:
            FeatureError: listing features that are missing, unknown, or of the wrong shape.
        """
        values = flatten(episode)
        missing, unknown = set(self._features) - set(values), set(values) - set(self._features)
        if missing or unknown:
            problem = f"missing features {sorted(missing)}, unknown features {sorted(unknown)}"
            raise FeatureError(problem, self._target)
        # A text that is one str serves all steps and has no length of its own.
        lengths = {
            path: len(values[path])
            for path in self._features
            if path.startswith(STEPS) and not isinstance(values[path], str)
        }
        if len(set(lengths.values())) != 1 or not next(iter(lengths.values()), 0):
            raise FeatureError(f"steps of unequal or no length: {lengths}", self._target)
        steps = next(iter(lengths.values()))
        fields, problems = {}, []
        for path, feature in self._features.items():
            per_step = path.startswith(STEPS)
            try:
                fields[path] = _encode(values[path], feature, steps if per_step else None)
            except (ValueError, TypeError) as error:
                problems.append(f"{path}: {error}")
        if problems:
            raise FeatureError("\n  ".join(["cannot be written:", *problems]), self._target)
        if split not in self._splits:
            self._splits[split] = _Split(self._work, split, self._shard_bytes)
        # Encoded in full before anything is written, so a faulty episode leaves no trace.
        self._splits[split].append(records.build_example(fields))

    def close(self) -> None:
        """Finishes the dataset and puts it in place."""
        described = []
        for split in self._splits.values():
            described.append(split.close(self._info["name"]))
        info = {**self._info, "fileFormat": "tfrecord", "splits": described}
        (self._work / "features.json").write_text(to_json(self._features), encoding="utf-8")
        text = json.dumps(info, indent=2)
        (self._work / "dataset_info.json").write_text(text, encoding="utf-8")
        if self._target.exists():
            # It was empty at first; if files have come since, this raises and keeps them.
            self._target.rmdir()
        os.replace(self._work, self._target)

    def abort(self) -> None:
        """Drops everything written."""
        for split in self._splits.values():
            split.abort()
        shutil.rmtree(self._work, ignore_errors=True)


class _Split:
    """The shards of one split; numbered while they are written, named when their count is known."""

    def __init__(self, folder: Path, name: str, shard_bytes: int):
        self._folder, self._name, self._limit = folder, name, shard_bytes
        self._lengths: list[int] = []
        self._bytes = 0
        self._file: io.BufferedWriter | None = None

    def append(self, record: bytes) -> None:
        # A shard ends behind the record that fills it, so that no record is cut in two.
        if self._file is None or self._file.tell() >= self._limit:
            self.abort()  # closes the shard before
            path = self._folder / f"{self._name}.{len(self._lengths)}"
            self._file = open(path, "wb")  # noqa: SIM115 - closed by the next shard or the end
            self._lengths.append(0)
        self._file.write(records.frame_record(record))
        self._lengths[-1] += 1
        self._bytes += len(record)

    def abort(self) -> None:
        if self._file is not None:
            self._file.close()

    def close(self, dataset: str) -> dict[str, Any]:
        self.abort()  # closes the last shard
        for i in range(len(self._lengths)):
            final = f"{dataset}-{self._name}.tfrecord-{i:05d}-of-{len(self._lengths):05d}"
            os.replace(self._folder / f"{self._name}.{i}", self._folder / final)
        return {
            "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            "name": self._name,
            # Numbers are texts here, as protobuf writes 64-bit ones to JSON.
            "numBytes": str(self._bytes),
            "shardLengths": [str(n) for n in self._lengths],
        }


def _encode(value: Any, feature: Feature, steps: int | None) -> tuple[int, Any]:
    """One feature of one episode as (kind, values) of `records.build_example`."""
    # What is recorded once an episode is one row.
    rows = 1 if steps is None else steps
    if feature.kind == "text":
        texts = [value] * rows if isinstance(value, (str, bytes)) else list(value)
        return records.BYTES, [t if isinstance(t, bytes) else str(t).encode() for t in texts]
    if feature.kind == "image":
        frames = [value] if steps is None else value
        return records.BYTES, _encode_images(frames, feature)
    array = np.asarray(value)
    shape = feature.shape if steps is None else (rows, *feature.shape)
    if array.shape != shape:
        raise ValueError(f"has shape {array.shape}, should have {shape}")
    # A float64 may become a float32, but no fraction a whole number.
    array = array.astype(feature.dtype, casting="same_kind")
    if feature.encoding in ("bytes", "zlib"):
        blobs = [row.tobytes() for row in array.reshape(rows, -1)]
        return records.BYTES, [
            zlib.compress(b) for b in blobs
        ] if feature.encoding == "zlib" else blobs
    floating = np.issubdtype(array.dtype, np.floating)
    return (records.FLOAT if floating else records.INT), array.reshape(-1)


def _encode_images(frames: Sequence[Any] | np.ndarray, feature: Feature) -> list[bytes]:
    return [
        bytes(frame) if isinstance(frame, (bytes, memoryview)) else encode_image(frame, feature)
        for frame in frames
    ]


def encode_image(frame: Any, feature: Feature) -> bytes:
    """Pixels [h, x, 3] as PNG where `feature.encoding` says so, else as JPEG (95, 4:4:4).

    Raises:
        ValueError: they are not uint8, or not of the feature's shape.
    """
    pixels = np.ascontiguousarray(frame)
    wrong = [a != b for a, b in zip(pixels.shape, feature.shape, strict=True) if b is not None]
    if pixels.dtype != np.uint8 or any(wrong):
        raise ValueError(f"an image is {pixels.dtype} {pixels.shape}, not {feature.shape}")
    return _png(pixels) if feature.encoding == "png" else _jpeg(pixels)


def _jpeg(pixels: np.ndarray) -> bytes:
    return simplejpeg.encode_jpeg(pixels, quality=95, colorsubsampling="444")


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
