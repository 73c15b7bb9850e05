"""One dataset, standardised: which windows it has, and what each holds.

Axis letters: e trajectories, n frames or samples, w window, f chunk, a action dimension.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path as FilePath
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float32, Int64, UInt8

from vla_jax.data import trajectory as windows
from vla_jax.data.decode import decode_into, image_size
from vla_jax.data.errors import DataError, FeatureError, ImageDecodeError
from vla_jax.data.features import STEPS, Feature, load_features
from vla_jax.data.normalize import ActionSpec
from vla_jax.data.rlds_index import RLDSIndex, open_index
from vla_jax.data.spec import DatasetSpec, Path, Trajectory

Part = Literal["all", "head", "tail"]
log = logging.getLogger(__name__)


class Dataset:
    """The trajectories of one split, standardised in memory; images stay on disk.

    Attributes:
        name: what statistics and action specs are keyed by.
        actions: float32 [n, a] over the kept frames of all trajectories, one after another; in
            robot units until `normalize`.
        proprio: float32 [n, p] over the same frames, in robot units until the mixture normalises
            it, or None.
        starts: int64 [e+1], first row of each trajectory in `actions`.
        text: int32 [e], index into `instructions`.
        instructions: the distinct instructions.
        image_sizes: camera role -> (height, width) of its first image.
    """

    def __init__(
        self,
        name: str,
        spec: DatasetSpec,
        index: RLDSIndex,
        paths: Mapping[str, str],
        cameras: Mapping[str, str],
        episodes: range,
        action_dim: int,
    ):
        """Standardises `episodes` of an opened index; see `open_dataset`."""
        self.name, self.spec, self.index = name, spec, index
        self._cameras = dict(cameras)
        capacity = int(index.starts[episodes.stop] - index.starts[episodes.start])
        self.actions = np.empty((capacity, action_dim), np.float32)
        self.proprio: np.ndarray | None = None
        raw = {short: self._column(index, path) for short, path in paths.items()}
        starts, frames, texts, unlabelled = [0], [], [], 0
        table: dict[str, int] = {}
        for episode in episodes:
            first, stop = int(index.starts[episode]), int(index.starts[episode + 1])
            place = index.place(first)[:2]
            found = spec.standardise(
                {short: column(episode, first, stop) for short, column in raw.items()}
            )
            instruction = _instruction(found)
            if not instruction:
                unlabelled += 1
                continue
            begin, end, _ = found.keep.indices(stop - first)
            if end <= begin:
                continue
            action = found.action[begin:end]
            if action.shape[1] != action_dim:
                problem = f"actions have {action.shape[1]} dimensions, the model {action_dim}"
                raise FeatureError(problem, *place)
            if not np.isfinite(action).all():
                raise FeatureError("an action is not finite", *place)
            self._append(starts[-1], action, found, slice(begin, end), capacity)
            starts.append(starts[-1] + end - begin)
            frames.append(first + begin)
            texts.append(table.setdefault(instruction, len(table)))
        if unlabelled:
            log.info("%s: %d of %d trajectories have no text", name, unlabelled, len(episodes))
        if not frames:
            raise DataError(f"{name}: no trajectory with text", index.shards[0].parent)
        self.starts = np.array(starts, np.int64)
        self._frames = np.array(frames, np.int64)
        self.text = np.array(texts, np.int32)
        self.instructions = list(table)
        self.actions = self.actions[: starts[-1]]
        self.proprio = None if self.proprio is None else self.proprio[: starts[-1]]
        self.image_sizes = {role: self._first_size(path) for role, path in cameras.items()}

    def _append(
        self, row: int, action: np.ndarray, found: Trajectory, keep: slice, capacity: int
    ) -> None:
        self.actions[row : row + len(action)] = action
        if found.proprio is not None:
            if self.proprio is None:
                self.proprio = np.empty((capacity, found.proprio.shape[1]), np.float32)
            self.proprio[row : row + len(action)] = found.proprio[keep]

    @staticmethod
    def _column(index: RLDSIndex, path: str):
        """Reads one feature of one episode."""
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

    def _first_size(self, path: str) -> tuple[int, int]:
        height, width = self.index.features[path].shape[:2]
        if height is not None and width is not None:
            return height, width
        for frame in self._frames:
            data = self.index.read(path, int(frame), int(frame))[0]
            if len(data):
                return image_size(data)
        raise DataError(f"{self.name}: camera {path!r} has no images", self.index.shards[0].parent)

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

    def count_windows(self, window: int, left_pad: bool) -> int:
        """Fixes the windows that `locate` numbers, and counts them."""
        counts = windows.num_windows(self.lengths, window, left_pad)
        self._window_starts = np.concatenate([[0], np.cumsum(counts)])
        self._first_end = 0 if left_pad else window - 1
        return int(self._window_starts[-1])

    def locate(
        self, numbers: Int64[np.ndarray, "n"]
    ) -> tuple[Int64[np.ndarray, "n"], Int64[np.ndarray, "n"]]:
        """Trajectory and last frame (within it) of each window."""
        trajectory = np.searchsorted(self._window_starts, numbers, side="right") - 1
        return trajectory, numbers - self._window_starts[trajectory] + self._first_end

    def chunks(
        self,
        trajectory: Int64[np.ndarray, "n"],
        ends: Int64[np.ndarray, "n"],
        window: int,
        chunk: int,
    ) -> tuple[Float32[np.ndarray, "n w f a"], Bool[np.ndarray, "n w f"]]:
        """Actions supervised at every step of the windows, and which count."""
        lengths = self.starts[trajectory + 1] - self.starts[trajectory]
        frames, mask = windows.chunks(ends, lengths, window, chunk)
        return self.actions[self.starts[trajectory][:, None, None] + frames], mask

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
        base, first = int(self._frames[trajectory]), int(frames[0])
        path = self._cameras[role]
        views = self.index.read(path, base + first, base + int(frames[-1]))
        present = np.ones(len(frames), bool)
        for row, frame in enumerate(frames.tolist()):
            data = views[frame - first]
            present[row] = len(data) > 0
            if row and frame == frames[row - 1]:
                out[row] = out[row - 1]
                continue
            try:
                decode_into(data, out[row])
            except ImageDecodeError as error:
                problem = f"dataset {self.name!r}, camera {role!r} ({path}): {error.problem}"
                raise ImageDecodeError(problem, *self.index.place(base + frame)) from error
        return present


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
) -> Dataset:
    """Opens, and if need be indexes, one split of one dataset.

    Args:
        name: for messages.
        spec: how it is standardised.
        directory: version folder.
        split: TFDS split.
        cameras: roles that are needed.
        action_dim: a, which the spec must produce.
        part: all of its trajectories, all but the last `held_out` ("head"), or those ("tail").
        held_out: as a share of the trajectories; at least one if any.
        cache_dir: where indices live; see `open_index`.
        rebuild: index anew.

    Raises:
        DataError: listing every camera and feature that is missing.
    """
    folder = FilePath(directory).expanduser()
    features = load_features(folder / "features.json")
    problems: list[str] = []
    images = _find_cameras(spec, features, cameras, problems)
    paths = {short: _find(features, path) for short, path in spec.features.items()}
    for short, found in paths.items():
        if found is None:
            problems.append(f"no feature {spec.features[short]!r}")
    if problems:
        raise FeatureError(f"{name}: {'; '.join(problems)}. It has {sorted(features)}", folder)
    columns = {short: found for short, found in paths.items() if found}
    index = open_index(folder, split, sorted(columns.values()), cache_dir, rebuild)
    total = index.num_episodes
    held = min(max(1, round(total * held_out)), total - 1) if held_out > 0 else 0
    parts = {"all": range(total), "head": range(total - held), "tail": range(total - held, total)}
    if not parts[part]:
        problem = f"{name}: split {split!r} has {total} trajectories, too few to hold some out"
        raise DataError(problem + f" ({held_out=})", folder)
    return Dataset(name, spec, index, columns, images, parts[part], action_dim)


def _find_cameras(
    spec: DatasetSpec, features: Mapping[str, Feature], cameras: Sequence[str], problems: list[str]
) -> dict[str, str]:
    found = {}
    for role in cameras:
        path = _find(features, spec.images[role]) if role in spec.images else None
        if path is None:
            have = {r: p for r, p in spec.images.items() if _find(features, p)}
            problems.append(f"no camera {role!r}; its cameras are {have}")
        else:
            found[role] = path
    return found


def _find(features: Mapping[str, Feature], path: Path) -> str | None:
    candidates = [path] if isinstance(path, str) else list(path)
    spelled = [p for c in candidates for p in (STEPS + c, c)]
    return next((p for p in spelled if p in features), None)


def _instruction(found: Trajectory) -> str:
    if isinstance(found.language, str):
        return found.language
    return next((str(text) for text in found.language[found.keep] if text), "")
