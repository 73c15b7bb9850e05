"""LeRobot datasets, v2.0 to v3.0: numbers from parquet, images from videos or from parquet.

A feature `observation.images.front` has the path `steps/observation/images/front`; the text of
`task_index` is `steps/language_instruction`. Numbers are copied into memory-mapped arrays the first
time. Frames of a video are decoded one after another from the key frame before them, and images in
parquet come a whole row group (an episode) at a time: `launch/convert_data.py` pays when training.

Axis letters: e episodes, n frames.
"""

import contextlib
import functools
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vla_jax.data.cache import DONE, SKIPPED, cached_folder, map_array, run_jobs, write_columns
from vla_jax.data.errors import (
    KINDS,
    CorruptRecordError,
    DataError,
    FeatureError,
    ImageDecodeError,
    MissingCameraError,
)
from vla_jax.data.features import Feature
from vla_jax.data.lerobot.meta import LANGUAGE, Episode, Info, read_table, unreadable
from vla_jax.data.lerobot.video import VideoFrames
from vla_jax.data.source import find_place, text_codes

FORMAT = 3  # of the copied numbers; part of the digest
_PARALLEL_FILES = 2000  # below this, starting processes costs more than it saves
_IMAGE_GROUPS = 4  # row groups of images kept in memory
_GROUPS = 4096  # files whose row groups are known
_TIME = "timestamp of the videos"  # not the path of a feature
_SCALAR = Feature("tensor", (), "")


def split_names(folder: Path) -> list[str]:
    """The splits in info.json, mostly "train" alone."""
    return list(Info(folder).splits())


def features(folder: Path) -> dict[str, Feature]:
    """Every feature of the dataset in `folder`."""
    return Info(folder).features


def open_lerobot(
    folder: str | Path,
    split: str,
    low: Sequence[str] = (),
    cache_dir: str = "",
    rebuild: bool = False,
    skip: bool = False,
) -> "LeRobotSource":
    """Opens one split; the first time, copies the numbers that are asked for.

    Args:
        folder: holds `meta`, `data` and mostly `videos`.
        split: of info.json.
        low: paths of numbers and texts, such as `steps/action`.
        cache_dir: where the copies live; see `cached_folder`.
        rebuild: copy anew.
        skip: leave out episodes whose files are missing or unsound, with all others of an unsound
            parquet file; `LeRobotSource.skipped` lists them.

    Raises:
        DataError: a file, a codec or a package that is missing; an unsound file.
    """
    folder = Path(folder).expanduser()
    info = Info(folder)
    missing = sorted(set(low) - set(info.features))
    if missing:
        raise FeatureError(f"no such feature: {missing}; it has {sorted(info.features)}", folder)
    return LeRobotSource(info, split, low, cache_dir, rebuild, skip)


class LeRobotSource:
    """See `vla_jax.data.source.Source`; made by `open_lerobot`."""

    def __init__(
        self,
        info: Info,
        split: str,
        low: Sequence[str],
        cache_dir: str,
        rebuild: bool,
        skip: bool,
    ):
        """Finds the episodes; see `open_lerobot`."""
        self.root, self.features, self._info = info.folder, info.features, info
        self.name = info.folder.name.lower().replace("-", "_")
        wanted = {path: (info.keys[path], info.features[path]) for path in low if path in info.keys}
        if LANGUAGE in low and LANGUAGE not in info.keys:
            wanted[LANGUAGE] = ("task_index", _SCALAR)
        if info.videos:
            wanted[_TIME] = ("timestamp", _SCALAR)
        wanted = dict(sorted(wanted.items()))
        by_file: dict[Path, list[Episode]] = {}
        sound, self.skipped = info.episodes(split)
        if self.skipped and not (skip and sound):
            raise self.skipped[0][0]
        for episode in sound:
            by_file.setdefault(episode.data, []).append(episode)
        by_number = wanted.get(LANGUAGE, ("",))[0] == "task_index"
        tasks = info.tasks() if by_number else {}
        columns = [[path, key] for path, (key, _) in wanted.items()]
        lengths = [e.length for part in by_file.values() for e in part]
        identity = [FORMAT, info.version, info.fps, split, lengths, columns, _sizes(info, by_file)]
        self.digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        stems = {path: f"low_{i}" for i, path in enumerate(wanted)}

        def build(folder: Path) -> None:
            tables: dict[str, dict[str, int]] = {}
            unsound: list[tuple[str, str, str, int]] = []
            known = frozenset(tasks) if by_number else None
            jobs = [(path, part, wanted, known, skip) for path, part in by_file.items()]

            def parts() -> Iterator[dict[str, np.ndarray]]:
                for job, found in zip(
                    jobs, run_jobs(_copy_low, jobs, len(jobs) >= _PARALLEL_FILES), strict=True
                ):
                    if isinstance(found, DataError):
                        where = str(job[0].relative_to(info.folder))
                        kind = type(found).__name__
                        unsound.append((where, kind, found.problem, found.episode))
                    else:
                        yield {stems[p]: v for p, v in _with_codes(found, tables).items()}

            write_columns(folder, parts())
            if by_number and len(unsound) < len(jobs):
                tables[LANGUAGE] = _code_tasks(folder / f"{stems[LANGUAGE]}.npy", tasks)
            meta = {"tables": {p: list(table) for p, table in tables.items()}, SKIPPED: unsound}
            (folder / DONE).write_text(json.dumps(meta), encoding="utf-8")

        name = f"lerobot-{split}-{self.digest[:16]}"
        folder = cached_folder(info.folder, cache_dir, name, rebuild, build, skip)
        meta = json.loads((folder / DONE).read_text(encoding="utf-8"))
        self._tables: dict[str, list[str]] = meta["tables"]
        for where, kind, problem, episode in meta[SKIPPED]:
            lost = len(by_file.pop(info.folder / where))
            self.skipped.append((KINDS[kind](problem, info.folder / where, episode), lost))
        if not by_file:
            raise self.skipped[0][0]
        self._episodes = [e for part in by_file.values() for e in part]
        self.starts = np.cumsum([0, *(e.length for e in self._episodes)])
        self._copies = {path: map_array(folder / f"{stem}.npy") for path, stem in stems.items()}
        self._videos = VideoFrames(info.fps)
        self._groups = functools.lru_cache(_GROUPS)(_row_groups)
        self._images = functools.lru_cache(_IMAGE_GROUPS)(_image_group)

    @property
    def cameras(self) -> list[str]:
        """Paths of the image features."""
        return sorted(path for path, f in self.features.items() if f.kind == "image")

    @property
    def num_episodes(self) -> int:
        """Episodes of the split."""
        return len(self._episodes)

    def low(self, path: str) -> np.ndarray:
        """A numeric feature over all frames, memory-mapped."""
        return self._copies[path]

    def text(self, path: str) -> tuple[np.ndarray, list[str]]:
        """Codes and table of a text feature."""
        return self._copies[path], self._tables[path]

    def read(self, camera: str, first: int, last: int) -> list[np.ndarray] | list[bytes]:
        """Frames `first`..`last`, inclusive, of one episode: pixels, or as encoded in parquet."""
        number, step = find_place(self.starts, first)
        episode, key = self._episodes[number], self._info.keys[camera]
        try:
            if camera in self._info.videos:
                path, begin = episode.videos[key]
                times = begin + self._copies[_TIME][first : last + 1].astype(np.float64)
                return self._videos.read(path, times.tolist())
            row = episode.row + step
            return self._encoded(episode.data, key, row, row + last - first)
        except DataError as error:
            path, step = error.file or episode.data, step + max(error.frame, 0)
            raise type(error)(f"camera {key!r}: {error.problem}", path, number, step) from error

    def _encoded(self, path: Path, key: str, first: int, last: int) -> list[bytes]:
        """Rows `first`..`last` of a column of encoded images."""
        found: list[bytes] = []
        for group, (start, stop) in enumerate(itertools.pairwise(self._groups(path))):
            begin, end = max(first, start), min(last + 1, stop)
            if begin >= end:
                continue
            for data in self._images(path, key, group)[begin - start : end - start]:
                if data is None:
                    raise ImageDecodeError("the row holds no image", path, frame=len(found))
                found.append(data)
        return found

    def place(self, frame: int) -> tuple[Path, int, int]:
        """(parquet file, episode, frame within the episode), for messages."""
        number, step = find_place(self.starts, frame)
        return self._episodes[number].data, number, step


def _code_tasks(path: Path, tasks: Mapping[int, str]) -> dict[str, int]:
    """Turns the task numbers in a file into codes of a table."""
    used, places = np.unique(np.load(path), return_inverse=True)
    codes, table = text_codes([tasks[number] for number in used.tolist()])
    np.save(path, codes[places])
    return {text: code for code, text in enumerate(table)}


def _sizes(info: Info, by_file: Mapping[Path, Sequence[Episode]]) -> list[list[Any]]:
    episodes = [e for part in by_file.values() for e in part]
    files = set(by_file) | {path for e in episodes for path, _ in e.videos.values()}
    return sorted([str(p.relative_to(info.folder)), p.stat().st_size] for p in files)


def _copy_low(job: tuple) -> dict[str, np.ndarray] | DataError:
    """The rows of one file's episodes: path -> numbers, or an object array of str."""
    path, episodes, wanted, tasks, skip = job
    try:
        table = read_table(path, sorted({key for key, _ in wanted.values()} | {"episode_index"}))
        rows = np.concatenate([np.arange(e.row, e.row + e.length) for e in episodes])
        _check_rows(path, episodes, _numbers(table["episode_index"], _SCALAR))
        if tasks is not None:
            _check_tasks(path, episodes, _numbers(table["task_index"], _SCALAR), tasks)
        found = {}
        for name, (key, feature) in wanted.items():
            try:
                if feature.kind == "text":
                    found[name] = np.array(table[key].to_pylist(), object)[rows]
                else:
                    found[name] = _numbers(table[key], feature)[rows]
            except FeatureError as error:
                raise FeatureError(f"column {key!r} {error.problem}", path) from error
    except DataError as error:
        if not skip:
            raise
        return error
    return found


def _check_rows(path: Path, episodes: Sequence[Episode], owner: np.ndarray) -> None:
    counts: dict[int, int] = dict(zip(*np.unique(owner, return_counts=True), strict=True))
    for e in episodes:
        own = owner[e.row : e.row + e.length]
        if len(own) != e.length or (own != e.number).any() or counts[e.number] != e.length:
            problem = (
                f"its rows are not those of the episodes that meta names: {e.length} from row "
                f"{e.row} on should be this one's, {counts.get(e.number, 0)} are"
            )
            raise CorruptRecordError(problem, path, e.number)


def _check_tasks(
    path: Path, episodes: Sequence[Episode], told: np.ndarray, tasks: frozenset[int]
) -> None:
    for e in episodes:
        unknown = sorted(set(told[e.row : e.row + e.length].tolist()) - tasks)
        if unknown:
            problem = f"frames have task_index {unknown}, meta knows {sorted(tasks)[:20]}"
            raise FeatureError(problem, path, e.number)


def _numbers(column: Any, feature: Feature) -> np.ndarray:
    """A column of (lists of lists of) numbers as [rows, *shape]."""
    array = column.combine_chunks()
    if hasattr(array, "storage"):  # datasets' own types for more than one axis
        array = array.storage
    while hasattr(array, "flatten") and hasattr(array.type, "value_type"):
        if array.null_count:
            break
        array = array.flatten()
    if array.null_count:
        raise FeatureError("has empty places")
    values = np.asarray(array.to_numpy(zero_copy_only=False))
    shape = (len(column), *(size for size in feature.shape if size is not None))
    if values.dtype == object or values.size != np.prod(shape):
        raise FeatureError(f"does not hold {feature.dtype} {shape}")
    return values.reshape(shape).astype(feature.dtype or values.dtype, copy=False)


def _with_codes(
    part: Mapping[str, np.ndarray], tables: dict[str, dict[str, int]]
) -> dict[str, np.ndarray]:
    """Texts as codes into `tables`, which fill up."""
    found = dict(part)
    for path, values in part.items():
        if values.dtype == object:
            table = tables.setdefault(path, {})
            codes = [table.setdefault(str(text or ""), len(table)) for text in values]
            found[path] = np.array(codes, np.int32)
    return found


def _row_groups(path: Path) -> list[int]:
    """First row of each row group, and the number of rows."""
    with _parquet(path) as file:
        meta = file.metadata
        sizes = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
    return np.cumsum([0, *sizes]).tolist()


def _image_group(path: Path, key: str, group: int) -> list[bytes | None]:
    """The encoded images of a row group; None where there is none."""
    with _parquet(path) as file:
        if key not in file.schema_arrow.names:
            raise MissingCameraError(f"it has no such column: {file.schema_arrow.names}", path)
        rows = file.read_row_group(group, [key])[key].to_pylist()
    return [row.get("bytes") or None if isinstance(row, dict) else None for row in rows]


@contextlib.contextmanager
def _parquet(path: Path) -> Iterator[Any]:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(path) as file:
            yield file
    except (OSError, arrow.ArrowException) as error:
        raise unreadable(path, error) from error
