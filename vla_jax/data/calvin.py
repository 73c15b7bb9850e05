"""CALVIN as it is downloaded: one .npz a frame, annotations beside them, read without conversion.

    task_ABC_D/{training,validation}/
        episode_0358482.npz ...            one frame each, numbered over all recordings
        ep_start_end_ids.npy               int [recordings, 2], first and last frame, inclusive
        scene_info.npy                     {scene: [first, last]}, may be missing
        lang_annotations/auto_lang_ann.npy texts, tasks and spans [start, end) of what was annotated

An episode is one annotated span ("windows", what RoboVLMs trains on) or a piece of a recording,
annotated or not ("segments"). Numbers are copied into memory-mapped arrays the first time; images
are inflated on demand, which costs about ten times what a JPEG of an RLDS dataset does.
Source: the dataset's README in github.com/mees/calvin. Axis letters: e episodes, n frames.
"""

import hashlib
import json
import pickle
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int64

from vla_jax.data import features as feature_module
from vla_jax.data.cache import DONE, cached_folder, map_array, run_jobs, write_columns
from vla_jax.data.calvin_spans import (
    Annotation,
    cut,
    episodes_of_spans,
    load_object,
    read_annotations,
)
from vla_jax.data.errors import KINDS, CorruptRecordError, DataError, FeatureError
from vla_jax.data.features import STEPS, Feature
from vla_jax.data.source import find_place, text_codes
from vla_jax.data.source_spans import ANNOTATIONS

Mode = Literal["windows", "segments"]
FORMAT = 1  # of the copied numbers; part of the digest
_FOLDERS = {"train": "training", "val": "validation"}
_LOW = ("action/rel_actions", "action/actions", "observation/robot_obs", "observation/scene_obs")
_IMAGES = ("observation/rgb_static", "observation/rgb_gripper")
_TEXT = STEPS + "language_instruction"
_JOB = 4096  # frames read in one go
_PARALLEL_FRAMES = 20_000  # below this, starting processes costs more than it saves


def split_names(folder: Path) -> list[str]:
    """Which of "train" and "val" there are."""
    return [
        s for s, below in _FOLDERS.items() if (folder / below / "ep_start_end_ids.npy").exists()
    ]


def features(folder: Path) -> dict[str, Feature]:
    """What `CalvinSource` offers of the dataset in `folder`; sizes are those of the first frame."""
    below = folder / _FOLDERS[split_names(folder)[0]]
    first = int(_recordings(below)[0, 0])
    frame = _load(_Files(below).path(first), [p.split("/")[1] for p in (*_LOW, *_IMAGES)])
    found = {STEPS + p: feature_module.tensor(frame[p.split("/")[1]].shape) for p in _LOW}
    for path in _IMAGES:
        height, width, _ = frame[path.split("/")[1]].shape
        found[STEPS + path] = feature_module.image(height, width, "")
    found[_TEXT] = feature_module.text()
    found[ANNOTATIONS] = feature_module.text()
    for name in ("task", "scene"):
        found[f"episode_metadata/{name}"] = feature_module.text()
    for name in ("start", "end"):
        found[f"episode_metadata/{name}"] = feature_module.tensor((), "int64")
    return found


def open_calvin(
    folder: str | Path,
    split: str,
    low: Sequence[str] = (),
    cache_dir: str = "",
    rebuild: bool = False,
    skip: bool = False,
    mode: Mode = "windows",
) -> "CalvinSource":
    """Opens one split; the first time, copies the numbers that are asked for out of the frames.

    Args:
        folder: holds `training` or `validation`.
        split: "train" or "val".
        low: paths of the numbers, such as `steps/action/rel_actions`.
        cache_dir: where the copies live; see `cached_folder`.
        rebuild: copy anew.
        skip: leave out episodes with an unsound frame; `CalvinSource.skipped` lists them.
        mode: see the head of this file.

    Raises:
        DataError: a file that is missing or unsound, with its episode and frame.
    """
    folder = Path(folder).expanduser()
    if split not in split_names(folder):
        raise DataError(f"no split {split!r}; it has {split_names(folder)}", folder)
    found = features(folder)
    missing = sorted(set(low) - set(found))
    if missing:
        raise FeatureError(f"no such feature: {missing}; it has {sorted(found)}", folder)
    where = folder / _FOLDERS[split]
    return CalvinSource(where, split, found, low, cache_dir, rebuild, skip, mode)


@dataclass(frozen=True)
class _Episode:
    """`start` and `stop` (exclusive) are frame ids; spans lie within."""

    start: int
    stop: int
    spans: tuple[Annotation, ...]


class CalvinSource:
    """See `vla_jax.data.source.Source`; made by `open_calvin`."""

    name = "calvin"

    def __init__(
        self,
        root: Path,
        split: str,
        features: Mapping[str, Feature],
        low: Sequence[str],
        cache_dir: str,
        rebuild: bool,
        skip: bool,
        mode: Mode,
    ):
        """Finds the episodes; see `open_calvin`."""
        self.root, self._files = root, _Files(root)
        # An annotated span has its text on every frame; only recordings need a list of them.
        hidden = ANNOTATIONS if mode == "windows" else ""
        self.features = {path: f for path, f in features.items() if path != hidden}
        recordings, annotations = _recordings(root), read_annotations(root, mode == "windows")
        spans = (episodes_of_spans if mode == "windows" else cut)(recordings, annotations, root)
        self._episodes = [_Episode(*span) for span in spans]
        copied = sorted(p for p in set(low) if p.removeprefix(STEPS) in _LOW)
        ends = recordings.ravel().tolist()
        identity = [
            [FORMAT, split, mode, [[e.start, e.stop] for e in self._episodes], copied],
            [[a.text for a in e.spans] for e in self._episodes],
            [self._files.size(frame) for frame in ends],
        ]
        self.digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        # Annotated spans overlap: a frame's numbers are kept once.
        every = [np.arange(e.start, e.stop) for e in self._episodes]
        self._ids = np.unique(np.concatenate(every))
        name = f"calvin-{split}-{mode}-{self.digest[:16]}"
        stems = {path: f"low_{i}" for i, path in enumerate(copied)}

        def build(folder: Path) -> None:
            shapes = {stem: features[path].shape for path, stem in stems.items()}
            jobs = [
                (self._files, self._ids[i : i + _JOB].tolist(), stems, shapes, skip)
                for i in range(0, len(self._ids), _JOB)
            ]
            unsound: list[tuple[int, str, str]] = []

            def parts() -> Iterator[dict[str, np.ndarray]]:
                for rows, wrong in run_jobs(_copy_low, jobs, len(self._ids) >= _PARALLEL_FRAMES):
                    unsound.extend(wrong)
                    yield rows

            write_columns(folder, parts())
            (folder / DONE).write_text(json.dumps({"unsound": unsound}), encoding="utf-8")

        folder = cached_folder(root, cache_dir, name, rebuild, build) if copied else None
        self._copies = {p: map_array(folder / f"{s}.npy") for p, s in stems.items() if folder}
        self.skipped: list[tuple[DataError, int]] = []
        if folder:
            self._leave_out(json.loads((folder / DONE).read_text(encoding="utf-8"))["unsound"])
        self._first = np.array([e.start for e in self._episodes], np.int64)
        lengths = np.array([e.stop - e.start for e in self._episodes], np.int64)
        self.starts = np.concatenate([[0], np.cumsum(lengths)])

    def _leave_out(self, unsound: Sequence[Sequence[Any]]) -> None:
        """Leaves out the episodes that hold unsound frames: (id, kind of error, problem) each."""
        ids = np.array([frame for frame, _, _ in unsound], np.int64)
        kept = []
        for episode in self._episodes:
            number = int(np.searchsorted(ids, episode.start))
            if number < len(ids) and ids[number] < episode.stop:
                frame, kind, problem = unsound[number]
                self.skipped.append((KINDS[kind](problem, self._files.path(frame)), 1))
            else:
                kept.append(episode)
        if not kept:
            raise self.skipped[0][0]
        self._episodes = kept

    def _frame_ids(self) -> Int64[np.ndarray, "n"]:
        step = np.arange(self.starts[-1]) - np.repeat(self.starts[:-1], np.diff(self.starts))
        return np.repeat(self._first, np.diff(self.starts)) + step

    @property
    def cameras(self) -> list[str]:
        """Paths of the image features."""
        return [STEPS + path for path in _IMAGES]

    @property
    def num_episodes(self) -> int:
        """Annotated spans, or pieces of recordings."""
        return len(self._episodes)

    def low(self, path: str) -> np.ndarray:
        """Numbers over all frames, or `start` and `end` (exclusive frame id) of the episodes."""
        if path == "episode_metadata/start":
            return self._first
        if path == "episode_metadata/end":
            return self._first + np.diff(self.starts)
        return self._copies[path][np.searchsorted(self._ids, self._frame_ids())]

    def text(self, path: str) -> tuple[np.ndarray, list[str]]:
        """Codes and table of the instructions, or of the episodes' tasks, scenes, annotations."""
        if path == "episode_metadata/scene":
            return text_codes(_scenes(self.root, self._first))
        if path == "episode_metadata/task":
            return text_codes([",".join(s.task for s in e.spans) for e in self._episodes])
        if path == ANNOTATIONS:
            return text_codes([_to_json(e) for e in self._episodes])
        codes = np.zeros(self.starts[-1], np.int32)
        table: dict[str, int] = {"": 0}
        for first, episode in zip(self.starts.tolist(), self._episodes, strict=False):
            for span in reversed(episode.spans):  # where spans overlap the first one counts
                begin = first + max(span.start - episode.start, 0)
                end = first + min(span.end, episode.stop) - episode.start
                codes[begin:end] = table.setdefault(span.text, len(table))
        return codes, list(table)

    def read(self, camera: str, first: int, last: int) -> list[np.ndarray]:
        """Pixels of frames `first`..`last`, inclusive, of one episode."""
        member, views = camera.rsplit("/", 1)[1], []
        for frame in range(first, last + 1):
            path, episode, step = self.place(frame)
            try:
                pixels = _load(path, [member])[member]
            except DataError as error:
                raise type(error)(error.problem, path, episode, step) from error
            if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
                problem = f"{member!r} is {pixels.dtype} {pixels.shape}, not an RGB image"
                raise FeatureError(problem, path, episode, step)
            views.append(pixels)
        return views

    def place(self, frame: int) -> tuple[Path, int, int]:
        """(file, episode, frame within the episode), for messages."""
        episode, step = find_place(self.starts, frame)
        return self._files.path(self._episodes[episode].start + step), episode, step


class _Files:
    """Names of the frames' files, whose number of digits is found out from one of them."""

    def __init__(self, folder: Path):
        self.folder = folder
        names = (re.fullmatch(r"(.*?)(\d+)\.npz", path.name) for path in folder.iterdir())
        found = next((name for name in names if name), None)
        if found is None:
            raise DataError("holds no frames (episode_0000000.npz)", folder)
        self.prefix, self.digits = found[1], len(found[2])

    def path(self, frame: int) -> Path:
        return self.folder / f"{self.prefix}{frame:0{self.digits}d}.npz"

    def size(self, frame: int) -> int:
        path = self.path(frame)
        if not path.exists():
            raise DataError("ep_start_end_ids.npy names this frame, and it is missing", path)
        return path.stat().st_size


def _copy_low(job: tuple) -> tuple[dict[str, np.ndarray], list[tuple[int, str, str]]]:
    """Numbers of some frames, and what is wrong with those that are skipped (not finite then)."""
    files, frames, stems, shapes, skip = job
    members = {path.rsplit("/", 1)[1]: stem for path, stem in stems.items()}
    rows = {s: np.full((len(frames), *shape), np.nan, np.float32) for s, shape in shapes.items()}
    unsound = []
    for row, frame in enumerate(frames):
        path = files.path(frame)
        try:
            for member, values in _load(path, list(members)).items():
                shape = shapes[members[member]]
                if values.shape != shape:
                    raise FeatureError(f"{member!r} has shape {values.shape}, not {shape}", path)
                rows[members[member]][row] = values
        except DataError as error:
            if not skip:
                raise
            unsound.append((frame, type(error).__name__, error.problem))
    return rows, unsound


def _load(path: Path, members: Sequence[str]) -> dict[str, np.ndarray]:
    try:
        with np.load(path) as archive:
            missing = [member for member in members if member not in archive]
            if missing:
                raise FeatureError(f"the frame has no arrays {missing}: {archive.files}", path)
            return {member: archive[member] for member in members}
    except FileNotFoundError:
        raise DataError("the frame's file is missing", path) from None
    except DataError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise CorruptRecordError(f"the frame cannot be read: {error}", path) from error


def _recordings(folder: Path) -> Int64[np.ndarray, "r 2"]:
    path = folder / "ep_start_end_ids.npy"
    try:
        found = np.load(path).astype(np.int64)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"cannot be read: {error}", path) from error
    if found.ndim != 2 or found.shape[1] != 2 or not len(found):
        raise DataError(f"has shape {found.shape}, not [recordings, 2]", path)
    if (found[:, 1] < found[:, 0]).any():
        raise DataError("a recording ends before it begins", path)
    return found


def _scenes(folder: Path, frames: Int64[np.ndarray, "e"]) -> list[str]:
    path = folder / "scene_info.npy"
    try:
        info: dict[str, Any] = load_object(path) if path.exists() else {}
        inside = [[n for n, (a, b) in info.items() if a <= frame <= b] for frame in frames.tolist()]
    except (TypeError, ValueError, AttributeError, pickle.UnpicklingError) as error:
        raise DataError(f"is not CALVIN's list of scenes ({error!r})", path) from error
    return [names[0] if names else "" for names in inside]


def _to_json(episode: _Episode) -> str:
    """The episode's annotated spans, counted from its first frame; `end` is exclusive."""
    begin, length = episode.start, episode.stop - episode.start
    spans = [
        asdict(span) | {"start": max(span.start - begin, 0), "end": min(span.end - begin, length)}
        for span in episode.spans
    ]
    return json.dumps(spans)
