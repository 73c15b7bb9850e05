"""The trajectories of a dataset: as they were recorded, and in the units a model trains in.

Nothing here is ever changed in place: `vla_jax.data.open_dataset` makes a `Dataset`,
`vla_jax.data.units.prepare` makes a `Prepared` of it, and the arrays of both refuse to be written.

Axis letters: e trajectories, k = e + 1, m texts, n frames or samples, w window, f chunk, a action
dimension, p state dimension.
"""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int32, Int64, UInt8

from vla_jax.data.decode import decode_into
from vla_jax.data.errors import ImageDecodeError, Skips
from vla_jax.data.filters import moving
from vla_jax.data.sampler import Windows
from vla_jax.data.source import Source
from vla_jax.data.spec import DatasetSpec
from vla_jax.data.units.policy_units import PolicyUnits
from vla_jax.moved import names_of

log = logging.getLogger(__name__)

_ROWS = 1 << 12  # whose chunks are scaled at a time


@dataclass(frozen=True, eq=False, kw_only=True)
class Trajectories:
    """What the trajectories of one split have whatever their units: texts, windows and images.

    Attributes:
        name: what statistics and action specs are keyed by.
        spec: how the dataset is standardized.
        source: where images are read from.
        cameras: role -> image feature of the source.
        starts: first row of each trajectory in the arrays of numbers, and the end of the last.
        first_frames: of each trajectory, its first frame in the source.
        strides: of each trajectory, frames of the source from one kept frame to the next.
        swapped: of each trajectory, 1 where the cameras of `spec.swap` are exchanged.
        text: indices into `instructions`, of one trajectory after another.
        text_starts: the first of each trajectory in `text`; each has at least one.
        instructions: the distinct instructions.
        sizes: image feature -> (height, width) of its first image.
        varied: image features whose images differ in size, which is worth no further warning.
        skips: counts what was wrong and has been left out.
        unused: reason -> how many sound trajectories are not used.
        fast_dct: see `vla_jax.data.decode.decode`.
        may_end: True at the frames where a window may end; None = everywhere.
    """

    name: str
    spec: DatasetSpec
    source: Source
    cameras: Mapping[str, str]
    starts: Int64[np.ndarray, "k"]
    first_frames: Int64[np.ndarray, "e"]
    strides: Int64[np.ndarray, "e"]
    swapped: Int64[np.ndarray, "e"]
    text: Int32[np.ndarray, "m"]
    text_starts: Int64[np.ndarray, "k"]
    instructions: Sequence[str]
    sizes: Mapping[str, tuple[int, int]]
    varied: set[str] = field(default_factory=set)
    skips: Skips
    unused: Mapping[str, int]
    fast_dct: bool = True
    may_end: Bool[np.ndarray, "n"] | None = None

    def __post_init__(self):
        for spec in dataclasses.fields(self):
            value = getattr(self, spec.name)
            if isinstance(value, np.ndarray):
                # Datasets that were made of one another share their arrays, so a write would reach
                # all of them.
                value.flags.writeable = False

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def lengths(self) -> Int64[np.ndarray, "e"]:
        """Kept frames of each trajectory."""
        return np.diff(self.starts)

    @property
    def image_sizes(self) -> dict[str, tuple[int, int]]:
        """Camera role -> (height, width) of its first image; a view it lacks is absent."""
        return {role: self.sizes[path] for role, path in self.cameras.items()}

    @property
    def digest(self) -> str:
        """Changes when the frames that are used would, or their texts."""
        places = (self.first_frames, self.strides, self.swapped)
        parts = (*places, self.text, self.text_starts, self.may_end)
        blobs = [b"" if part is None else part.tobytes() for part in parts]
        blobs.append(json.dumps(list(self.instructions)).encode())
        return hashlib.sha256(b"".join(blobs)).hexdigest()

    def in_source(self) -> tuple[list[str], Int64[np.ndarray, "e"]]:
        """Paths of the images that are used, and the source's number of each trajectory."""
        # A trajectory may begin behind its episode's first frame, which a spec may drop.
        episodes = np.searchsorted(self.source.starts, self.first_frames, side="right") - 1
        return sorted(set(self.cameras.values())), episodes

    def windows(self, window: int, left_pad: bool, segment: bool) -> Windows:
        """The windows that may be drawn, by number."""
        return Windows(self.lengths, window, left_pad, segment, self.may_end)

    def images(
        self,
        role: str,
        trajectory: int,
        frames: Int64[np.ndarray, "w"],
        out: UInt8[np.ndarray, "w h x 3"],
    ) -> Bool[np.ndarray, "w"]:
        """Decodes one window of one camera into `out`; says which frames have an image."""
        if role not in self.cameras:
            out[...] = 0
            return np.zeros(len(frames), bool)
        path, start, stop = self.span(role, trajectory, frames)
        base = int(self.first_frames[trajectory])
        recorded, first = frames * int(self.strides[trajectory]), start - base
        # One request for the whole window, since sources read what lies side by side at once.
        views = self.source.read(path, start, stop)
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
                if size != self.sizes[path] and present[row]:
                    self._tell_size(path, size, base + frame)
            except ImageDecodeError as error:
                problem = f"dataset {self.name!r}, camera {role!r} ({path}): {error.problem}"
                raise ImageDecodeError(problem, *self.source.place(base + frame)) from error
        return present

    def span(
        self, role: str, trajectory: int, frames: Int64[np.ndarray, "w"]
    ) -> tuple[str, int, int]:
        """What the source is asked for to get a window: a camera, the first and the last frame."""
        base, stride = int(self.first_frames[trajectory]), int(self.strides[trajectory])
        first, last = base + int(frames[0]) * stride, base + int(frames[-1]) * stride
        return self._path(role, trajectory), first, last

    def _tell_size(self, path: str, size: tuple[int, int], frame: int) -> None:
        """Warns once of an image that is not as large as its camera's others."""
        if path not in self.varied:
            self.varied.add(path)
            log.warning(
                "%s: camera %r: an image is %d x %d, not %d x %d, and is brought to the size of "
                "the others: %s, episode %d, frame %d",
                self.name, path, *size, *self.sizes[path], *self.source.place(frame),
            )  # fmt: skip

    def _path(self, role: str, trajectory: int) -> str:
        """The image feature that plays a role in a trajectory."""
        swap = self.spec.swap or ()
        if role in swap and self.swapped[trajectory]:
            # The partner plays the role, unless the dataset was opened without it.
            role = next(r for r in (swap[1 - swap.index(role)], role) if r in self.cameras)
        return self.cameras[role]


@dataclass(frozen=True, eq=False, kw_only=True)
class Dataset(Trajectories):
    """The trajectories of one split as recorded: standardized, in robot units.

    Attributes:
        actions: of the kept frames of all trajectories, one after another.
        proprio: the robot's states at the same frames, or None.
    """

    actions: Float32[np.ndarray, "n a"]
    proprio: Float32[np.ndarray, "n p"] | None

    def without_idle(self, threshold: float, chunk: int) -> "Dataset":
        """The same with no window that ends where the robot idles for a whole chunk.

        Args:
            threshold: largest motion that counts as none, in robot units.
            chunk: f.
        """
        may_end = moving(self.actions, self.starts, chunk, threshold, self.spec.has_gripper)
        idle = int((~may_end).sum())
        log.info("%s: data.filters.noop leaves out %d of %d frames", self.name, idle, len(self))
        return dataclasses.replace(self, may_end=may_end)


@dataclass(frozen=True, eq=False, kw_only=True)
class Prepared(Trajectories):
    """The trajectories of one split in model units; `vla_jax.data.units.prepare` makes it.

    Attributes:
        actions: of the kept frames of all trajectories, one after another; in model units, unless
            there are `chunk_units`.
        proprio: the states at the same frames, likewise; None where no state is needed.
        chunk_units: brings a chunk to model units with the state that it starts from, so that a
            row by itself has none and stays as recorded; None where rows are in model units.
    """

    actions: Float32[np.ndarray, "n a"]
    proprio: Float32[np.ndarray, "n p"] | None
    chunk_units: PolicyUnits | None = None

    def numbers(
        self,
        trajectory: Int64[np.ndarray, "n"],
        frames: Int64[np.ndarray, "n w f"],
        seen: Int64[np.ndarray, "n w"],
    ) -> tuple[Float32[np.ndarray, "n w f a"], Float32[np.ndarray, "n w p"] | None]:
        """Actions and states of windows, in model units.

        Args:
            trajectory: of each window.
            frames: of the actions at each of its steps.
            seen: its steps, of which the states are.

        Returns:
            The chunks, and the states where there are any.
        """
        # Frames are counted within their trajectory, rows over all of them.
        first = self.starts[trajectory]
        chunks = self.actions[first[:, None, None] + frames]
        if self.proprio is None:
            return chunks, None
        states = self.proprio[first[:, None] + seen]
        if self.chunk_units is None:
            return chunks, states
        scaled = self.chunk_units.prepare_actions(chunks, states).astype(np.float32)
        return scaled, self.chunk_units.prepare_state(states).astype(np.float32)

    def mean_action(self, chunk: int) -> Float64[np.ndarray, "a"]:
        """The mean of all actions in model units.

        Args:
            chunk: f; with `chunk_units` it is the mean over the chunks that start at all frames,
                as far as they lie in their trajectories.
        """
        # Millions of numbers are added up, too many for float32.
        if self.chunk_units is None or self.proprio is None:
            return self.actions.mean(0, dtype=np.float64)
        ends = np.repeat(self.starts[1:], self.lengths)
        total, count = np.zeros(self.actions.shape[1]), 0
        for row in range(0, len(self), _ROWS):
            rows = np.arange(row, min(row + _ROWS, len(self)))
            frames = rows[:, None] + np.arange(chunk)
            inside = frames < ends[rows, None]
            # Clamped so that every row can be looked up; `inside` keeps the repeated ones out of
            # the mean.
            chunks = self.actions[np.minimum(frames, ends[rows, None] - 1)]
            scaled = self.chunk_units.prepare_actions(chunks, self.proprio[rows])
            total += scaled[inside].sum(0, dtype=np.float64)
            count += int(inside.sum())
        return total / count

    @property
    def gripper_middle(self) -> float:
        """The number in model units above which the last number of an action is an open gripper."""
        middle = np.full((1, self.actions.shape[1]), 0.5)  # recorded from 0 = closed to 1 = open
        if self.chunk_units is None or self.proprio is None:
            return float(middle[0, -1])
        return float(self.chunk_units.prepare_actions(middle, self.proprio[0])[0, -1])


__getattr__ = names_of(__name__)
