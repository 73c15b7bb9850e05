"""Builds the arrays of an `RLDSIndex`: one pass over the shards, large datasets in parallel."""

import os
import zlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vla_jax.data import features as feature_module
from vla_jax.data.cache import SKIPPED, run_jobs, write_columns
from vla_jax.data.errors import (
    KINDS,
    CorruptRecordError,
    DataError,
    EmptyTrajectoryError,
    FeatureError,
    MissingCameraError,
    TruncatedShardError,
)
from vla_jax.data.features import STEPS, Feature
from vla_jax.data.places import NamedPath, stamps
from vla_jax.data.rlds import crc32c, records

Read = Callable[[Any, bool], Iterator[tuple[int, bytes, bool]]]
_PARALLEL_BYTES = 2 << 30  # below this, starting processes costs more than it saves


class Skipped(NamedTuple):
    """Episodes that are left out of an index; JSON-serializable.

    Attributes:
        kind: a key of `errors.KINDS`.
        problem: what is wrong.
        shard: file name.
        episode: the (first) episode within it, -1 when it does not apply.
        count: how many.
    """

    kind: str
    problem: str
    shard: str
    episode: int
    count: int


class _Shard(NamedTuple):
    """What one shard contributes: arrays by file stem, texts its codes refer to, what it lacks."""

    arrays: dict[str, np.ndarray]
    tables: dict[str, list[str]]
    skipped: list[Skipped]


def index_shards(
    folder: Path,
    directory: NamedPath,
    shards: Mapping[str, int],
    features: Mapping[str, Feature],
    low: Sequence[str],
    check_crc: bool,
    skip: bool = False,
    read: Read = records.scan_records,
    in_processes: bool = True,
) -> dict[str, Any]:
    """Writes the arrays into `folder` and returns what index.json says about them.

    Args:
        folder: an empty folder.
        directory: where the shards are.
        shards: shard file name -> number of episodes it should hold.
        features: all features of the dataset.
        low: paths of the numeric and text features to copy.
        check_crc: verify every payload's checksum, however long it takes; else where that is quick.
        skip: leave episodes out that are wrong, and say so under `SKIPPED`, instead of raising.
        read: shard and `check_crc` -> its records, each with its offset in the file and whether
            its checksum matches.
        in_processes: share the work of large datasets among processes.
    """
    images = sorted(p for p, f in features.items() if f.kind == "image" and p.startswith(STEPS))
    cameras = {path: f"camera_{i}" for i, path in enumerate(images)}
    lows = {path: f"low_{i}" for i, path in enumerate(low)}
    wanted = {path: features[path] for path in low}
    jobs = [
        (directory / n, count, cameras, lows, wanted, check_crc or crc32c.FAST, skip, read)
        for n, count in shards.items()
    ]
    # TensorFlow reads ahead with threads of its own, and its shards may lie on no disk.
    parallel = in_processes and _bytes([job[0] for job in jobs]) >= _PARALLEL_BYTES
    skipped: list[Skipped] = []
    tables: dict[str, dict[str, int]] = {p: {} for p in low if features[p].kind == "text"}

    def parts() -> Generator[dict[str, np.ndarray], None, None]:
        with run_jobs(_index_shard, jobs, parallel) as shards:
            for number, shard in enumerate(shards):
                skipped.extend(shard.skipped)
                if not shard.arrays:
                    continue
                for path, table in tables.items():
                    # Each shard numbers its texts from 0; one table serves the whole split.
                    codes = [table.setdefault(s, len(table)) for s in shard.tables[path]]
                    shard.arrays[lows[path]] = np.array(codes, np.int32)[shard.arrays[lows[path]]]
                shard.arrays["shard"] = np.full(len(shard.arrays["length"]), number, np.int32)
                yield shard.arrays

    if not write_columns(folder, parts()):
        if not skipped:
            raise EmptyTrajectoryError("the split has no episodes", directory)
        # Nothing is left, so the first mistake says more than an empty index.
        raise as_error(skipped[0], directory)
    lengths = np.load(folder / "length.npy")
    np.save(folder / "starts.npy", np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
    os.unlink(folder / "length.npy")
    return {
        "shards": list(shards),
        "lengths": list(shards.values()),
        "cameras": cameras,
        "low": lows,
        "tables": {path: list(table) for path, table in tables.items()},
        SKIPPED: skipped,
    }


def _bytes(paths: Sequence[NamedPath]) -> int:
    return sum(size for size, *_ in stamps(paths))


def as_error(skipped: Skipped, directory: NamedPath) -> DataError:
    """The error that was not raised."""
    return KINDS[skipped.kind](skipped.problem, directory / skipped.shard, skipped.episode)


def _index_shard(job: tuple) -> _Shard:
    path, count, cameras, lows, wanted, check_crc, skip, read = job
    lists: dict[str, list] = {"length": [], "number": []}
    tables: dict[str, dict[str, int]] = {p: {} for p, f in wanted.items() if f.kind == "text"}
    skipped: list[Skipped] = []

    def fail(error: DataError, episode: int, episodes: int = 1) -> None:
        if not skip:
            raise type(error)(error.problem, path, episode, error.frame) from error
        kind = type(error).__name__
        skipped.append(Skipped(kind, error.problem, path.name, episode, episodes))

    num_read = 0
    try:
        for episode, (offset, record, sound) in enumerate(read(path, check_crc)):
            num_read = episode + 1
            try:
                # The framing was sound, so only this record is lost.
                if not sound:
                    raise CorruptRecordError(records.DIFFERS)
                arrays = _index_episode(offset, record, cameras, lows, wanted, tables)
            except DataError as error:
                fail(error, episode)
                continue
            except (IndexError, ValueError, zlib.error) as error:
                # Without its CRC being checked, a record may be wrong anywhere inside.
                fail(CorruptRecordError(f"cannot be taken apart: {error}"), episode)
                continue
            # Its number in the shard, as left out episodes count too.
            arrays["number"] = np.array([episode], np.int32)
            for stem, array in arrays.items():
                lists.setdefault(stem, []).append(array)
        if num_read != count:
            problem = f"holds {num_read} episodes, dataset_info.json says {count}"
            raise TruncatedShardError(problem, path)
    except (TruncatedShardError, CorruptRecordError) as error:
        # Where the next record would begin is not known: the rest of the shard is lost.
        if not skip:
            raise
        fail(error, error.episode, max(count - num_read, 1))
    arrays = {stem: np.concatenate(parts) for stem, parts in lists.items() if parts}
    return _Shard(arrays, {p: list(table) for p, table in tables.items()}, skipped)


def _index_episode(offset, record, cameras, lows, wanted, tables) -> dict[str, np.ndarray]:
    fields = records.walk_example(record)
    arrays, rows = {}, {}
    for path, stem in cameras.items():
        spans = records.byte_spans(record, _field(fields, path, records.BYTES))
        # From places in the record to places in the file.
        arrays[f"{stem}_at"] = spans[:, 0] + offset
        arrays[f"{stem}_size"] = (spans[:, 1] - spans[:, 0]).astype(np.int32)
        rows[path] = len(spans)
    for path, feature in wanted.items():
        try:
            values = feature_module.decode(record, _field(fields, path), feature)
        except FeatureError as error:
            raise FeatureError(f"feature {path!r}: {error.problem}") from error
        if feature.kind == "text":
            table = tables[path]
            values = np.array([table.setdefault(s, len(table)) for s in values], np.int32)
        arrays[lows[path]] = values
        if path.startswith(STEPS):
            rows[path] = len(values)
        elif len(values) != 1:
            raise FeatureError(f"feature {path!r}: {len(values)} values in one episode, not 1")
    if not rows:
        raise FeatureError("no step feature is asked for, so the length is unknown")
    if len(set(rows.values())) > 1:
        raise CorruptRecordError(f"features of different lengths: {rows}")
    length = next(iter(rows.values()))
    if not length:
        raise EmptyTrajectoryError("the episode has no steps")
    arrays["length"] = np.array([length], np.int64)
    return arrays


def _field(fields: dict[str, records.Field], path: str, kind: int = 0) -> records.Field:
    field = fields.get(path)
    if field is None:
        lacking = MissingCameraError if kind == records.BYTES else FeatureError
        raise lacking(f"no feature {path!r}; the record has {sorted(fields)}")
    # An empty list has no kind of its own.
    if kind and field.kind not in (kind, records.EMPTY):
        raise FeatureError(f"feature {path!r} holds no images")
    return field
