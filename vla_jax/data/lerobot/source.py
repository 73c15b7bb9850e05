"""LeRobot datasets, v2.0 to v3.0: numbers from parquet, images from videos or from parquet.

A feature `observation.images.front` has the path `steps/observation/images/front`; the text of
`task_index` is `steps/language_instruction`. Numbers are copied into memory-mapped arrays the first
time. Frames of a video are decoded one after another from the key frame before them, and images in
parquet come a page (a megabyte) at a time: `launch/convert_data.py` pays when training.

Axis letters: e episodes, n frames.
"""

import hashlib
import json
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vla_jax.data.cache import (
    DONE,
    SKIPPED,
    cached_folder,
    content_of,
    map_array,
    write_columns,
)
from vla_jax.data.errors import KINDS, DataError, FeatureError, ImageDecodeError
from vla_jax.data.features import Feature
from vla_jax.data.lerobot.meta import LANGUAGE, Episode, Info
from vla_jax.data.lerobot.pages import ImagePages
from vla_jax.data.lerobot.rows import ROW, SCALAR, TIME, Wanted, copy_rows
from vla_jax.data.lerobot.video import VideoFrames
from vla_jax.data.places import DataPath, data_path, stamp, stamps, unchanged
from vla_jax.data.source import find_place, text_codes

FORMAT = 3  # of the meaning of the numbers; part of the digest
_LAYOUT = 1  # of the folder with the copies; part of its name
_FILES = "files"  # in index.json: file, relative to the dataset -> its stamp
_EPISODES = "episodes"  # in index.json: [number, file] of every episode, in order


def split_names(folder: DataPath) -> list[str]:
    """The splits in info.json, mostly "train" alone."""
    return list(Info(folder).splits())


def features(folder: DataPath) -> dict[str, Feature]:
    """Every feature of the dataset in `folder`."""
    return Info(folder).features


def open_lerobot(
    folder: str | DataPath,
    split: str,
    low: Sequence[str] = (),
    cache_dir: str = "",
    rebuild: bool = False,
    skip: bool = False,
) -> "LeRobotSource":
    """Opens one split; the first time, copies the numbers that are asked for.

    Args:
        folder: a folder or URL, holds `meta`, `data` and mostly `videos`.
        split: of info.json.
        low: paths of numbers and texts, such as `steps/action`.
        cache_dir: where the copies live; see `cached_folder`.
        rebuild: copy anew.
        skip: leave out episodes whose files are missing or unsound, with all others of an unsound
            parquet file; `LeRobotSource.skipped` lists them.

    Raises:
        DataError: a file, a codec or a package that is missing; an unsound file.
    """
    folder = data_path(folder)
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
        columns = {p: (info.keys[p], info.features[p]) for p in low if p in info.keys}
        if LANGUAGE in low and LANGUAGE not in info.keys:
            columns[LANGUAGE] = ("task_index", SCALAR)
        # Frames of a video are found by their time.
        if info.videos:
            columns[TIME] = ("timestamp", SCALAR)
        # Sorted, as the order in which they are asked for must not change the digest.
        columns = dict(sorted(columns.items()))
        sound, self.skipped = info.episodes(split)  # by meta alone; files are opened later
        if self.skipped and not (skip and sound):
            raise self.skipped[0][0]
        self.every: range | None = info.splits()[split]
        # A dataset may hold its texts itself; others give the number of one.
        self._by_number = columns.get(LANGUAGE, ("",))[0] == "task_index"
        self._tasks = info.tasks() if self._by_number else {}
        self.digest = _digest(info, split, sound, columns)
        wanted = Wanted(columns, frozenset(self._tasks) if self._by_number else None)
        stems = {path: f"low_{i}" for i, path in enumerate(columns)} | {ROW: "row"}

        def build(folder: Path) -> dict[str, Any]:
            # Only this finds the episodes whose rows are wrong.
            return self._copy(folder, sound, wanted, stems, skip)

        def renew(meta: dict[str, Any]) -> dict[str, Any] | None:
            current = stamps([info.folder / name for name in meta[_FILES]])
            same = all(map(unchanged, meta[_FILES].values(), current))
            renewed = meta | {_FILES: dict(zip(meta[_FILES], current, strict=True))}
            return renewed if same and meta[_EPISODES] else None

        layout = hashlib.sha256(json.dumps([_LAYOUT, self.digest]).encode()).hexdigest()
        name = f"lerobot-{split}-{layout[:16]}"
        folder = cached_folder(info.folder, cache_dir, name, rebuild, build, skip, renew)
        meta = json.loads((folder / DONE).read_text(encoding="utf-8"))
        self._tables: dict[str, list[str]] = meta["tables"]
        for where, kind, problem, episode, count in meta[SKIPPED]:
            self.skipped.append((KINDS[kind](problem, info.folder / where, episode), count))
        # The copy has the episodes in the order of their files, some without unsound ones.
        by_number = {episode.number: episode for episode in sound}
        self._episodes = [
            by_number[number]._replace(data=info.folder / name) for number, name in meta[_EPISODES]
        ]
        self.numbers = np.array([episode.number for episode in self._episodes], np.int64)
        self.starts = np.cumsum([0, *(e.length for e in self._episodes)])
        self.content = content_of(meta)
        self._copies = {path: map_array(folder / f"{stem}.npy") for path, stem in stems.items()}
        self._videos, self._pages = VideoFrames(info.fps), ImagePages()

    def _copy(
        self,
        folder: Path,
        episodes: Sequence[Episode],
        wanted: Wanted,
        stems: Mapping[str, str],
        skip: bool,
    ) -> dict[str, Any]:
        """Writes the columns of all sound episodes, and returns what index.json says of them."""
        info = self._info
        tables: dict[str, dict[str, int]] = {}
        order: list[tuple[int, str]] = []
        wrong: list[tuple[Episode, DataError]] = []
        files: dict[str, list[int]] = {}

        def parts() -> Generator[dict[str, np.ndarray], None, None]:
            for part in copy_rows(episodes, wanted, info.data_files()):
                if part.wrong and not skip:
                    raise part.wrong[0][1]
                wrong.extend(part.wrong)
                if not part.episodes:
                    continue
                name = str(part.path.relative_to(info.folder))
                files[name] = stamp(part.path)
                order.extend((episode.number, name) for episode in part.episodes)
                yield {stems[p]: v for p, v in _with_codes(part.columns, tables).items()}

        write_columns(folder, parts())
        if not order:
            raise wrong[0][1]
        if self._by_number:
            tables[LANGUAGE] = _code_tasks(folder / f"{stems[LANGUAGE]}.npy", self._tasks)
        skipped = [
            (_relative(error.file, info.folder), type(error).__name__, error.problem,
             episode.number, 1)
            for episode, error in wrong
        ]  # fmt: skip
        return {
            "tables": {path: list(table) for path, table in tables.items()},
            _EPISODES: order,
            # A file that is missing has no stamp: once it is there, the copy is made anew.
            _FILES: files | {name: [] for name in {s[0] for s in skipped} if name not in files},
            SKIPPED: skipped,
        }

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
                times = begin + self._copies[TIME][first : last + 1].astype(np.float64)
                return self._videos.read(path, times.tolist())
            rows = self._copies[ROW][first : last + 1].tolist()
            images = self._pages.read(episode.data, key, rows)
            for frame, data in enumerate(images):
                if not data:
                    problem = "the row holds no image (the path of a file is not followed)"
                    raise ImageDecodeError(problem, episode.data, frame=frame)
            return [data for data in images if data]
        except DataError as error:
            path, step = error.file or episode.data, step + max(error.frame, 0)
            problem = f"camera {key!r}: {error.problem}"
            raise type(error)(problem, path, episode.number, step) from error

    def place(self, frame: int) -> tuple[DataPath, int, int]:
        """(parquet file, episode as it is numbered, frame within it), for messages."""
        number, step = find_place(self.starts, frame)
        return self._episodes[number].data, self._episodes[number].number, step


def _digest(
    info: Info,
    split: str,
    episodes: Sequence[Episode],
    columns: Mapping[str, tuple[str, Any]],
) -> str:
    """Changes when the episodes or the sizes of their files would."""
    by_file: dict[DataPath, list[int]] = {}
    for episode in episodes:
        by_file.setdefault(episode.data, []).append(episode.length)
    # In the order of the copies, which are made file by file.
    lengths = [length for part in by_file.values() for length in part]
    files = set(by_file) | {path for e in episodes for path, _ in e.videos.values()}
    named_sizes = zip(files, stamps(files), strict=True)
    sizes = sorted([_relative(p, info.folder), (then or [-1])[0]] for p, then in named_sizes)
    named = [[path, key] for path, (key, _) in columns.items()]
    identity = [FORMAT, info.version, info.fps, split, lengths, named, sizes]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def _relative(path: str | DataPath, folder: DataPath) -> str:
    try:
        return str(data_path(path).relative_to(folder))
    except ValueError:
        return str(path)


def _code_tasks(path: Path, tasks: Mapping[int, str]) -> dict[str, int]:
    """Turns the task numbers in a file into codes of a table."""
    # Only the tasks that occur, so that the table holds no text without a frame.
    used, places = np.unique(np.load(path), return_inverse=True)
    codes, table = text_codes([tasks[number] for number in used.tolist()])
    np.save(path, codes[places])
    return {text: code for code, text in enumerate(table)}


def _with_codes(
    part: Mapping[str, np.ndarray], tables: dict[str, dict[str, int]]
) -> dict[str, np.ndarray]:
    """Texts as codes into `tables`, which fill up."""
    columns = dict(part)
    for path, values in part.items():
        if values.dtype == object:
            table = tables.setdefault(path, {})
            codes = [table.setdefault(str(text or ""), len(table)) for text in values]
            columns[path] = np.array(codes, np.int32)
    return columns
