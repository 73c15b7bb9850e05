"""RLDS datasets through TFDS and tf.data: everything tf.io can read, object stores included.

TFDS says which shards there are, tf.data reads them ahead and checks their CRCs; records are taken
apart by the index's own code. TensorFlow is imported here, when a dataset is opened.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from vla_jax.data.cache import cached_folder
from vla_jax.data.errors import CorruptRecordError, DataError, FeatureError, TruncatedShardError
from vla_jax.data.features import Feature, parse_features
from vla_jax.data.places import stamp
from vla_jax.data.rlds import records
from vla_jax.data.rlds.build_index import index_shards
from vla_jax.data.rlds.index import FORMAT, RLDSIndex
from vla_jax.data.source_annotated import ANNOTATIONS
from vla_jax.data.source_streamed import Frames, StreamSource
from vla_jax.files import problem_of
from vla_jax.shipped import install_hint

_CYCLE = 4  # shards that are read at the same time, and mixed
_AHEAD = 2  # episodes read ahead


def split_names(folder: str | Path) -> list[str]:
    """Splits of the dataset in a version folder."""
    return sorted(_builder(folder).info.splits)


def features(folder: str | Path) -> dict[str, Feature]:
    """Every feature of the dataset in a version folder."""
    path = _builder(folder).data_path / "features.json"
    return parse_features(path.read_text(encoding="utf-8"), Path(str(path)))


def open_stream(
    folder: str | Path,
    split: str,
    low: Sequence[str] = (),
    cache_dir: str = "",
    rebuild: bool = False,
    skip: bool = False,
) -> StreamSource:
    """Opens one split; the first time, collects the numbers and texts that are asked for.

    Args:
        folder: version folder; an URL such as gs://bucket/bridge_dataset/1.0.0, or a local one.
        split: of its splits.
        low: paths of the numbers and texts.
        cache_dir: where they are kept; see `cached_folder`. Those of an URL: ~/.cache/vla_jax.
        rebuild: collect them anew.
        skip: leave out episodes that are wrong.

    Raises:
        DataError: with file and episode; see `vla_jax.data.errors`.
    """
    builder, described = _builder(folder), features(folder)
    if split not in builder.info.splits:
        raise DataError(f"no split {split!r}; it has {sorted(builder.info.splits)}", str(folder))
    kind = builder.info.file_format
    if kind is not None and kind.value != "tfrecord":
        problem = f"shards are {kind.value}, the stream reads tfrecord: set data.reader=index"
        raise DataError(problem, str(folder))
    if ANNOTATIONS in described:
        problem = "recordings with annotated spans cannot be streamed; set data.reader=index"
        raise DataError(problem, str(folder))
    missing = sorted(set(low) - set(described))
    if missing:
        raise FeatureError(f"no such feature: {missing}; it has {sorted(described)}", str(folder))
    info, low = builder.info.splits[split], sorted(set(low))
    try:
        paths = [builder.data_path / Path(str(path)).name for path in info.filepaths]
        absent = [path.name for path in paths if not path.exists()]
    except (OSError, LookupError, ValueError) as error:
        raise DataError(f"the shards cannot be found: {error}", str(folder)) from error
    if absent:
        problem = f"{len(absent)} of {len(paths)} shards are missing: {absent[:5]}"
        raise DataError(problem, str(folder))
    shards = {path.name: count for path, count in zip(paths, info.shard_lengths, strict=True)}
    read = [(path, repr(described[path])) for path in [*sorted(described), *low]]
    identity = ["stream", FORMAT, builder.name, str(builder.version), split, _sizes(paths), read]
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def renew(meta: dict[str, Any]) -> dict[str, Any] | None:
        same = meta["files"] == _stamps(paths) and meta["lengths"] == list(shards.values())
        return meta if same else None

    def build(work: Path) -> dict[str, Any]:
        meta = index_shards(
            work, builder.data_path, shards, described, low, False, skip, scan_records, False
        )
        origin = {"name": builder.name, "split": split, "digest": digest, "files": _stamps(paths)}
        return meta | origin

    remote = "://" in str(folder)
    name = f"{builder.name}-{builder.version}-{split}-stream-{digest[:16]}"
    beside = None if remote else Path(folder).expanduser()
    work = cached_folder(beside, cache_dir, name, rebuild, build, skip, renew)
    columns = RLDSIndex(work, builder.data_path, described)
    return StreamSource(columns, _Passes(columns))


def scan_records(path: Any, check_crc: bool = True) -> Iterator[tuple[int, bytes, bool]]:
    """`vla_jax.data.rlds.records.scan_records` by TensorFlow, which always checks the CRCs."""
    tf, position, episode = _tensorflow(), 0, 0
    try:
        for record in tf.data.TFRecordDataset(str(path)).prefetch(_AHEAD).as_numpy_iterator():
            # 12 bytes of header lie before a payload, 4 of checksum behind it.
            yield position + 12, record, True
            position += 16 + len(record)
            episode += 1
    except tf.errors.DataLossError as error:
        kind = TruncatedShardError if "truncated" in error.message else CorruptRecordError
        problem = "ends early" if kind is TruncatedShardError else "is no TFRecord, or damaged"
        raise kind(problem_of(path, problem), str(path), episode) from error
    except tf.errors.OpError as error:
        raise DataError(f"cannot be read: {error.message}", str(path), episode) from error


class _Passes:
    """See `vla_jax.data.source_streamed.Passes`."""

    def __init__(self, columns: RLDSIndex):
        self._columns = columns

    def __call__(
        self, wanted: Int64[np.ndarray, "k"], cameras: Sequence[str], seed: int | None
    ) -> Iterator[tuple[int, Frames]]:
        tf, columns = _tensorflow(), self._columns
        shards, numbers = columns.shard[wanted], columns.number[wanted]
        episode: dict[tuple[int, int], int] = dict(
            zip(zip(shards.tolist(), numbers.tolist(), strict=True), wanted.tolist(), strict=True)
        )
        order = np.unique(shards)
        if seed is not None:
            order = np.random.default_rng(seed).permutation(order)
        # A TFRecord file can only be skipped by count, so all between first and last is read.
        first = np.array([numbers[shards == shard].min() for shard in order], np.int64)
        last = np.array([numbers[shards == shard].max() for shard in order], np.int64)
        files = [str(columns.shards[shard]) for shard in order]

        def read_shard(file: Any, shard: Any, begin: Any, end: Any) -> Any:
            chosen = tf.data.TFRecordDataset(file).skip(begin).take(end - begin)
            counted = tf.data.Dataset.zip(tf.data.Dataset.range(begin, end), chosen)
            return counted.map(lambda number, record: (shard, number, record))

        parts = tf.data.Dataset.from_tensor_slices((files, order, first, last + 1))
        # Without a seed episodes have to come in the order they lie in.
        together = 1 if seed is None else min(_CYCLE, len(files))
        options = tf.data.Options()
        options.deterministic = True  # the order depends on the seed alone
        # By default TensorFlow starts a thread a core, beside those of the loader.
        options.threading.private_threadpool_size = 2
        stream = parts.interleave(read_shard, cycle_length=together, num_parallel_calls=together)
        stream = stream.prefetch(_AHEAD).with_options(options)
        try:
            for shard, number, record in stream.as_numpy_iterator():
                match = episode.get((int(shard), int(number)))
                # Records between those that are wanted are passed over.
                if match is not None:
                    yield match, _images(record, cameras)
        except tf.errors.OpError as error:
            raise DataError(f"cannot be read: {error.message}", str(columns.root)) from error


def _images(record: bytes, cameras: Sequence[str]) -> Frames:
    """Encoded frames; of the record nothing else is kept alive."""
    fields, images = records.walk_example(record), {}
    for camera in cameras:
        spans = records.byte_spans(record, fields[camera]).tolist()
        begin = spans[0][0]
        data = memoryview(record[begin : spans[-1][1]])
        images[camera] = [data[start - begin : stop - begin] for start, stop in spans]
    return images


def _sizes(paths: Sequence[Any]) -> list[tuple[str, int]]:
    stats = [(path.name, path.stat()) for path in paths]
    # Paths of a store and paths of a disk name the size differently.
    return [(n, int(s.length if hasattr(s, "length") else s.st_size)) for n, s in stats]


def _stamps(paths: Sequence[Any]) -> list[list[int]]:
    """Changes when a shard is replaced: of one on no disk its size and the time it was stored."""
    stamps = []
    for path in paths:
        local = stamp(Path(str(path)))
        if not local:
            status = path.stat()
            local = [int(status.length), int(status.mtime * 1000)]
        stamps.append(local)
    return stamps


def _builder(folder: str | Path) -> Any:
    _tensorflow()
    import tensorflow_datasets as tfds

    where = str(folder) if "://" in str(folder) else str(Path(folder).expanduser())
    try:
        return tfds.builder_from_directory(where)
    except Exception as error:  # whatever TFDS, protobuf and its file systems raise
        problem = f"not a TFDS version folder: {error}"
        for name in ("dataset_info.json", "features.json"):
            problem = problem_of(f"{where}/{name}", problem)
        raise DataError(problem, where) from error


def _tensorflow() -> Any:
    try:
        import tensorflow as tf
        import tensorflow_datasets  # noqa: F401 - asked for together
    except ImportError as error:
        raise DataError(f"data.reader=stream needs TensorFlow: {install_hint('data')}") from error
    # Training owns the accelerators; too late only for somebody who uses TensorFlow on them.
    with contextlib.suppress(RuntimeError, ValueError):
        tf.config.set_visible_devices([], "GPU")
    return tf
