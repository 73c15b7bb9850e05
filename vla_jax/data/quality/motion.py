"""Faults in the numbers: jumps of the state, still grippers, repeated rows, repeated episodes.

Axis letters: e trajectories, n frames, d state dimensions, a action dimensions, k sampled points.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float32

from vla_jax.data.dataset import Dataset
from vla_jax.data.quality.issue import Issue, recorded_numbers

# A jump crosses more than this share of what a dimension covers, in one step, ...
_JUMP = 0.25
# ... and is this many times what all but 1 % of its steps are: a fast robot at a low rate crosses
# much in every step, and that is how it moves.
_RARE = 10.0
_WRAP = 0.02  # share by which a step may differ from a full turn and still be an angle that wraps
# A dimension that jumps in this share of the trajectories behaves so: a gripper that snaps shut.
_USUAL = 0.3
_FEW_VALUES = 12  # values of a switch, whose every change is a jump
# A gripper that moves in this share of the trajectories is expected to move in the others.
_GRASPS, _JUDGED = 0.95, 20
_REPEATS = 0.8  # share of the rows that stand equally often in data at a multiple of their rate
_POINTS = 16  # of a trajectory, that it is compared by
# Distance of two trajectories in deviations of each number (root mean square). Two recordings of
# one task by one person differ by 0.3 and more, copies that went through float16 by 1e-3.
_NEAR = 0.01
_NEIGHBORS = 8  # along each of a few random directions; copies lie side by side along all of them
_MOST = 20_000  # trajectories compared with each other


def speeds(dataset: Dataset) -> Float32[np.ndarray, "n"]:
    """How fast the robot moves at each frame, in units of its usual speed.

    From the state if there is one, else from the actions, which may be motions or places.
    """
    values = dataset.actions if dataset.proprio is None else dataset.proprio
    steps = np.diff(values, axis=0, append=values[-1:])
    steps[dataset.starts[1:] - 1] = 0  # from one trajectory into the next
    size = np.linalg.norm(steps / _deviations(values), axis=1)
    if dataset.proprio is None:
        size = np.maximum(size, np.linalg.norm(values / _deviations(values), axis=1))
    moving = size[size > 0]
    return (size / np.median(moving) if len(moving) else size).astype(np.float32)


def _deviations(values: np.ndarray) -> np.ndarray:
    deviations = values.std(axis=0)
    # A number that never changes says nothing, whatever it is divided by.
    return np.where(deviations > 1e-9, deviations, np.inf)


def jumps(dataset: Dataset) -> list[Issue]:
    """Steps of the state that no robot makes: teleports, glitches, episodes glued together."""
    state = dataset.proprio
    if state is None or len(state) < 3:
        return []
    inside = _inside(dataset)
    steps = np.abs(np.diff(state, axis=0))[inside]
    rows = np.flatnonzero(inside)
    low, high = np.quantile(state, (0.01, 0.99), axis=0)
    usual = np.quantile(steps, 0.99, axis=0) if len(steps) else np.zeros(state.shape[1])
    limit = np.maximum(_JUMP * (high - low), _RARE * usual)
    turn = np.abs(steps / (2 * np.pi) - 1) < _WRAP
    jumped = (steps > limit) & (high > low) & ~turn
    trajectory = np.searchsorted(dataset.starts, rows, side="right") - 1
    for i in range(state.shape[1]):
        often = len(np.unique(trajectory[jumped[:, i]])) > max(1, _USUAL * len(dataset.lengths))
        if often or len(np.unique(state[:, i])) <= _FEW_VALUES:
            jumped[:, i] = False
    frames = np.flatnonzero(jumped.any(axis=1))
    if not len(frames):
        return []
    dims = np.flatnonzero(jumped.any(axis=0)).tolist()
    first = int(frames[0])
    place = int(rows[first] - dataset.starts[trajectory[first]])
    number = recorded_numbers(dataset, [int(trajectory[first])])[0]
    return [
        Issue(
            "state_jump",
            f"the state jumps {len(frames)} times, in dimensions {dims}; the first time behind "
            f"frame {place} of episode {number}",
            "Look for lost messages, a reset in the middle or two recordings in one episode, and "
            "cut there or leave these episodes out (data.filters.episodes)",
            recorded_numbers(dataset, np.unique(trajectory[frames]).tolist()),
        )
    ]


def gripper(dataset: Dataset) -> list[Issue]:
    """Grippers that never move: in the whole dataset, or where nearly all others do."""
    if not dataset.spec.has_gripper:
        return []
    command = dataset.actions[:, -1]
    changes = np.zeros(len(command), bool)
    changes[:-1] = (np.abs(np.diff(command)) > 0.1) & _inside(dataset)
    moves = np.add.reduceat(changes, dataset.starts[:-1]) > 0
    if command.min() == command.max():
        return [
            Issue(
                "gripper_still",
                f"the gripper never moves: always {command[0]:g}",
                "If the robot has one, `standardise` takes the wrong number for it",
            )
        ]
    if len(moves) < _JUDGED or not _GRASPS <= moves.mean() < 1:
        return []
    return [
        Issue(
            "gripper_still",
            f"the gripper never moves in {int((~moves).sum())} trajectories, though it does in "
            f"{moves.mean():.0%} of them",
            "Were they cut short, or is the command missing? See whether they fulfil their task",
            recorded_numbers(dataset, np.flatnonzero(~moves).tolist()),
        )
    ]


def rate(dataset: Dataset, recorded_hz: float | None) -> list[Issue]:
    """A control rate that is not what the spec says.

    Args:
        dataset: opened, not normalized.
        recorded_hz: frames a second as the dataset's own files say it, if they do.
    """
    issues, spec_hz = [], dataset.spec.hz
    stride = int(np.median(dataset.strides))
    if recorded_hz and spec_hz and abs(spec_hz * stride / recorded_hz - 1) > 0.05:
        issues.append(
            Issue(
                "control_rate",
                f"the spec says {spec_hz:g} actions a second, the dataset's files "
                f"{recorded_hz / stride:g}",
                "Correct `hz`: a robot served at another rate moves too fast or too slow",
            )
        )
    values = [dataset.actions] if dataset.proprio is None else [dataset.actions, dataset.proprio]
    same = np.all([np.all(v[1:] == v[:-1], axis=1) for v in values], axis=0)
    times = repeats(same & _inside(dataset), dataset.starts)
    if times > 1:
        really = f"{spec_hz:g} a second are really {spec_hz / times:g}" if spec_hz else ""
        fewer = really or "the rate is lower"
        issues.append(
            Issue(
                "control_rate",
                f"every row stands {times} times: {fewer}",
                f"Keep every {times}th frame (`Trajectory.keep = slice(None, None, {times})`) and "
                "divide `hz` by it",
            )
        )
    return issues


def repeats(same: Bool[np.ndarray, "steps"], starts: np.ndarray | Sequence[int]) -> int:
    """How often each row stands, of rows at a multiple of their own rate; 1 if it is no multiple.

    Args:
        same: whether a row equals the one before it.
        starts: first row of each trajectory, and the number of rows.
    """
    begins = np.concatenate([[True], ~same])
    begins[np.asarray(starts[:-1])] = True
    lengths = np.diff(np.append(np.flatnonzero(begins), len(begins)))
    # The last run of a trajectory may be cut, and a robot that waits repeats its row for long.
    moving = lengths[lengths <= 8]
    if len(moving) < _JUDGED:
        return 1
    usual = int(np.median(moving))
    return usual if (moving == usual).mean() >= _REPEATS else 1


def near_duplicates(dataset: Dataset) -> list[Issue]:
    """Episodes that were recorded once and stand there twice."""
    count = len(dataset.lengths)
    chosen = np.unique(np.linspace(0, count - 1, min(count, _MOST)).round().astype(int))
    values = dataset.actions
    if dataset.proprio is not None:
        values = np.concatenate([values, dataset.proprio], axis=1)
    deviations = _deviations(values)
    if count < 2 or not np.isfinite(deviations).any():
        return []
    rows = [
        (dataset.starts[e] + np.linspace(0, dataset.lengths[e] - 1, _POINTS)).round().astype(int)
        for e in chosen.tolist()
    ]
    points = (values[np.stack(rows)] / deviations).reshape(len(chosen), -1)
    # Numbers that never change do not count as equal.
    weight = np.isfinite(deviations).sum() * _POINTS
    lengths = dataset.lengths[chosen]
    directions = np.random.default_rng(0).standard_normal((points.shape[1], 3))
    pairs = set()
    for column in (points @ directions).T:
        order = np.argsort(column, kind="stable")
        for ahead in range(1, min(_NEIGHBORS, count - 1) + 1):
            first, second = order[:-ahead], order[ahead:]
            distance = np.sqrt(((points[first] - points[second]) ** 2).sum(axis=1) / weight)
            alike = np.abs(lengths[first] - lengths[second]) <= 0.02 * lengths[first]
            for i in np.flatnonzero((distance < _NEAR) & alike).tolist():
                pairs.add(tuple(sorted((int(first[i]), int(second[i])))))
    if not pairs:
        return []
    a, b = min(pairs)
    shown = [recorded_numbers(dataset, [int(chosen[i])])[0] for i in (a, b)]
    copies = sorted({int(chosen[b]) for _, b in pairs})
    return [
        Issue(
            "near_duplicate",
            f"{len(copies)} trajectories move as an earlier one does, such as episode {shown[1]} "
            f"as {shown[0]}",
            "Leave the copies out (data.filters.episodes): they count twice in training, and "
            "what is held out for evaluation is known from training",
            recorded_numbers(dataset, copies),
        )
    ]


def _inside(dataset: Dataset) -> Bool[np.ndarray, "steps"]:
    """True for each step from a row to the next of the same trajectory."""
    inside = np.ones(len(dataset.actions) - 1, bool)
    inside[dataset.starts[1:-1] - 1] = False
    return inside
