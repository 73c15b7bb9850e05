"""The rows of an episode, the parquet file they lie in, and the numbers and texts they hold.

Rows belong to the episode whose number they carry, in the order of their `frame_index`, whatever
file meta names and wherever they lie in it: datasets that were edited, merged or downsampled keep
file tables that are out of date.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vla_jax.data.cache import run_jobs
from vla_jax.data.errors import CorruptRecordError, DataError, FeatureError
from vla_jax.data.features import Feature, cast
from vla_jax.data.lerobot.meta import Episode
from vla_jax.data.lerobot.tables import opened_parquet, read_table
from vla_jax.data.places import DataPath

log = logging.getLogger(__name__)
TIME = "timestamp of the videos"  # not the path of a feature
ROW = "row in the file"  # likewise
SCALAR = Feature("tensor", (), "")
_PARALLEL_FILES = 2000  # below this, starting processes costs more than it saves
_SHOWN = 3  # episodes named in a warning


class Wanted(NamedTuple):
    """What is copied of every row.

    Attributes:
        columns: path of a feature -> (its key, what it is).
        tasks: the numbers of the known tasks, None where they are not used.
    """

    columns: Mapping[str, tuple[str, Feature]]
    tasks: frozenset[int] | None


class Part(NamedTuple):
    """Episodes that were found in one file.

    Attributes:
        path: the file.
        episodes: in the order of `columns`.
        columns: path of a feature, `TIME`, `ROW` -> its values, or an object array of str.
        wrong: what is wrong with other episodes that should have been there.
        notes: what is unusual about the ones that were found: (what, number of the episode).
    """

    path: DataPath
    episodes: list[Episode]
    columns: dict[str, np.ndarray]
    wrong: list[tuple[Episode, DataError]]
    notes: list[tuple[str, int]]


def copy_rows(
    episodes: Sequence[Episode], wanted: Wanted, files: Sequence[DataPath]
) -> Iterator[Part]:
    """Copies the rows of all episodes, file by file.

    Args:
        episodes: with the files that meta names for them.
        wanted: of every row.
        files: every file there is, which are looked through for episodes that are not, or not
            whole, where meta says.

    Yields:
        The parts that hold something; the last one lists what is wrong with what was not found.
    """
    by_file: dict[DataPath, list[Episode]] = {}
    for episode in episodes:
        by_file.setdefault(episode.data, []).append(episode)
    jobs = [(path, part, wanted) for path, part in by_file.items()]
    notes: list[tuple[str, int]] = []
    lost: list[tuple[Episode, DataError]] = []
    with run_jobs(_copy, jobs, len(jobs) >= _PARALLEL_FILES) as parts:
        for part in parts:
            notes += part.notes
            lost += part.wrong
            if part.episodes:
                yield part._replace(wrong=[])
    if lost:
        wrong = []
        for part in _elsewhere(lost, wanted, files):
            notes += part.notes
            wrong += part.wrong
            if part.episodes:
                yield part._replace(wrong=[])
        if wrong:
            yield Part(Path(), [], {}, wrong, [])
    _tell(notes)


def _elsewhere(
    lost: Sequence[tuple[Episode, DataError]], wanted: Wanted, files: Sequence[DataPath]
) -> Iterator[Part]:
    """Episodes that are whole in another file than meta names."""
    holders: dict[int, list[DataPath]] = {episode.number: [] for episode, _ in lost}
    lengths = {episode.number: episode.length for episode, _ in lost}
    for path in files:
        try:
            owner = numbers(read_table(path, ["episode_index"])["episode_index"], SCALAR)
        except DataError:
            continue
        for number, count in zip(*np.unique(owner, return_counts=True), strict=True):
            # A file that holds only a part of the rows does not count.
            if lengths.get(int(number)) == count:
                holders[int(number)].append(path)
    moved: dict[DataPath, list[Episode]] = {}
    wrong: list[tuple[Episode, DataError]] = []
    for episode, error in lost:
        places = [path for path in holders[episode.number] if path != episode.data]
        # Of several copies nobody can say which one is meant.
        if len(places) == 1:
            moved.setdefault(places[0], []).append(episode._replace(data=places[0]))
        else:
            wrong.append((episode, error))
    for path, part in moved.items():
        copied = _copy((path, part, wanted))
        note = "lie in another file than meta names"
        yield copied._replace(notes=[*copied.notes, *((note, e.number) for e in copied.episodes)])
    yield Part(Path(), [], {}, wrong, [])


def _tell(notes: Sequence[tuple[str, int]]) -> None:
    """Warns once of each unusual thing, however many episodes it concerns."""
    counts: Counter[str] = Counter()
    for note, number in notes:
        counts[note] += 1
        if counts[note] <= _SHOWN:
            log.warning("episode %d: its rows %s", number, note)
    for note, count in counts.items():
        if count > _SHOWN:
            log.warning("%d episodes: their rows %s", count, note)


def _copy(job: tuple[DataPath, Sequence[Episode], Wanted]) -> Part:
    """The rows of some episodes of one file."""
    path, episodes, wanted = job
    part = Part(path, [], {}, [], [])
    try:
        with opened_parquet(path) as file:
            named = set(file.schema_arrow.names)
        keys = {key for key, _ in wanted.columns.values()} | {"episode_index"}
        table = read_table(path, sorted(keys | ({"frame_index"} & named)))
        owner = _column(path, table, "episode_index", SCALAR)
        steps = _column(path, table, "frame_index", SCALAR) if "frame_index" in named else None
        columns = {
            name: _column(path, table, key, feature)
            for name, (key, feature) in wanted.columns.items()
        }
    except DataError as error:
        for episode in episodes:
            number = episode.number if not path.exists() else error.episode
            part.wrong.append((episode, type(error)(error.problem, error.file, number)))
        return part
    # Stable: rows of one episode keep the order they lie in.
    order = np.argsort(owner, kind="stable")
    sorted_owner = owner[order]
    picked = [np.zeros(0, np.int64)]  # so that there is something to join where no episode is sound
    for episode in episodes:
        first, stop = np.searchsorted(sorted_owner, [episode.number, episode.number + 1])
        rows, note = order[first:stop], ""
        try:
            _check_count(path, episode, rows)
            if steps is not None:
                rows, note = _in_order(path, episode, rows, steps[rows])
            _check(path, episode, rows, columns, wanted)
        except DataError as error:
            part.wrong.append((episode, error))
            continue
        part.notes.extend([(note, episode.number)] if note else [])
        part.episodes.append(episode)
        picked.append(rows)
    chosen = np.concatenate(picked)
    part.columns.update({name: values[chosen] for name, values in columns.items()})
    part.columns[ROW] = chosen
    return part


def _check_count(path: DataPath, episode: Episode, rows: np.ndarray) -> None:
    if len(rows) != episode.length:
        problem = (
            f"its rows are not those of the episodes that meta names: {episode.length} should be "
            f"this one's, {len(rows)} are"
        )
        raise CorruptRecordError(problem, path, episode.number)


def _in_order(
    path: DataPath, episode: Episode, rows: np.ndarray, steps: np.ndarray
) -> tuple[np.ndarray, str]:
    """The rows by their `frame_index`, and what is unusual about it."""
    jumps = np.diff(steps)
    if (jumps == 1).all():
        return rows, ""
    if (jumps <= 0).any():
        order = np.argsort(steps, kind="stable")
        rows, jumps = rows[order], np.diff(steps[order])
        if (jumps == 0).any():
            problem = "a frame_index occurs more than once among its rows"
            raise CorruptRecordError(problem, path, episode.number)
        if (jumps == 1).all():
            return rows, "are not in the order of frame_index and are put in order"
    # One step throughout is a dataset of fewer frames a second, which is sound.
    if (jumps != jumps[0]).any():
        return rows, "have gaps: numbers of frame_index are left out"
    return rows, ""


def _check(
    path: DataPath,
    episode: Episode,
    rows: np.ndarray,
    columns: Mapping[str, np.ndarray],
    wanted: Wanted,
) -> None:
    """Holds an episode's rows against what meta says of it.

    Raises:
        DataError: they are others.
    """
    times = columns.get(TIME)
    if times is not None and not (
        np.isfinite(times[rows]).all() and (np.diff(times[rows]) > 0).all()
    ):
        problem = "the timestamps of its rows do not grow from frame to frame"
        raise CorruptRecordError(problem, path, episode.number)
    if wanted.tasks is not None:
        name = next(name for name, (key, _) in wanted.columns.items() if key == "task_index")
        unknown = sorted(set(columns[name][rows].tolist()) - wanted.tasks)
        if unknown:
            problem = f"frames have task_index {unknown}, meta knows {sorted(wanted.tasks)[:20]}"
            raise FeatureError(problem, path, episode.number)


def _column(path: DataPath, table: Any, key: str, feature: Feature) -> np.ndarray:
    try:
        if feature.kind == "text":
            return np.array([str(text or "") for text in table[key].to_pylist()], object)
        return numbers(table[key], feature)
    except FeatureError as error:
        raise FeatureError(f"column {key!r} {error.problem}", path) from error


def numbers(column: Any, feature: Feature) -> np.ndarray:
    """A column of (lists of lists of) numbers as [rows, *shape].

    Raises:
        FeatureError: a row has another number of them, or they are of a type that cannot hold what
            the dataset declares (the caller adds the place).
    """
    array, shape = column.combine_chunks(), tuple(s for s in feature.shape if s is not None)
    declared = f"does not hold {feature.dtype or 'numbers'} {list(shape)}"
    if hasattr(array, "storage"):  # datasets' own types for more than one axis
        array = array.storage
    depth, sizes = 0, list(shape)
    # Every axis of a feature is one level of lists, down to plain numbers.
    while hasattr(array, "flatten") and hasattr(array.type, "value_type"):
        # A null has no number: numpy would make it NaN or 0.
        if array.null_count:
            raise FeatureError("has empty places")
        lengths = np.unique(np.asarray(array.value_lengths())) if len(array) else np.zeros(0)
        # A single number may be stored as a list of one.
        size = sizes[depth] if depth < len(sizes) else 1
        if len(lengths) and (len(lengths) > 1 or lengths[0] != size):
            listing = lengths.tolist() if len(lengths) < 5 else f"{lengths[0]} to {lengths[-1]}"
            raise FeatureError(f"{declared}: its rows have {listing} numbers")
        array, depth = array.flatten(), depth + 1
    if array.null_count:
        raise FeatureError("has empty places")
    values = np.asarray(array.to_numpy(zero_copy_only=False))
    if values.dtype.kind not in "fiub" or values.size != len(column) * int(np.prod(shape)):
        raise FeatureError(f"{declared}: it holds {values.dtype}")
    values = values.reshape(len(column), *shape)
    return cast(values, feature.dtype) if feature.dtype else values
