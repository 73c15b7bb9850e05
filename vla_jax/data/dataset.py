"""One dataset, standardized: which windows it has, and what each holds.

Axis letters: e trajectories, n frames or samples, w window, f chunk, a action dimension.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path as FilePath
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float32, Int64, UInt8

from vla_jax.data import windows as trajectories
from vla_jax.data.decode import decode_into
from vla_jax.data.errors import (
    DataError,
    FeatureError,
    ImageDecodeError,
    MissingCameraError,
    Skips,
)
from vla_jax.data.features import STEPS
from vla_jax.data.filters import SPAN, Filters, moving
from vla_jax.data.formats import Reader, find_reader, to_folder
from vla_jax.data.requested import (
    check_episodes,
    find_cameras,
    find_feature,
    held_size,
    lacking_cameras,
    partners,
    unfit,
)
from vla_jax.data.source import Source
from vla_jax.data.spec import DatasetSpec, Trajectory
from vla_jax.data.standardize import instructions, standardise
from vla_jax.data.units.normalize import ActionSpec

Part = Literal["all", "head", "tail"]
log = logging.getLogger(__name__)


class Dataset:
    """The trajectories of one split, standardized in memory; images stay on disk.

    Attributes:
        name: what statistics and action specs are keyed by.
        actions: float32 [n, a] over the kept frames of all trajectories, one after another; in
            robot units until `normalize`.
        proprio: float32 [n, p] over the same frames, in robot units until the mixture normalizes
            it, or None.
        starts: int64 [e+1], first row of each trajectory in `actions`.
        text: int32 [m], indices into `instructions`, of one trajectory after another.
        text_starts: int64 [e+1], the first of each trajectory in `text`; each has at least one.
        instructions: the distinct instructions.
        image_sizes: camera role -> (height, width) of its first image; a view it lacks is absent.
        skips: what was wrong and has been left out.
        unused: reason -> how many sound trajectories are not used.
        fast_dct: see `vla_jax.data.decode.decode`.
    """

    def __init__(
        self,
        name: str,
        spec: DatasetSpec,
        index: Source,
        paths: Mapping[str, str],
        cameras: Mapping[str, str],
        episodes: range,
        action_dim: int,
        filters: Filters,
        skips: Skips,
    ):
        """Standardizes `episodes` of an opened source; see `open_dataset`."""
        self.name, self.spec, self.index, self.skips = name, spec, index, skips
        self._cameras = dict(cameras)
        self._may_end: np.ndarray | None = None
        self._state_dim: int | None = None  # of the episodes that are stored, 0 without states
        self.fast_dct = True
        for error, parts in index.skipped:
            skips.add(error, parts)
        # An upper bound: `_keep` cuts off what is left out.
        capacity = int(index.starts[episodes.stop] - index.starts[episodes.start])
        self.actions = np.empty((capacity, action_dim), np.float32)
        self.proprio: np.ndarray | None = None
        raw = {short: self.column(index, path) for short, path in paths.items()}
        starts, frames, texts = [0], [], []
        check_episodes(filters, index, name)
        # By the episode's number alone: the same for every process, seed and part of the split.
        swaps = np.random.default_rng(0).integers(0, 2, int(index.numbers.max(initial=0)) + 1)
        mistake: FeatureError | None = None
        unused: Counter[str] = Counter()
        sound = 0
        table: dict[str, int] = {}
        for episode in episodes:
            first, stop = int(index.starts[episode]), int(index.starts[episode + 1])
            columns = {short: column(episode, first, stop) for short, column in raw.items()}
            number = int(index.numbers[episode])
            if not _is_listed(filters, number, columns):
                unused["are not listed in data.filters.episodes"] += 1
                continue
            try:
                trajectory = self._standardise(columns, action_dim, first, stop - first)
            except DataError as error:
                if isinstance(error, FeatureError):
                    mistake = mistake or error
                skips.add(error)
                continue
            sound += 1
            begin, end, stride = trajectory.keep.indices(stop - first)
            spoken = instructions(trajectory)
            allowed = filters.texts(spoken)
            if not spoken or not allowed or end <= begin:
                unused[
                    "have no text" if not spoken
                    else "say what data.filters leaves out" if not allowed
                    else "have no frame that may be used"
                ] += 1  # fmt: skip
                continue
            starts.append(starts[-1] + self._append(starts[-1], trajectory, capacity))
            frames.append((first + begin, stride, swaps[number]))
            texts.append([table.setdefault(text, len(table)) for text in allowed])
        chosen = np.ones(len(frames), bool)
        if filters.few_shot and frames:
            chosen = filters.few([codes[0] for codes in texts])
            unused["are beyond data.filters.few_shot"] += int((~chosen).sum())
        self.unused = unused
        for reason, count in unused.items():
            if count:
                level = logging.WARNING if reason.startswith("have no") else logging.INFO
                log.log(level, "%s: %d of %d trajectories %s", name, count, len(episodes), reason)
        if skips.counts:
            log.warning("%s", skips)
        if mistake and not sound:  # no episode fits what is asked for: a mistake, nothing to skip
            raise mistake
        skips.check(len(episodes) + sum(parts for _, parts in index.skipped))
        if not frames:
            reasons = [f"{count} {reason}" for reason, count in unused.items()]
            reasons += [str(skips)] if skips.counts else []
            raise DataError(f"{name}: no trajectory is left: {'; '.join(reasons)}", index.root)
        self._keep(chosen, np.array(starts, np.int64), np.array(frames, np.int64), texts)
        self.instructions = list(table)
        first = self._frames.tolist()
        # Of each camera's images the size, and whether another one is worth a warning.
        self._held = {
            path: held_size(index, path, first, name, skips.allowed)
            for path in dict.fromkeys(cameras.values())
        }
        self.image_sizes = {role: self._held[path][0] for role, path in cameras.items()}

    def _standardise(
        self, columns: Mapping[str, np.ndarray], action_dim: int, first: int, steps: int
    ) -> Trajectory:
        """One episode, checked; `first` is its first frame."""
        try:
            return standardise(self.spec, columns, steps, action_dim, self._state_dim)
        except DataError as error:
            file, number, _ = self.index.place(first + max(error.frame, 0))
            problem = f"{self.name}: {error.problem}"
            raise type(error)(problem, file, number, error.frame) from error

    def _append(self, row: int, trajectory: Trajectory, capacity: int) -> int:
        """Stores the kept frames from `row` on, and counts them."""
        action = trajectory.action[trajectory.keep]
        self.actions[row : row + len(action)] = action
        self._state_dim = 0 if trajectory.proprio is None else trajectory.proprio.shape[1]
        if trajectory.proprio is not None:
            if self.proprio is None:
                # Made late: the first sound episode tells how many numbers a state has.
                self.proprio = np.empty((capacity, trajectory.proprio.shape[1]), np.float32)
            self.proprio[row : row + len(action)] = trajectory.proprio[trajectory.keep]
        return len(action)

    def _keep(
        self, chosen: np.ndarray, starts: np.ndarray, frames: np.ndarray, texts: list[list[int]]
    ) -> None:
        """Cuts all arrays to the chosen trajectories."""
        self.actions = self.actions[: starts[-1]]
        self.proprio = None if self.proprio is None else self.proprio[: starts[-1]]
        lengths = np.diff(starts)
        # Indexing by a mask copies everything, so it is done only where something goes.
        if not chosen.all():
            rows = np.repeat(chosen, lengths)
            self.actions = self.actions[rows]
            self.proprio = None if self.proprio is None else self.proprio[rows]
        self.starts = np.concatenate([[0], np.cumsum(lengths[chosen])]).astype(np.int64)
        self._frames, self._strides, self._swapped = np.ascontiguousarray(frames[chosen].T)
        chosen_texts = [codes for codes, keep in zip(texts, chosen, strict=True) if keep]
        self.text = np.array([code for codes in chosen_texts for code in codes], np.int32)
        self.text_starts = np.cumsum([0, *(len(codes) for codes in chosen_texts)]).astype(np.int64)

    @staticmethod
    def column(index: Source, path: str):
        """Reads one feature of one episode: (episode, its first frame, the next's) -> array."""
        if index.features[path].kind == "text":
            codes, table = index.text(path)
            texts = np.array(table, object)
        else:
            codes, texts = index.low(path), None
        per_step = path.startswith(STEPS)

        def column(episode: int, first: int, stop: int) -> np.ndarray:
            values = codes[first:stop] if per_step else codes[episode : episode + 1]
            return values if texts is None else texts[values]

        return column

    def in_source(self) -> tuple[list[str], Int64[np.ndarray, "e"]]:
        """Paths of the images that are used, and the source's number of each trajectory."""
        episodes = np.searchsorted(self.index.starts, self._frames, side="right") - 1
        return sorted(set(self._cameras.values())), episodes

    @property
    def lengths(self) -> Int64[np.ndarray, "e"]:
        """Kept frames of each trajectory."""
        return np.diff(self.starts)

    def normalize(self, spec: ActionSpec) -> None:
        """Brings `actions` to model units, once."""
        step = 1 << 16  # rows at a time, so that the float64 intermediates stay small
        for row in range(0, len(self.actions), step):
            part = slice(row, row + step)
            self.actions[part] = spec.normalize(self.actions[part])

    def leave_out_idle(self, threshold: float, chunk: int) -> None:
        """Lets no window end where the robot idles for a chunk; before `normalize`."""
        self._may_end = moving(self.actions, self.starts, chunk, threshold, self.spec.has_gripper)
        idle = int((~self._may_end).sum())
        log.info("%s: data.filters.noop leaves out %d of %d frames", self.name, idle, len(self))

    def __len__(self) -> int:
        return len(self.actions)

    @property
    def digest(self) -> str:
        """Changes when the frames that are used would, or their texts."""
        places = (self._frames, self._strides, self._swapped)
        parts = (*places, self.text, self.text_starts, self._may_end)
        blobs = [b"" if part is None else part.tobytes() for part in parts]
        blobs.append(json.dumps(self.instructions).encode())
        return hashlib.sha256(b"".join(blobs)).hexdigest()

    def windows(self, window: int, left_pad: bool, segment: bool) -> trajectories.Windows:
        """The windows that may be drawn, by number."""
        return trajectories.Windows(self.lengths, window, left_pad, segment, self._may_end)

    def actions_at(
        self, trajectory: Int64[np.ndarray, "n"], frames: Int64[np.ndarray, "n w f"]
    ) -> Float32[np.ndarray, "n w f a"]:
        """The actions at these frames of these trajectories."""
        return self.actions[self.starts[trajectory][:, None, None] + frames]

    def states(
        self, trajectory: Int64[np.ndarray, "n"], frames: Int64[np.ndarray, "n w"]
    ) -> Float32[np.ndarray, "n w p"]:
        """The robot's state at every step of the windows."""
        if self.proprio is None:
            raise ValueError(f"dataset {self.name!r} holds no states")
        return self.proprio[self.starts[trajectory][:, None] + frames]

    def images(
        self,
        role: str,
        trajectory: int,
        frames: Int64[np.ndarray, "w"],
        out: UInt8[np.ndarray, "w h x 3"],
    ) -> Bool[np.ndarray, "w"]:
        """Decodes one window of one camera into `out`; says which frames have an image."""
        if role not in self._cameras:
            out[...] = 0
            return np.zeros(len(frames), bool)
        base, recorded = int(self._frames[trajectory]), frames * int(self._strides[trajectory])
        first, path = int(recorded[0]), self._path(role, trajectory)
        views = self.index.read(path, base + first, base + int(recorded[-1]))
        present = np.ones(len(frames), bool)
        for row, frame in enumerate(recorded.tolist()):
            data = views[frame - first]
            present[row] = len(data) > 0
            # Padding repeats frames, which are copied rather than decoded again.
            if row and frame == recorded[row - 1]:
                out[row] = out[row - 1]
                continue
            try:
                size = decode_into(data, out[row], self.fast_dct)
                if size != self._held[path][0] and present[row]:
                    self._tell_size(path, size, base + frame)
            except ImageDecodeError as error:
                problem = f"dataset {self.name!r}, camera {role!r} ({path}): {error.problem}"
                raise ImageDecodeError(problem, *self.index.place(base + frame)) from error
        return present

    def _tell_size(self, path: str, size: tuple[int, int], frame: int) -> None:
        """Warns once of an image that is not as large as its camera's others."""
        held, fixed = self._held[path]
        if fixed:
            self._held[path] = held, False
            log.warning(
                "%s: camera %r: an image is %d x %d, not %d x %d, and is brought to the size of "
                "the others: %s, episode %d, frame %d",
                self.name, path, *size, *held, *self.index.place(frame),
            )  # fmt: skip

    def _path(self, role: str, trajectory: int) -> str:
        """The image feature that plays a role in a trajectory."""
        swap = self.spec.swap or ()
        if role in swap and self._swapped[trajectory]:
            role = next(r for r in (swap[1 - swap.index(role)], role) if r in self._cameras)
        return self._cameras[role]


def open_dataset(
    name: str,
    spec: DatasetSpec,
    directory: str | FilePath,
    split: str,
    cameras: Sequence[str],
    action_dim: int,
    part: Part = "all",
    held_out: float = 0.0,
    cache_dir: str = "",
    rebuild: bool = False,
    filters: Filters | None = None,
    skips: Skips | None = None,
    reader: Reader | None = None,
) -> Dataset:
    """Opens, and if need be indexes, one split of one dataset, whatever its format.

    Args:
        name: for messages.
        spec: how it is standardized.
        directory: of the data; see `vla_jax.data.formats`.
        split: of its splits.
        cameras: roles that are needed.
        action_dim: a, which the spec must produce.
        part: all of its trajectories, all but the last `held_out` ("head"), or those ("tail").
        held_out: as a share of the trajectories; at least one if any.
        cache_dir: where indices live; see `cached_folder`.
        rebuild: index anew.
        filters: of its trajectories; None = all that have a text.
        skips: what to do about parts that are wrong; None = raise.
        reader: of its format; None = the one for random access.

    Raises:
        DataError: listing every camera and feature that is missing. A view it lacks is black where
            `skips` allows it.
    """
    filters, skips = filters or Filters(), skips or Skips(name)
    folder, reader = to_folder(directory), reader or find_reader(directory)
    features = reader.features(folder)
    roles = list(dict.fromkeys([*cameras, *partners(spec, cameras)]))
    images = find_cameras(spec, features, roles)
    needed = {**spec.features, **({path: path for path in SPAN} if filters.by_span else {})}
    columns = {short: find_feature(features, path) for short, path in needed.items()}
    problems = [f"no feature {needed[short]!r}" for short, path in columns.items() if path is None]
    lacking = lacking_cameras(spec, features, [role for role in roles if role not in images])
    problems += unfit(features, images, [path for path in columns.values() if path])
    try:
        spec.mask(action_dim)
    except ValueError as error:
        problems.append(str(error))
    # A camera that is missing is all that may be skipped: its view is black then.
    if lacking and not problems:
        error = MissingCameraError(f"{name}: {lacking}. It has {sorted(features)}", folder)
        skips.add(error)
    elif problems:
        listing = "; ".join([*([lacking] if lacking else []), *problems])
        raise FeatureError(f"{name}: {listing}. It has {sorted(features)}", folder)
    paths = {short: path for short, path in columns.items() if path}
    low = sorted(set(paths.values()))
    index = reader.open(folder, split, low, cache_dir, rebuild, skip=skips.allowed)
    total = index.num_episodes
    # At least one trajectory on either side, as long as there are two.
    held = min(max(1, round(total * held_out)), total - 1) if held_out > 0 else 0
    parts = {"all": range(total), "head": range(total - held), "tail": range(total - held, total)}
    if total == 1 and part == "tail":
        log.warning("%s: one trajectory, so what is held out for evaluation is trained on", name)
        parts["tail"] = range(1)
    if not parts[part]:
        problem = f"{name}: split {split!r} has {total} trajectories, too few to hold some out"
        raise DataError(problem + f" ({held_out=})", folder)
    return Dataset(name, spec, index, paths, images, parts[part], action_dim, filters, skips)


def _is_listed(filters: Filters, number: int, columns: Mapping[str, np.ndarray]) -> bool:
    if filters.episodes is None:
        return True
    if not filters.by_span:
        return number in filters.episodes
    return tuple(int(columns[path].item()) for path in SPAN) in filters.episodes
