"""What a LeRobot dataset says about itself: v2.0 and v2.1 in JSON lines, v3.0 in parquet.

    v2   data/chunk-000/episode_000000.parquet      videos/chunk-000/KEY/episode_000000.mp4
         meta/{info.json, episodes.jsonl, tasks.jsonl}
    v3   data/chunk-000/file-000.parquet            videos/KEY/chunk-000/file-000.mp4
         meta/{info.json, tasks.parquet, episodes/chunk-000/file-000.parquet}

A file of v3 holds many episodes. info.json gives the paths as templates; the ones above are the
usual ones. Source: lerobot/datasets of github.com/huggingface/lerobot.
"""

import contextlib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vla_jax.data.errors import (
    CorruptRecordError,
    DataError,
    EmptyTrajectoryError,
    FeatureError,
    TruncatedShardError,
)
from vla_jax.data.features import STEPS, Feature
from vla_jax.shipped import install_hint

log = logging.getLogger(__name__)
VERSIONS = ("v2.0", "v2.1", "v3.0")
LANGUAGE = STEPS + "language_instruction"  # the text of `task_index`
_MAGIC = b"PAR1"  # at both ends of a parquet file
_NUMBERS = (
    "bool", "uint8", "int8", "int16", "uint16", "int32", "uint32", "int64", "uint64",
    "float16", "float32", "float64",
)  # fmt: skip


class Episode(NamedTuple):
    """Where one episode lies.

    Attributes:
        number: `episode_index`.
        length: frames.
        data: parquet file.
        row: its first row there.
        videos: camera key -> (file, time of its first frame there in s).
    """

    number: int
    length: int
    data: Path
    row: int
    videos: Mapping[str, tuple[Path, float]]


class Info:
    """meta/info.json, checked.

    Attributes:
        folder: of the dataset.
        raw: all of it.
        version: one of `VERSIONS`.
        fps: frames in 1/s.
        keys: path of a feature -> its name in the dataset.
        features: path -> what it is.
        videos: paths of the cameras that are videos.
    """

    def __init__(self, folder: Path):
        """Reads it.

        Raises:
            DataError: it is missing, or of a version that is not read.
        """
        self._path = path = folder / "meta" / "info.json"
        self.folder, self.raw = folder, _json(path)
        with _understood(path, "a LeRobot info.json"):
            self.version, self.fps = str(self.raw["codebase_version"]), float(self.raw["fps"])
            described: dict[str, Any] = dict(self.raw["features"])
            self._data_path, self._video_path = self.raw["data_path"], self.raw.get("video_path")
            if self.version not in VERSIONS:
                raise DataError(f"is of version {self.version}; read are {list(VERSIONS)}", path)
            self.keys = _paths(described)
            self.features = {p: _feature(described[key]) for p, key in self.keys.items()}
            self.videos = [p for p, key in self.keys.items() if described[key]["dtype"] == "video"]
        self.features.setdefault(LANGUAGE, Feature("text"))

    def splits(self) -> dict[str, range]:
        """Split -> which episodes."""
        total = int(self.raw.get("total_episodes", 0))
        found = {}
        for name, text in (self.raw.get("splits") or {"train": f"0:{total}"}).items():
            first, _, stop = str(text).partition(":")
            with _understood(self._path, f"FIRST:STOP, the split {name!r} is {text!r}"):
                found[name] = range(int(first or 0), int(stop or total))
        return found

    def tasks(self) -> dict[int, str]:
        """`task_index` -> text."""
        folder = self.folder / "meta"
        if self.version != "v3.0":
            path = folder / "tasks.jsonl"
            with _understood(path, "a list of tasks"):
                return {int(row["task_index"]): str(row["task"]) for row in _json_lines(path)}
        path = folder / "tasks.parquet"
        with _understood(path, "a list of tasks"):
            table = read_table(path).to_pydict()
            numbers = table.pop("task_index")
            # pandas' index column, which has a name or not.
            texts = table.get("task") or next(iter(table.values()))
            return {int(number): str(text) for number, text in zip(numbers, texts, strict=True)}

    def episodes(self, split: str) -> tuple[list[Episode], list[tuple[DataError, int]]]:
        """The sound episodes of a split, in order, and what is wrong with how many others.

        Raises:
            DataError: no such split, or meta is unsound.
        """
        splits = self.splits()
        if split not in splits:
            raise DataError(f"no split {split!r}; it has {sorted(splits)}", self.folder)
        meta = self.folder / "meta"
        with _understood(meta, "a list of episodes"):
            every = self._v3() if self.version == "v3.0" else self._v2()
        counts = Counter(episode.number for episode in every)
        twice = sorted(number for number, count in counts.items() if count > 1)
        if twice:
            raise DataError(f"names episodes more than once: {twice[:5]}", meta)
        outside = sorted(n for n in counts if not any(n in part for part in splits.values()))
        if outside:
            log.warning("%s: %d episodes are in no split: %s", meta, len(outside), outside[:5])
        wrong: list[tuple[DataError, int]] = []
        lacking = [number for number in splits[split] if number not in counts]
        if lacking:
            problem = f"lacks {len(lacking)} of the {len(splits[split])} episodes of {split!r}"
            wrong.append((TruncatedShardError(problem, meta, lacking[0]), len(lacking)))
        found = []
        for episode in every:
            if episode.number not in splits[split]:
                continue
            error = _unsound(episode)
            if error is None:
                found.append(episode)
            else:
                wrong.append((error, 1))
        if not found and not wrong:
            raise DataError(f"split {split!r} has no episodes", self.folder)
        return found, wrong

    def _v2(self) -> list[Episode]:
        chunk = int(self.raw.get("chunks_size", 1000))
        found = []
        for row in _json_lines(self.folder / "meta" / "episodes.jsonl"):
            number, length = int(row["episode_index"]), int(row["length"])
            names = {"episode_index": number, "episode_chunk": number // chunk}
            videos = {key: (self._video(key, names), 0.0) for key in self._video_keys()}
            data = self.folder / self._data_path.format(**names)
            found.append(Episode(number, length, data, 0, videos))
        return sorted(found)

    def _v3(self) -> list[Episode]:
        paths = sorted((self.folder / "meta" / "episodes").glob("*/*.parquet"))
        if not paths:
            raise DataError("no */*.parquet", self.folder / "meta" / "episodes")
        columns = ["episode_index", "length", "data/chunk_index", "data/file_index"]
        for key in self._video_keys():
            columns += [
                f"videos/{key}/{c}" for c in ("chunk_index", "file_index", "from_timestamp")
            ]
        found, rows = [], {}
        tables = [read_table(path, columns).to_pylist() for path in paths]
        for row in sorted((r for t in tables for r in t), key=lambda r: r["episode_index"]):
            data = self.folder / self._data_path.format(**_names(row, "data"))
            videos = {
                key: (
                    self._video(key, _names(row, f"videos/{key}")),
                    float(row[f"videos/{key}/from_timestamp"]),
                )
                for key in self._video_keys()
            }
            first = rows.get(data, 0)
            rows[data] = first + row["length"]
            found.append(Episode(row["episode_index"], row["length"], data, first, videos))
        return found

    def _video_keys(self) -> list[str]:
        return [self.keys[path] for path in self.videos]

    def _video(self, key: str, names: Mapping[str, int]) -> Path:
        if not self._video_path:
            raise DataError(f"{key!r} is a video, but there is no video_path", self.folder)
        return self.folder / self._video_path.format(video_key=key, **names)


def _unsound(episode: Episode) -> DataError | None:
    if episode.length < 1:
        return EmptyTrajectoryError("the episode has no steps", episode.data, episode.number)
    for path in (episode.data, *(path for path, _ in episode.videos.values())):
        if not path.exists():
            return DataError("the file is missing", path, episode.number)
    return None


@contextlib.contextmanager
def _understood(path: Path, what: str) -> Iterator[None]:
    """Tells of a file whose content is not as expected."""
    try:
        yield
    except DataError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"is not {what} ({error!r})", path) from error


def read_table(path: Path, columns: list[str] | None = None) -> Any:
    """A parquet file as a pyarrow table.

    Raises:
        DataError: pyarrow, the file or a column is missing, or the file is unsound.
    """
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        hint = f"LeRobot's parquet files need pyarrow: {install_hint('lerobot')}"
        raise DataError(hint, path) from error
    try:
        with parquet.ParquetFile(path) as file:
            lacking = sorted(set(columns or ()) - set(file.schema_arrow.names))
            if lacking:
                problem = f"has no columns {lacking}; it has {file.schema_arrow.names}"
                raise FeatureError(problem, path)
            return file.read(columns)
    except (OSError, arrow.ArrowException) as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: Exception) -> DataError:
    """What to tell of a parquet file that cannot be read."""
    if not path.exists():
        return DataError("the file is missing", path)
    data = path.read_bytes()
    if data[:4] == _MAGIC != data[-4:]:
        return TruncatedShardError("cannot be read: its end is missing", path)
    return CorruptRecordError(f"cannot be read: {error}", path)


def _names(row: Mapping[str, Any], of: str) -> dict[str, int]:
    return {name: int(row[f"{of}/{name}"]) for name in ("chunk_index", "file_index")}


def _paths(described: Mapping[str, Any]) -> dict[str, str]:
    """Path -> key: dots become slashes, but below a key that is a feature itself underscores."""
    found: dict[str, str] = {}
    path_of: dict[str, str] = {}
    for key in sorted(described, key=lambda k: k.count(".")):
        above = [k for k in path_of if key.startswith(k + ".")]
        parent = max(above, key=len, default="")
        rest = key[len(parent) + 1 :].replace(".", "_")
        path_of[key] = f"{path_of[parent]}_{rest}" if parent else STEPS + key.replace(".", "/")
        found[path_of[key]] = key
    return found


def _feature(body: Mapping[str, Any]) -> Feature:
    dtype, shape = body["dtype"], tuple(int(size) for size in body.get("shape") or ())
    if dtype in ("video", "image"):
        names = list(body.get("names") or ())
        channels_first = bool(names) and str(names[0]).startswith("channel")
        height, width = shape[1:] if channels_first else shape[:2]
        return Feature("image", (height, width, 3), "uint8", "")
    if dtype == "string":
        return Feature("text")
    if dtype in _NUMBERS:
        # One number a step is a scalar, in the files and in LeRobot's own loader.
        return Feature("tensor", () if shape == (1,) else shape, np.dtype(dtype).name)
    return Feature("other")


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot be read: {error}", path) from error


def _json_lines(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(f"cannot be read: {error}", path) from error
