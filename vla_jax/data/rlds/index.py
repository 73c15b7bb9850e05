"""A byte index over the shards of an RLDS dataset: random access without conversion.

One pass over the shards records where every encoded frame of every camera lies, and copies the
low-dimensional features that are asked for. Afterwards a window of frames is one `pread` (of
TFRecord; see `vla_jax.data.rlds.containers`), and low-dimensional data are memory-mapped arrays.

On disk, in a folder beside the data or in a cache folder:

    index.json          digest, shards, features, and which array holds what
    starts.npy          int64 [e+1]   first frame of each episode, and the total
    shard.npy           int32 [e]     shard of each episode
    number.npy          int32 [e]     number of each episode within its shard
    camera_<i>_at.npy   int64 [n]     byte offset of each frame in its shard, or record
    camera_<i>_size.npy int32 [n]     its length in bytes; 0 = no image
    low_<i>.npy         [n, ...] or [e, ...]; text as int32 codes into a table in index.json
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vla_jax.data.cache import SKIPPED, cached_folder, content_of, map_array
from vla_jax.data.errors import DataError, EmptyTrajectoryError, FeatureError
from vla_jax.data.features import STEPS, Feature, load_features
from vla_jax.data.places import (
    DataPath,
    NamedPath,
    data_path,
    is_remote,
    stamps,
    unchanged,
)
from vla_jax.data.rlds.build_index import Skipped, as_error, index_shards
from vla_jax.data.rlds.containers import CONTAINERS, Container, FileParts
from vla_jax.data.source import find_place
from vla_jax.files import problem_of

FORMAT = 2  # of the meaning of the numbers; part of the digest
_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"  # TFDS's default
_FILES = "files"  # in index.json: shard -> its stamp, and a fingerprint of its content


class RLDSIndex:
    """An opened index: where the frames are, and the low-dimensional arrays.

    Attributes:
        name: the dataset's own name, from dataset_info.json.
        split: the split it covers.
        digest: of shard names and sizes and the features read; independent of where they lie.
        content: a digest of all arrays of the index.
        features: every feature of the dataset, {path: Feature}.
        starts: int64 [e+1], first frame of each episode; the last entry is the number of frames.
        shard: int32 [e], number of each episode's shard.
        number: int32 [e], number of each episode within its shard.
        root: folder of the shards.
        numbers: int64 [e], number of each episode within the split as it was recorded.
        every: the numbers of all episodes the split is said to have.
        skipped: what is wrong with the episodes that were left out, and how many each concerns.
    """

    def __init__(self, folder: Path, directory: NamedPath, features: dict[str, Feature]):
        """Opens the finished index in `folder` of the dataset in `directory`; see `open_index`."""
        meta = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        self.name, self.split, self.digest = meta["name"], meta["split"], meta["digest"]
        self.features, self.root = features, directory
        self.content = content_of(meta)
        self.shards = [directory / name for name in meta["shards"]]
        self.starts: np.ndarray = np.load(folder / "starts.npy")
        self.shard: np.ndarray = np.load(folder / "shard.npy")
        self.number: np.ndarray = np.load(folder / "number.npy")
        self.skipped: list[tuple[DataError, int]] = [
            (as_error(entry, directory), entry.count)
            for entry in (Skipped(*values) for values in meta[SKIPPED])
        ]
        # As recorded: what was left out counts.
        before = np.cumsum([0, *meta["lengths"]])  # episodes in the shards before each one
        self.numbers: np.ndarray = before[self.shard] + self.number
        self.every: range | None = range(int(before[-1]))
        self._meta, self._folder = meta, folder
        self._cameras = {
            path: (map_array(folder / f"{stem}_at.npy"), map_array(folder / f"{stem}_size.npy"))
            for path, stem in meta["cameras"].items()
        }
        self._parts = CONTAINERS[meta.get("container", "tfrecord")].parts()

    @property
    def cameras(self) -> list[str]:
        """Paths of the image features."""
        return sorted(self._cameras)

    @property
    def num_episodes(self) -> int:
        """Number of episodes."""
        return len(self.starts) - 1

    def low(self, path: str) -> np.ndarray:
        """A numeric feature, memory-mapped: [n, ...] over all frames, or [e, ...] over episodes."""
        return map_array(self._folder / f"{self._meta['low'][path]}.npy")

    def text(self, path: str) -> tuple[np.ndarray, list[str]]:
        """A text feature: int32 codes over all frames (or episodes), and the table they index."""
        return self.low(path), self._meta["tables"][path]

    def fetch(self, spans: Sequence[tuple[str, int, int]]) -> None:
        """See `vla_jax.data.source.Fetching`; on a disk there is nothing to gain."""
        if isinstance(self._parts, FileParts) and is_remote(self.root):
            places = [self._bytes(*span) for span in spans]
            self._parts.fetch([(path, begin, end) for path, _, begin, end in places])

    def _bytes(self, camera: str, first: int, last: int) -> tuple[Any, int, int, int]:
        """Frames of one episode: shard, episode within it, first byte, the one after the last."""
        at, size = self._cameras[camera]
        episode = int(np.searchsorted(self.starts, first, side="right")) - 1
        path, number = self.shards[self.shard[episode]], int(self.number[episode])
        # Within a record the frames of one camera lie back to back.
        return path, number, int(at[first]), int(at[last]) + int(size[last])

    def read(self, camera: str, first: int, last: int) -> list[memoryview]:
        """Encoded images of frames `first`..`last` (inclusive, one episode) with one read.

        Frames are numbered over the whole split. An empty view means: no image.
        """
        at, size = self._cameras[camera]
        path, record, begin, end = self._bytes(camera, first, last)
        try:
            data = self._parts.read(path, record, begin, end)
        except DataError as error:
            path, number, frame = self.place(first)
            raise type(error)(error.problem, path, number, frame) from error
        except OSError as error:
            path, number, frame = self.place(first)
            raise DataError(f"cannot be read: {error.strerror}", path, number, frame) from error
        if len(data) < end - begin:
            path, number, frame = self.place(first)
            raise DataError(
                "the shard has become shorter since it was indexed", path, number, frame
            )
        views = []
        for frame in range(first, last + 1):
            start = int(at[frame]) - begin
            views.append(data[start : start + int(size[frame])])
        return views

    def place(self, frame: int) -> tuple[NamedPath, int, int]:
        """(shard file, episode within it, frame within the episode) of a frame, for messages."""
        episode, step = find_place(self.starts, frame)
        shard = int(self.shard[episode])
        return self.shards[shard], int(self.number[episode]), step


def split_names(directory: DataPath) -> list[str]:
    """Splits of the dataset in `directory`, as dataset_info.json lists them."""
    return [split["name"] for split in _dataset_info(directory)["splits"]]


def open_index(
    directory: str | DataPath,
    split: str,
    low: Sequence[str] = (),
    cache_dir: str = "",
    rebuild: bool = False,
    check_crc: bool = False,
    skip: bool = False,
) -> RLDSIndex:
    """Opens the index of one split, building it first where there is none that fits.

    Args:
        directory: version folder, or its URL, with dataset_info.json, features.json and the shards.
        split: TFDS split name.
        low: paths of the numeric and text features to copy, such as `steps/action`.
        cache_dir: where indices live; "" = beside the data if that may be written, else
            ~/.cache/vla_jax.
        rebuild: make it anew even if one fits.
        check_crc: verify every record's checksum while building.
        skip: while building, leave episodes out that are wrong; `RLDSIndex.skipped` lists them.

    Raises:
        DataError: with file, episode and frame; see `vla_jax.data.errors`.
    """
    directory = data_path(directory)
    info, features = _dataset_info(directory), load_features(directory / "features.json")
    shards = _shard_names(directory, info, split)
    container = CONTAINERS[info["format"]]
    missing = [path for path in low if path not in features]
    if missing:
        raise FeatureError(f"no such feature: {missing}; it has {sorted(features)}", directory)
    # The order and repeats of a request must not change the digest.
    low = sorted(set(low))
    digest = _digest(directory, info, split, shards, features, low)
    name = f"{info['name']}-{info['version']}-{split}-{digest[:16]}"

    # The stamps are taken before the pass, so a shard that changes meanwhile is noticed.
    def build(folder: Path) -> dict:
        stamped = _stamped(directory, list(shards), container)
        meta = index_shards(
            folder, directory, shards, features, low, check_crc, skip, container.scan
        )
        origin = {"name": info["name"], "split": split, "container": info["format"]}
        return meta | origin | {"digest": digest, _FILES: stamped}

    def renew(meta: dict) -> dict | None:
        renewed = {}
        # dataset_info.json may have been corrected since.
        if meta["lengths"] != list(shards.values()):
            return None
        current = stamps([directory / path for path in meta[_FILES]])
        for (path, (then, content)), stamp in zip(meta[_FILES].items(), current, strict=True):
            # A copied or touched shard has another stamp and the same content.
            if not unchanged(then, stamp) and (
                is_remote(directory) or _fingerprint(container, directory / path) != content
            ):
                return None
            renewed[path] = [stamp, content]
        return meta | {_FILES: renewed}

    folder = cached_folder(directory, cache_dir, name, rebuild, build, skip, renew)
    return RLDSIndex(folder, directory, features)


def _stamped(directory: DataPath, shards: Sequence[str], container: Container) -> dict[str, list]:
    """Shard -> its stamp, and a fingerprint of its content."""
    current = stamps([directory / path for path in shards])
    prints = [_fingerprint(container, directory / path) for path in shards]
    return {path: [*pair] for path, *pair in zip(shards, current, prints, strict=True)}


def _fingerprint(container: Container, path: DataPath) -> str:
    # It would take a request for every record; a store has a word of its own for the version.
    if is_remote(path):
        return ""
    try:
        return container.fingerprint(path)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", path) from error


def _dataset_info(directory: DataPath) -> dict:
    path = directory / "dataset_info.json"
    try:
        # Some editors put a byte-order mark in front, which JSON does not allow.
        info = json.loads(path.read_text(encoding="utf-8-sig"))
        splits = [
            {
                "name": str(split["name"]),
                "lengths": [int(n) for n in split.get("shardLengths", ())],
                "template": str(split.get("filepathTemplate") or _TEMPLATE),
            }
            for split in info["splits"]
        ]
        described = {"name": str(info["name"]), "version": str(info["version"]), "splits": splits}
        return described | {"format": str(info.get("fileFormat", "tfrecord"))}
    # Most likely the folder above the version was named.
    except FileNotFoundError:
        below = sorted(str(p.parent) for p in directory.glob("*/dataset_info.json"))
        below += sorted(str(p.parent) for p in directory.glob("*/*/dataset_info.json"))
        hint = f"; did you mean one of {below}?" if below else ""
        raise DataError(
            f"no dataset_info.json here: not a TFDS version folder{hint}", directory
        ) from None
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", path) from error
    except (KeyError, ValueError, TypeError, OverflowError, AttributeError) as error:
        problem = problem_of(path, f"not a TFDS dataset_info.json ({error!r})")
        raise DataError(problem, path) from error


def _shard_names(directory: DataPath, info: dict, split: str) -> dict[str, int]:
    """Shard file -> number of episodes, in order."""
    splits = {s["name"]: s for s in info["splits"]}
    if split not in splits:
        raise DataError(f"no split {split!r}; it has {sorted(splits)}", directory)
    if info["format"] not in CONTAINERS:
        problem = f"shards are {info['format']!r}; the index reads {', '.join(CONTAINERS)}"
        raise DataError(problem, directory)
    lengths, names = splits[split]["lengths"], {}
    for i, length in enumerate(lengths):
        try:
            name = splits[split]["template"].format(
                DATASET=info["name"],
                SPLIT=split,
                FILEFORMAT=info["format"],
                SHARD_INDEX=f"{i:05d}",
                NUM_SHARDS=f"{len(lengths):05d}",
                SHARD_X_OF_Y=f"{i:05d}-of-{len(lengths):05d}",
            )
        except (LookupError, ValueError, AttributeError) as error:
            problem = f"split {split!r}: not a template of file names ({error!r})"
            raise DataError(problem, directory / "dataset_info.json") from error
        names[name] = length
    # A template that gives two shards one name loses one of them.
    if len(names) < len(lengths) or any(length < 0 for length in lengths):
        problem = f"split {split!r}: shards without a name or a number of their own"
        raise DataError(problem, directory / "dataset_info.json")
    present = stamps([directory / name for name in names])
    absent = [name for name, is_there in zip(names, present, strict=True) if not is_there]
    if absent:
        raise DataError(
            f"{len(absent)} of {len(names)} shards are missing: {absent[:5]}", directory
        )
    if not sum(lengths):
        # Its shards may be there all the same: the earliest releases of TFDS wrote no lengths.
        why = "" if lengths else ": dataset_info.json gives no shardLengths for it"
        raise EmptyTrajectoryError(f"split {split!r} has no episodes{why}", directory)
    return names


def _digest(directory: DataPath, info: dict, split: str, shards, features, low) -> str:
    current = stamps([directory / name for name in shards])
    sizes = sorted((name, size) for name, (size, *_) in zip(shards, current, strict=True))
    cameras = sorted(p for p, f in features.items() if f.kind == "image" and p.startswith(STEPS))
    # How a feature is described decides how its bytes are read.
    read = [(path, repr(features[path])) for path in [*cameras, *low]]
    identity = [FORMAT, info["name"], info["version"], split, sizes, read]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()
