"""What a LeRobot dataset says about itself: v2.0 and v2.1 in JSON lines, v3.0 in parquet.

    v2   data/chunk-000/episode_000000.parquet      videos/chunk-000/KEY/episode_000000.mp4
         meta/{info.json, episodes.jsonl, tasks.jsonl}
    v3   data/chunk-000/file-000.parquet            videos/KEY/chunk-000/file-000.mp4
         meta/{info.json, tasks.parquet, episodes/chunk-000/file-000.parquet}

A file of v3 holds many episodes. info.json gives the paths as templates; the ones above are the
usual ones. Source: lerobot/datasets of github.com/huggingface/lerobot.
"""

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from itertools import pairwise
from typing import Any, NamedTuple

from vla_jax.data.errors import DataError, EmptyTrajectoryError, TruncatedShardError
from vla_jax.data.features import STEPS, Feature
from vla_jax.data.lerobot.described import feature_of, paths_of
from vla_jax.data.lerobot.tables import (
    opened_parquet,
    read_json,
    read_json_lines,
    read_table,
    understood,
)
from vla_jax.data.places import DataPath, stamps
from vla_jax.files import is_foreign

log = logging.getLogger(__name__)
VERSIONS = ("v2.0", "v2.1", "v3.0")
LANGUAGE = STEPS + "language_instruction"  # the text of `task_index`


class Episode(NamedTuple):
    """Where one episode lies.

    Attributes:
        number: `episode_index`.
        length: frames.
        data: parquet file that meta names for it.
        videos: camera key -> (file, time of its first frame there in s).
    """

    number: int
    length: int
    data: DataPath
    videos: Mapping[str, tuple[DataPath, float]]


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

    def __init__(self, folder: DataPath):
        """Reads it.

        Raises:
            DataError: it is missing, or of a version that is not read.
        """
        self._path = path = folder / "meta" / "info.json"
        self.folder, self.raw = folder, read_json(path)
        with understood(path, "a LeRobot info.json"):
            self.version, self.fps = str(self.raw["codebase_version"]), float(self.raw["fps"])
            if self.version not in VERSIONS:
                raise DataError(f"is of version {self.version}; read are {list(VERSIONS)}", path)
            # The time between two frames is 1 / fps.
            if not (math.isfinite(self.fps) and self.fps > 0):
                raise DataError(f"says {self.fps} frames a second", path)
            described: dict[str, Any] = dict(self.raw["features"])
            # Version 2 puts so many episodes into a folder.
            self._chunk = int(self.raw.get("chunks_size", 1000))
            if self._chunk < 1:
                raise DataError(f"says chunks_size {self.raw['chunks_size']!r}, no number", path)
            self._data_path = str(self.raw["data_path"])
            self._video_path = self.raw.get("video_path")
            self.keys = paths_of(described)
            self.features = {p: feature_of(described[key]) for p, key in self.keys.items()}
            cameras = [p for p in self.keys if self.features[p].kind == "image"]
            self.videos = [p for p in cameras if described[self.keys[p]]["dtype"] == "video"]
        # Most datasets give an episode's text by `task_index` alone.
        self.features.setdefault(LANGUAGE, Feature("text"))

    def splits(self) -> dict[str, range]:
        """Split -> which episodes."""
        with understood(self._path, "a LeRobot info.json"):
            total = int(self.raw.get("total_episodes") or 0)
            described = dict(self.raw.get("splits") or {"train": f"0:{total}"})
        ranges = {}
        for name, text in described.items():
            # As in Python's slices, either end may be left out.
            first, _, stop = str(text).partition(":")
            with understood(self._path, f"FIRST:STOP, the split {name!r} is {text!r}"):
                ranges[str(name)] = range(int(first or 0), int(stop or total))
        return ranges

    def tasks(self) -> dict[int, str]:
        """`task_index` -> text."""
        folder = self.folder / "meta"
        if self.version != "v3.0":
            path = folder / "tasks.jsonl"
            with understood(path, "a list of tasks"):
                rows = read_json_lines(path)
                return _tasks(path, [r["task_index"] for r in rows], [r["task"] for r in rows])
        path = folder / "tasks.parquet"
        with understood(path, "a list of tasks"):
            table = read_table(path).to_pydict()
            numbers, texts = table["task_index"], table[_task_column(path, list(table))]
            return _tasks(path, numbers, texts)

    def episodes(self, split: str) -> tuple[list[Episode], list[tuple[DataError, int]]]:
        """The sound episodes of a split, in order, and what is wrong with how many others.

        Raises:
            DataError: no such split, or meta is unsound.
        """
        splits = self.splits()
        if split not in splits:
            raise DataError(f"no split {split!r}; it has {sorted(splits)}", self.folder)
        meta = self.folder / "meta"
        with understood(meta, "a list of episodes"):
            listed = self._v3() if self.version == "v3.0" else self._v2()
            stated_frames = int(self.raw.get("total_frames") or 0)
        frames = sum(episode.length for episode in listed)
        # Only a warning: tools that edit datasets leave old totals behind.
        if stated_frames and stated_frames != frames:
            log.warning(
                "%s: info.json says %d frames, the episodes have %d", meta, stated_frames, frames
            )
        for problem in _shared_frames(listed, self.fps):
            log.warning("%s: %s", meta, problem)
        counts = Counter(episode.number for episode in listed)
        twice = sorted(number for number, count in counts.items() if count > 1)
        if twice:
            raise DataError(f"names episodes more than once: {twice[:5]}", meta)
        outside = sorted(n for n in counts if not any(n in part for part in splits.values()))
        if outside:
            log.warning("%s: %d episodes are in no split: %s", meta, len(outside), outside[:5])
        wrong: list[tuple[DataError, int]] = []
        wanted = splits[split]
        lacking = len(wanted) - sum(number in wanted for number in counts)
        if lacking:
            problem = f"lacks {lacking} of the {len(wanted)} episodes of {split!r}"
            first = next(number for number in wanted if number not in counts)
            wrong.append((TruncatedShardError(problem, meta, first), lacking))
        sound, asked = [], [episode for episode in listed if episode.number in wanted]
        files = {path for episode in asked for path, _ in episode.videos.values()}
        present = {path for path, is_there in zip(files, stamps(files), strict=True) if is_there}
        for episode in asked:
            error = _unsound(episode, present)
            if error is None:
                sound.append(episode)
            else:
                wrong.append((error, 1))
        if not sound and not wrong:
            raise DataError(f"split {split!r} has no episodes", self.folder)
        return sound, wrong

    def _v2(self) -> list[Episode]:
        episodes = []
        for row in read_json_lines(self.folder / "meta" / "episodes.jsonl"):
            number, length = int(row["episode_index"]), int(row["length"])
            names = {"episode_index": number, "episode_chunk": number // self._chunk}
            # v2 has a file an episode, which therefore begins at 0 s.
            videos = {key: (self._video(key, names), 0.0) for key in self._video_keys()}
            data = self.folder / self._data_path.format(**names)
            episodes.append(Episode(number, length, data, videos))
        return sorted(episodes, key=lambda episode: episode.number)

    def _v3(self) -> list[Episode]:
        paths = sorted((self.folder / "meta" / "episodes").glob("*/*.parquet"))
        # macOS leaves a hidden `._name` beside a file that it copies.
        paths = [path for path in paths if not is_foreign(path)]
        if not paths:
            raise DataError("no */*.parquet", self.folder / "meta" / "episodes")
        # Only these: the table also holds statistics of every feature, which are large.
        columns = ["episode_index", "length", "data/chunk_index", "data/file_index"]
        for key in self._video_keys():
            columns += [
                f"videos/{key}/{c}" for c in ("chunk_index", "file_index", "from_timestamp")
            ]
        episodes = []
        tables = [read_table(path, columns).to_pylist() for path in paths]
        # Tools that merge datasets do not keep the tables in order.
        for row in sorted((r for t in tables for r in t), key=lambda r: r["episode_index"]):
            data = self.folder / self._data_path.format(**_names(row, "data"))
            videos = {
                key: (
                    self._video(key, _names(row, f"videos/{key}")),
                    float(row[f"videos/{key}/from_timestamp"]),
                )
                for key in self._video_keys()
            }
            number, length = int(row["episode_index"]), int(row["length"])
            episodes.append(Episode(number, length, data, videos))
        return episodes

    def _video_keys(self) -> list[str]:
        return [self.keys[path] for path in self.videos]

    def _video(self, key: str, names: Mapping[str, int]) -> DataPath:
        if not self._video_path:
            raise DataError(f"{key!r} is a video, but there is no video_path", self.folder)
        return self.folder / str(self._video_path).format(video_key=key, **names)

    def data_files(self) -> list[DataPath]:
        """Every parquet file of the data, whatever meta names."""
        return sorted(p for p in (self.folder / "data").rglob("*.parquet") if not is_foreign(p))


def _shared_frames(episodes: Sequence[Episode], fps: float) -> list[str]:
    """Videos of which two episodes claim the same frames; a sentence for each file.

    A merge that forgot to move the second dataset's times leaves this; so may windows cut from one
    recording on purpose, hence it is no error.
    """
    by_file: dict[DataPath, list[tuple[float, float, int]]] = {}
    for episode in episodes:
        for path, begin in episode.videos.values():
            end = begin + episode.length / fps
            by_file.setdefault(path, []).append((begin, end, episode.number))
    problems = []
    for path, spans in by_file.items():
        spans.sort()
        both = [(a[2], b[2]) for a, b in pairwise(spans) if b[0] < a[1] - 0.5 / fps]
        if both:
            problems.append(
                f"episodes {both[0][0]} and {both[0][1]} share frames of {path.name}, which begin "
                f"where the other has not ended ({len(both)} such pairs): their images may be wrong"
            )
    return problems


def _unsound(episode: Episode, present: Set[DataPath]) -> DataError | None:
    """What is wrong with an episode as meta describes it; `present` are the videos there are."""
    if episode.length < 1:
        return EmptyTrajectoryError("the episode has no steps", episode.data, episode.number)
    for path, begin in episode.videos.values():
        if not math.isfinite(begin):
            return DataError(f"the episode begins at {begin} s", path, episode.number)
        if path not in present:
            return DataError("the file is missing", path, episode.number)
    return None


def _tasks(path: DataPath, numbers: Sequence[Any], texts: Sequence[Any]) -> dict[int, str]:
    """`task_index` -> text.

    Raises:
        DataError: a task is no text, or a number stands for several.
    """
    strange = [text for text in texts if not isinstance(text, str)]
    if strange:
        raise DataError(f"tasks are no texts: {strange[:3]}", path)
    tasks: dict[int, str] = {}
    for number, text in zip(numbers, texts, strict=True):
        # A merge that did not count on leaves this: nobody can say which of them a row means.
        if tasks.setdefault(int(number), text) != text:
            both = [tasks[int(number)], text]
            raise DataError(f"task_index {number} stands for several tasks: {both}", path)
    return tasks


def _names(row: Mapping[str, Any], of: str) -> dict[str, int]:
    return {name: int(row[f"{of}/{name}"]) for name in ("chunk_index", "file_index")}


def _task_column(path: DataPath, columns: list[str]) -> str:
    """The column of a v3 task table that holds the tasks; others may hold texts, too.

    LeRobot writes a pandas table whose index is the text, called "task" or nothing.
    """
    # The table's own columns do not tell which one pandas took for its index.
    with opened_parquet(path) as file:
        pandas = file.schema_arrow.pandas_metadata or {}
    named = [name for name in pandas.get("index_columns", ()) if name in columns]
    for name in (*named, "task", "__index_level_0__"):
        if name in columns and name != "task_index":
            return name
    candidates = [name for name in columns if name != "task_index"]
    if len(candidates) != 1:
        raise DataError(f"which column holds the tasks? It has {columns}, none is 'task'", path)
    return candidates[0]
