"""Faults in the pictures: frozen, black or doubled cameras, and those out of step with the robot.

Some episodes are looked at, spread over the dataset, and of each a run of frames; what is kept of a
frame is a small grid of gray levels, so memory does not depend on the size of the images.

Axis letters: n frames, h x image height and width, r c rows and columns of the grid.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from jaxtyping import Bool, Float32, UInt8

from vla_jax.data.dataset import Dataset
from vla_jax.data.errors import DataError
from vla_jax.data.quality.issue import Issue, recorded_numbers
from vla_jax.data.quality.motion import repeats

EPISODES, FRAMES = 12, 120  # looked at, of each camera: a few seconds of JPEGs
_SECONDS = 30.0  # after which no further episode of a camera is begun: videos decode slowly
_READ = 16  # frames decoded at a time
_GRID = 24  # cells a side; an arm that moves by a hundredth of the picture changes several of them
# Gray levels by which every cell of a frozen picture may differ from its first: what is left of
# video compression. Sensors have noise of 0.5 and more, so a living camera differs by itself.
_STILL = 0.25
# A picture stands still for this share of the frames looked at, and for so many, ...
_FROZEN_SHARE, _FROZEN_FRAMES = 0.25, 8
# ... while the robot moves in half of them at a quarter of its usual speed or faster.
_MOVES_SHARE, _MOVES = 0.5, 0.25
_BLACK = 12.0  # gray level that no cell of a black picture exceeds: noise of a covered lens
_PLAIN = 2.0  # span of gray levels of a picture of one color, as dead cameras send (green, blue)
_BLACK_SHARE = 0.2  # of the frames looked at: a flash of black at the start is none
_ALIKE = 1.0  # mean difference of two cameras' gray levels: one picture, encoded twice
_ALIKE_SHARE = 0.9
# Cameras and robots are some 0.1 s late by themselves.
_LATE_SECONDS, _LATE_FRAMES = 0.25, 3
# Below so many frames, or a correlation of so much, nothing can be said; and the correlation at
# the other delay must exceed that in step by so much (sound sets: -0.2 to 0.1 for 700 frames).
_SEEN, _CORRELATED, _BETTER = 200, 0.35, 0.2


@dataclass(frozen=True)
class Look:
    """What is kept of the first frames of one camera of one trajectory.

    Attributes:
        trajectory: its number in the dataset.
        cells: float32 [n, r, c], gray levels from 0 to 255.
        same: bool [n - 1], whether a frame is the one before it, pixel for pixel.
    """

    trajectory: int
    cells: Float32[np.ndarray, "n r c"]
    same: Bool[np.ndarray, "steps"]


def look(dataset: Dataset, role: str) -> tuple[list[Look], list[Issue]]:
    """Decodes the first frames of some trajectories; frames without an image end them.

    Returns:
        What was seen, and what could not be read.
    """
    looks, issues, began = [], [], time.monotonic()
    count = len(dataset.lengths)
    for trajectory in np.unique(np.linspace(0, count - 1, EPISODES).round().astype(int)).tolist():
        if time.monotonic() - began > _SECONDS:
            break
        try:
            looks.append(_look(dataset, role, trajectory))
        except DataError as error:
            issues.append(
                Issue(
                    "camera_unreadable",
                    f"camera {role!r}: {error}",
                    "Restore the file, or leave such parts out with data.on_error=skip",
                    recorded_numbers(dataset, [trajectory]),
                    role,
                )
            )
    return looks, issues


def _look(dataset: Dataset, role: str, trajectory: int) -> Look:
    height, width = dataset.image_sizes[role]
    buffer = np.empty((_READ, height, width, 3), np.uint8)
    total = min(int(dataset.lengths[trajectory]), FRAMES)
    cells, same, last = [], [], None
    for first in range(0, total, _READ):
        frames = np.arange(first, min(first + _READ, total))
        views = buffer[: len(frames)]
        present = dataset.images(role, trajectory, frames, views)
        for view, is_there in zip(views, present, strict=True):
            if not is_there:
                return _join(trajectory, cells, same)
            cells.append(_cells(view))
            if last is not None:
                same.append(bool(np.array_equal(view, last)))
            last = view
        # The buffer is written over by what is read next.
        last = None if last is None else last.copy()
    return _join(trajectory, cells, same)


def _join(trajectory: int, cells: list[np.ndarray], same: list[bool]) -> Look:
    grid = np.stack(cells) if cells else np.zeros((0, _GRID, _GRID), np.float32)
    return Look(trajectory, grid, np.array(same, bool))


def _cells(view: UInt8[np.ndarray, "h x 3"]) -> Float32[np.ndarray, "r c"]:
    gray = view.mean(axis=-1, dtype=np.float32)
    for axis in (0, 1):
        # An image with fewer lines than cells has some of them in several cells.
        edges = np.linspace(0, gray.shape[axis], min(_GRID, gray.shape[axis]) + 1).astype(int)
        sums = np.add.reduceat(gray, edges[:-1], axis=axis)
        gray = sums / np.expand_dims(np.diff(edges).astype(np.float32), 1 - axis)
    return gray


def check(
    dataset: Dataset, looks: Mapping[str, Sequence[Look]], speed: Float32[np.ndarray, "rows"]
) -> list[Issue]:
    """All checks of what was seen.

    Args:
        dataset: opened, not normalized.
        looks: {role: see `look`}.
        speed: of the robot at every row of the dataset, see `motion.speeds`.
    """
    issues = [
        issue
        for role, role_looks in looks.items()
        for role_issues in (
            _black(dataset, role, role_looks),
            _frozen(dataset, role, role_looks, speed),
            _repeated(dataset, role, role_looks),
            _out_of_step(dataset, role, role_looks, speed),
        )
        for issue in role_issues
    ]
    for pair in combinations(looks, 2):
        issues += _doubled(dataset, pair, [looks[role] for role in pair])
    return issues


def _black(dataset: Dataset, role: str, looks: Sequence[Look]) -> list[Issue]:
    bad = [view.trajectory for view in looks if _is_black(view.cells).mean() > _BLACK_SHARE]
    if not bad:
        return []
    return [
        Issue(
            "camera_black",
            f"camera {role!r} is black, or of one color, in {len(bad)} of {len(looks)} episodes",
            "Was it covered, unplugged or never there? Leave the view out of the spec, or these "
            "episodes (data.filters.episodes)",
            recorded_numbers(dataset, bad),
            role,
        )
    ]


def _is_black(cells: Float32[np.ndarray, "n r c"]) -> Bool[np.ndarray, "n"]:
    if not len(cells):
        return np.zeros(1, bool)
    low, high = cells.min(axis=(1, 2)), cells.max(axis=(1, 2))
    return (high < _BLACK) | (high - low < _PLAIN)


def _frozen(
    dataset: Dataset, role: str, looks: Sequence[Look], speed: Float32[np.ndarray, "rows"]
) -> list[Issue]:
    bad, first = [], ""
    for look in looks:
        n, begin = len(look.cells), int(dataset.starts[look.trajectory])
        # A black picture is frozen too, and is named as what it is.
        if n < _FROZEN_FRAMES or _is_black(look.cells).mean() > _BLACK_SHARE:
            continue
        start, stop = _longest_still(look.cells)
        moves = speed[begin + start : begin + stop - 1] > _MOVES
        if stop - start >= max(_FROZEN_FRAMES, _FROZEN_SHARE * n) and moves.mean() >= _MOVES_SHARE:
            number = recorded_numbers(dataset, [look.trajectory])[0]
            first = first or f"frames {start} to {stop - 1} of episode {number} show one picture"
            bad.append(look.trajectory)
    if not bad:
        return []
    return [
        Issue(
            "camera_frozen",
            f"camera {role!r} is frozen while the robot moves, in {len(bad)} of {len(looks)} "
            f"episodes: {first}",
            "Look for a driver that repeats its last picture, or a camera on what does not move; "
            "leave these episodes out (data.filters.episodes)",
            recorded_numbers(dataset, bad),
            role,
        )
    ]


def _longest_still(cells: Float32[np.ndarray, "n r c"]) -> tuple[int, int]:
    """The longest run of frames that all look like its first one: (first, end)."""
    best, start = (0, 1), 0
    for frame in range(1, len(cells) + 1):
        # Against the first and not the one before: a slow motion adds up.
        still = frame < len(cells) and np.abs(cells[frame] - cells[start]).max() < _STILL
        if not still:
            best = max(best, (start, frame), key=lambda run: run[1] - run[0])
            start = frame
    return best


def _repeated(dataset: Dataset, role: str, looks: Sequence[Look]) -> list[Issue]:
    """Pictures that come regularly twice, or thrice: a camera slower than the rows."""
    looks = [view for view in looks if len(view.cells) > 1]
    if not looks:
        return []
    # Between two episodes there is a step too, which `repeats` does not look at.
    same = np.concatenate([np.append(view.same, False) for view in looks])[:-1]
    starts = np.cumsum([0, *(len(view.cells) for view in looks)])
    times, hz = repeats(same, starts), dataset.spec.hz
    if times == 1:
        return []
    slower = f"{hz / times:g} pictures a second, not {hz:g}" if hz else "fewer pictures than rows"
    return [
        Issue(
            "camera_rate",
            f"camera {role!r} shows every picture {times} times: {slower}",
            f"Keep every {times}th frame (`Trajectory.keep`), or see why it is so slow",
            camera=role,
        )
    ]


def _doubled(
    dataset: Dataset, roles: tuple[str, str], looks: Sequence[Sequence[Look]]
) -> list[Issue]:
    first, second = ({view.trajectory: view.cells for view in role_looks} for role_looks in looks)
    bad, both = [], sorted(first.keys() & second.keys())
    for trajectory in both:
        a, b = first[trajectory], second[trajectory]
        n = min(len(a), len(b))
        # Two dead cameras are alike, and are named as black.
        if not n or a.shape[1:] != b.shape[1:] or _is_black(a[:n]).mean() > _BLACK_SHARE:
            continue
        alike = np.abs(a[:n] - b[:n]).mean(axis=(1, 2)) < _ALIKE
        if alike.mean() >= _ALIKE_SHARE:
            bad.append(trajectory)
    if not bad:
        return []
    return [
        Issue(
            "camera_doubled",
            f"cameras {roles[0]!r} and {roles[1]!r} show the same in {len(bad)} of {len(both)} "
            "episodes",
            "One of them was recorded under both names; leave one out of the spec",
            recorded_numbers(dataset, bad),
            roles[1],
        )
    ]


def _out_of_step(
    dataset: Dataset, role: str, looks: Sequence[Look], speed: Float32[np.ndarray, "rows"]
) -> list[Issue]:
    """Pictures that move when the robot did some frames before, or will some frames after."""
    hz = dataset.spec.hz
    near = max(_LATE_FRAMES, int(np.ceil(_LATE_SECONDS * hz))) if hz else _LATE_FRAMES
    looks = [view for view in looks if len(view.cells) > 8 * near]
    pictures = [np.abs(np.diff(view.cells, axis=0)).mean(axis=(1, 2)) for view in looks]
    if sum(map(len, pictures)) < _SEEN:
        return []
    reach = min(6 * near, min(map(len, pictures)) // 3)
    rows = [slice(int(a := dataset.starts[s.trajectory]), a + len(s.cells) - 1) for s in looks]
    size = np.linalg.norm(
        dataset.actions[:, : -1 if dataset.spec.has_gripper else None]
        / np.maximum(dataset.actions.std(axis=0), 1e-9)[: -1 if dataset.spec.has_gripper else None],
        axis=1,
    )
    # Where actions are places and not motions, only their changes say when the robot moves.
    signals = [speed, size, np.abs(np.diff(size, append=size[-1:]))]
    curves = np.stack(
        [correlations(pictures, [signal[r] for r in rows], reach) for signal in signals]
    )
    best = int(curves.max(axis=0).argmax())
    late, peak = best - reach, float(curves.max())
    in_step = float(curves[:, reach - near : reach + near + 1].max())
    if abs(late) <= near or peak < _CORRELATED or peak - in_step < _BETTER:
        return []
    when = "behind" if late > 0 else "ahead of"
    seconds = f" ({abs(late) / hz:.2g} s)" if hz else ""
    return [
        Issue(
            "camera_out_of_step",
            f"camera {role!r} is about {abs(late)} frames{seconds} {when} the robot: pictures move "
            f"with its motion at that delay (correlation {peak:.2f}), not in step ({in_step:.2f})",
            "Align them by their own times where they are recorded; a policy learns from what it "
            "will not see at that moment",
            recorded_numbers(dataset, [view.trajectory for view in looks]),
            role,
        )
    ]


def correlations(
    pictures: Sequence[np.ndarray], robot: Sequence[np.ndarray], reach: int
) -> np.ndarray:
    """Correlation of two courses over all episodes, the first -reach ... reach frames later."""
    sums, weights = np.zeros(2 * reach + 1), np.zeros(2 * reach + 1)
    for picture, motion in zip(pictures, robot, strict=True):
        a, b = _standard(picture), _standard(motion)
        for i, late in enumerate(range(-reach, reach + 1)):
            u, v = (a[late:], b[: len(b) - late]) if late >= 0 else (a[:late], b[-late:])
            sums[i] += u @ v
            weights[i] += len(u)
    return sums / weights


def _standard(course: np.ndarray) -> np.ndarray:
    # Motion has a few large values; their logarithm lets the small ones count as well.
    course = np.log(course + 0.05 * course.mean() + 1e-6)
    deviation = course.std()
    return (course - course.mean()) / deviation if deviation > 1e-6 else np.zeros_like(course)
