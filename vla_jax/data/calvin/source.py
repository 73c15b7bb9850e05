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
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int64

from vla_jax.data import features as feature_module
from vla_jax.data.cache import (
    DONE,
    SKIPPED,
    cached_folder,
    content_of,
    map_array,
    run_jobs,
    write_columns,
)
from vla_jax.data.calvin.annotations import (
    MISTAKES,
    Annotation,
    annotation_file,
    cut,
    episodes_of_spans,
    load_object,
    read_annotations,
)
from vla_jax.data.calvin.frames import Files, Unsound, copy_low, load, sample
from vla_jax.data.errors import (
    KINDS,
    DataError,
    EmptyTrajectoryError,
    FeatureError,
    MissingCameraError,
)
from vla_jax.data.features import STEPS, Feature
from vla_jax.data.source import find_place, text_codes
from vla_jax.data.source_annotated import ANNOTATIONS
from vla_jax.files import problem_of

Mode = Literal["windows", "segments"]
FORMAT = 2  # of the copied numbers; part of the digest
_FOLDERS = {"train": "training", "val": "validation"}
_LOW = ("action/rel_actions", "action/actions", "observation/robot_obs", "observation/scene_obs")
_IMAGES = ("observation/rgb_static", "observation/rgb_gripper")
_DEPTHS = ("observation/depth_static", "observation/depth_gripper")
_TEXT = STEPS + "language_instruction"
_STAMPS = "stamps"  # in index.json: changes when one of the frames that are looked at does
_STAMPED = 50_000  # frames that are looked at: all of them, or evenly spaced ones
_JOB = 4096  # frames read in one go
_PARALLEL_FRAMES = 20_000  # below this, starting processes costs more than it saves


def split_names(folder: Path) -> list[str]:
    """The splits that exist, of "train" and "val"."""
    return [
        s for s, below in _FOLDERS.items() if (folder / below / "ep_start_end_ids.npy").exists()
    ]


def features(folder: Path, depth: bool = False) -> dict[str, Feature]:
    """The features of the dataset in `folder`, as far as its frames hold them.

    Args:
        folder: holds `training` or `validation`.
        depth: also the depth images, float32 [h, w] in m, which are for converting.

    Raises:
        DataError: no frame can be read; FeatureError: they hold no depth images.
    """
    below = folder / _FOLDERS[split_names(folder)[0]]
    frame = sample(Files(below), _recordings(below))
    offered = {}
    for path in (*_LOW, *_IMAGES, *(_DEPTHS if depth else ())):
        values = frame.get(path.split("/")[1])
        if values is None:
            continue
        if path in _IMAGES and values.dtype == np.uint8 and values.ndim == 3:
            offered[STEPS + path] = Feature("image", values.shape, "uint8", "")
        elif path in _IMAGES:
            offered[STEPS + path] = Feature("tensor", values.shape, values.dtype.name)
        else:
            encoding = "zlib" if path in _DEPTHS else "none"
            offered[STEPS + path] = Feature("tensor", values.shape, "float32", encoding)
    if depth and not any(STEPS + path in offered for path in _DEPTHS):
        raise FeatureError(f"the frames have no depth images: {sorted(frame)}", below)
    offered[_TEXT] = feature_module.text()
    offered[ANNOTATIONS] = feature_module.text()
    for name in ("task", "scene"):
        offered[f"episode_metadata/{name}"] = feature_module.text()
    for name in ("start", "end"):
        offered[f"episode_metadata/{name}"] = feature_module.tensor((), "int64")
    return offered


def open_calvin(
    folder: str | Path,
    split: str,
    low: Sequence[str] = (),
    cache_dir: str = "",
    rebuild: bool = False,
    skip: bool = False,
    mode: Mode = "windows",
    depth: bool = False,
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
        depth: see `features`.

    Raises:
        DataError: a file that is missing or unsound, with its episode and frame.
    """
    folder = Path(folder).expanduser()
    if split not in split_names(folder):
        raise DataError(f"no split {split!r}; it has {split_names(folder)}", folder)
    offered = features(folder, depth)
    missing = sorted(set(low) - set(offered))
    if missing:
        raise FeatureError(f"no such feature: {missing}; it has {sorted(offered)}", folder)
    where = folder / _FOLDERS[split]
    return CalvinSource(where, split, offered, low, cache_dir, rebuild, skip, mode)


@dataclass(frozen=True)
class _Episode:
    """`start` and `stop` (exclusive) are frame ids; spans lie within.

    `number` counts the annotations of the file, or the pieces of the recordings.
    """

    start: int
    stop: int
    spans: tuple[Annotation, ...]
    number: int


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
        self.root, self._files = root, Files(root)
        # An annotated span has its text on every frame; only recordings need a list of them.
        hidden = ANNOTATIONS if mode == "windows" else ""
        self.features = {path: f for path, f in features.items() if path != hidden}
        recordings, annotations = _recordings(root), read_annotations(root, mode == "windows")
        self.skipped: list[tuple[DataError, int]] = [
            (EmptyTrajectoryError("the annotation holds no frame", annotation_file(root), i), 1)
            for i, a in enumerate(annotations)
            if a.end <= a.start
        ]
        if self.skipped and not skip:
            raise self.skipped[0][0]
        listed = len(annotations)
        spoken = [i for i, a in enumerate(annotations) if a.end > a.start]
        annotations = [annotations[i] for i in spoken]
        if mode == "windows":
            spans = episodes_of_spans(recordings, annotations, root)
            self._episodes = [_Episode(*span, spoken[i]) for i, span in spans]
            self.every: range | None = range(listed)
        else:
            pieces = cut(recordings, annotations)
            self._episodes = [_Episode(*span, i) for i, span in enumerate(pieces)]
            self.every = range(len(pieces))
        copied = sorted(p for p in set(low) if p.removeprefix(STEPS) in _LOW)
        ends = recordings.ravel().tolist()
        # Sizes of the outer frames tell another download apart without opening its files.
        identity = [
            [FORMAT, split, mode, [[e.start, e.stop] for e in self._episodes], copied],
            [[a.text for a in e.spans] for e in self._episodes],
            [self._files.size(frame) for frame in ends],
        ]
        self.digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        # Annotated spans overlap: a frame's numbers are kept once.
        frame_ids = [np.arange(e.start, e.stop) for e in self._episodes]
        self._ids = np.unique(np.concatenate(frame_ids))
        name = f"calvin-{split}-{mode}-{self.digest[:16]}"
        stems = {path: f"low_{i}" for i, path in enumerate(copied)}

        def build(folder: Path) -> dict[str, Any]:
            shapes = {stem: features[path].shape for path, stem in stems.items()}
            jobs = [
                (self._files, self._ids[i : i + _JOB].tolist(), stems, shapes)
                for i in range(0, len(self._ids), _JOB)
            ]
            unsound: list[Unsound] = []

            def parts() -> Generator[dict[str, np.ndarray], None, None]:
                with run_jobs(copy_low, jobs, len(self._ids) >= _PARALLEL_FRAMES) as results:
                    for rows, wrong in results:
                        if wrong and not skip:
                            raise self._error(wrong[0])
                        unsound.extend(wrong)
                        yield rows

            write_columns(folder, parts())
            return {SKIPPED: unsound, _STAMPS: frame_stamps}

        self._copies: dict[str, np.ndarray] = {}
        self.content = ""
        if copied:
            stamped_ids = self._ids[
                np.unique(np.linspace(0, len(self._ids) - 1, _STAMPED).astype(int))
            ]
            frame_stamps = self._files.stamps(stamped_ids.tolist())
            renew = lambda meta: meta if meta[_STAMPS] == frame_stamps else None  # noqa: E731
            copies_folder = cached_folder(root, cache_dir, name, rebuild, build, skip, renew)
            meta = json.loads((copies_folder / DONE).read_text(encoding="utf-8"))
            self.content = content_of(meta)
            self._copies = {p: map_array(copies_folder / f"{s}.npy") for p, s in stems.items()}
            self._leave_out([(int(f), str(k), str(p)) for f, k, p in meta[SKIPPED]])
        self.numbers = np.array([e.number for e in self._episodes], np.int64)
        self._first = np.array([e.start for e in self._episodes], np.int64)
        lengths = np.array([e.stop - e.start for e in self._episodes], np.int64)
        self.starts = np.concatenate([[0], np.cumsum(lengths)])

    def _error(self, unsound: Unsound) -> DataError:
        """The error of an unsound frame, placed in the first episode that holds it."""
        frame, kind, problem = unsound
        episode = next(e for e in self._episodes if e.start <= frame < e.stop)
        step = frame - episode.start
        return KINDS[kind](problem, self._files.path(frame), episode.number, step)

    def _leave_out(self, unsound: Sequence[Unsound]) -> None:
        """Leaves out the episodes that hold unsound frames."""
        ids = np.array([frame for frame, _, _ in unsound], np.int64)
        sound_episodes = []
        for episode in self._episodes:
            number = int(np.searchsorted(ids, episode.start))
            if number < len(ids) and ids[number] < episode.stop:
                frame, kind, problem = unsound[number]
                place = self._files.path(frame), episode.number, frame - episode.start
                error = KINDS[kind](problem, *place)
                self.skipped.append((error, 1))
            else:
                sound_episodes.append(episode)
        if not sound_episodes:
            raise self.skipped[0][0]
        self._episodes = sound_episodes

    def _frame_ids(self) -> Int64[np.ndarray, "n"]:
        step = np.arange(self.starts[-1]) - np.repeat(self.starts[:-1], np.diff(self.starts))
        return np.repeat(self._first, np.diff(self.starts)) + step

    @property
    def cameras(self) -> list[str]:
        """Paths of the image features."""
        return [STEPS + path for path in _IMAGES if STEPS + path in self.features]

    @property
    def num_episodes(self) -> int:
        """Annotated spans, or pieces of recordings."""
        return len(self._episodes)

    def low(self, path: str) -> np.ndarray:
        """Numbers over all frames, or `start` and `end` (exclusive frame id) of the episodes.

        Depth images can only be sliced, which reads them.
        """
        if path == "episode_metadata/start":
            return self._first
        if path == "episode_metadata/end":
            return self._first + np.diff(self.starts)
        if path.removeprefix(STEPS) in _DEPTHS:
            # Typed Any: it is sliced as an array would be.
            depths: Any = _Depth(self, path)
            return depths
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
        """Pixels of frames `first`..`last`, inclusive, of one episode; or depths, float32."""
        views = []
        for frame in range(first, last + 1):
            pixels, member = self._load(camera, frame), camera.rsplit("/", 1)[1]
            if self.features[camera].kind != "image":
                if pixels.shape != self.features[camera].shape or pixels.dtype.kind != "f":
                    problem = f"{member!r} is {pixels.dtype} {pixels.shape}, not a depth image"
                    raise FeatureError(problem, *self.place(frame))
            elif pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
                problem = f"{member!r} is {pixels.dtype} {pixels.shape}, not an RGB image"
                raise FeatureError(problem, *self.place(frame))
            views.append(pixels)
        return views

    def _load(self, camera: str, frame: int) -> np.ndarray:
        member, place = camera.rsplit("/", 1)[1], self.place(frame)
        try:
            return load(place[0], [member])[member]
        except FeatureError as error:
            raise MissingCameraError(error.problem, *place) from error
        except DataError as error:
            raise type(error)(error.problem, *place) from error

    def place(self, frame: int) -> tuple[Path, int, int]:
        """(file, episode as it is numbered, frame within it), for messages."""
        number, step = find_place(self.starts, frame)
        episode = self._episodes[number]
        return self._files.path(episode.start + step), episode.number, step


class _Depth:
    """A depth camera's frames, which are read when they are sliced."""

    def __init__(self, source: CalvinSource, path: str):
        self._source, self._path = source, path

    def __getitem__(self, rows: slice) -> np.ndarray:
        frames = self._source.read(self._path, rows.start, rows.stop - 1)
        return np.stack(frames).astype(np.float32)


def _recordings(folder: Path) -> Int64[np.ndarray, "r 2"]:
    path = folder / "ep_start_end_ids.npy"
    try:
        numbers = np.load(path)
        with np.errstate(invalid="ignore"):
            ranges = numbers.astype(np.int64)
    except MISTAKES as error:
        raise DataError(problem_of(path, f"cannot be read: {error}"), path) from error
    if (ranges != numbers).any():
        raise DataError("holds numbers that are no frames' ids", path)
    if ranges.ndim != 2 or ranges.shape[1] != 2 or not len(ranges):
        raise DataError(f"has shape {ranges.shape}, not [recordings, 2]", path)
    if (ranges[:, 1] < ranges[:, 0]).any():
        raise DataError("a recording ends before it begins", path)
    return ranges


def _scenes(folder: Path, frames: Int64[np.ndarray, "e"]) -> list[str]:
    path = folder / "scene_info.npy"
    try:
        info: dict[str, Any] = load_object(path) if path.exists() else {}
        inside = [[n for n, (a, b) in info.items() if a <= frame <= b] for frame in frames.tolist()]
    except MISTAKES as error:
        problem = problem_of(path, f"is not CALVIN's list of scenes ({error!r})")
        raise DataError(problem, path) from error
    return [names[0] if names else "" for names in inside]


def _to_json(episode: _Episode) -> str:
    """The episode's annotated spans, counted from its first frame; `end` is exclusive."""
    begin, length = episode.start, episode.stop - episode.start
    spans = [
        asdict(span) | {"start": max(span.start - begin, 0), "end": min(span.end - begin, length)}
        for span in episode.spans
    ]
    return json.dumps(spans)
