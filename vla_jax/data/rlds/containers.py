"""The files that TFDS keeps examples in: TFRecord, ArrayRecord and parquet, one record an episode.

In TFRecord a frame is a range of bytes of the file and is read alone. The other two pack their
records, so that a whole record has to be unpacked for one frame of it; those that were unpacked
last are kept. TFRecord trains fastest.

Sources: tensorflow_datasets `core/file_adapters.py`, github.com/google/array_record.
"""

import functools
import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, runtime_checkable

from vla_jax.data.errors import CorruptRecordError, DataError, TruncatedShardError
from vla_jax.data.lerobot.pages import ImagePages
from vla_jax.data.lerobot.tables import opened_parquet
from vla_jax.data.open_files import limit, new_owner, shared_file
from vla_jax.data.places import DataPath, opened, read_ranges, require_disk
from vla_jax.data.rlds import records
from vla_jax.files import explain_file
from vla_jax.shipped import install_hint

_KEPT = 64 << 20  # bytes of unpacked records that are kept
_FETCHED = 1 << 14  # ranges of an object store that may wait to be read
_OPENED = 64  # ArrayRecord files kept open, over all datasets
_AT_ONCE = 16  # records of a parquet file that are in memory during a pass
_COLUMN = "data"  # in parquet, which TFDS uses as a list of records
_SMALLEST = 1 << 16  # bytes of an ArrayRecord file, which ends in a block of this size


@runtime_checkable
class Parts(Protocol):
    """Reads parts of the records of one dataset's files, from any number of threads."""

    def read(self, path: DataPath, record: int, begin: int, end: int) -> memoryview:
        """Bytes `begin`..`end`, exclusive, as a pass of the same container counts them.

        Raises:
            OSError, DataError: the file cannot be read.
        """
        ...


class Container(NamedTuple):
    """One of the formats.

    Attributes:
        scan: file and whether to verify checksums -> its records, see `records.scan_records`. The
            place it gives with each is what `parts` counts from.
        fingerprint: a digest of what a file holds.
        parts: makes a reader of single parts.
    """

    scan: Callable[[Any, bool], Iterator[tuple[int, bytes, bool]]]
    fingerprint: Callable[[DataPath], str]
    parts: Callable[[], Parts]


class FileParts:
    """Of TFRecord: places are those in the file. See `Parts`."""

    def __init__(self):
        self._owner = new_owner()
        # By the identity of the shard's path, which the index keeps: to hash a URL takes longer
        # than all else that is done here.
        self._coming: dict[tuple[int, int, int], bytes] = {}

    def read(self, path: DataPath, record: int, begin: int, end: int) -> memoryview:
        """See `Parts`."""
        data = self._coming.pop((id(path), begin, end), None) if self._coming else None
        if data is None:
            data = shared_file(path, self._owner).read(end - begin, begin)
        return memoryview(data)

    def fetch(self, spans: Sequence[tuple[DataPath, int, int]]) -> None:
        """Gets what calls of `read` will want from an object store, many requests at once."""
        # Some are never read, as those of a window whose other camera is damaged.
        if len(self._coming) > _FETCHED:
            self._coming.clear()
        for (path, begin, end), data in zip(spans, read_ranges(spans), strict=True):
            if data is not None:
                self._coming[id(path), begin, end] = data


class _RecordParts:
    """Of formats that pack: places are those in the unpacked record."""

    def __init__(self, read: Callable[[DataPath, int], bytes]):
        self._read = read
        self._kept: OrderedDict[tuple[DataPath, int], bytes] = OrderedDict()
        self._size, self._lock = 0, threading.Lock()

    def read(self, path: DataPath, record: int, begin: int, end: int) -> memoryview:
        return memoryview(self._record(path, record))[begin:end]

    def _record(self, path: DataPath, number: int) -> bytes:
        with self._lock:
            if (path, number) in self._kept:
                self._kept.move_to_end((path, number))
                return self._kept[path, number]
        data = self._read(path, number)
        with self._lock:
            # Another thread may have read the same record meanwhile.
            if (path, number) not in self._kept:
                self._kept[path, number] = data
                self._size += len(data)
            while self._size > _KEPT and len(self._kept) > 1:
                self._size -= len(self._kept.popitem(last=False)[1])
        return data


def _whole_file(path: DataPath) -> str:
    with opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _ArrayRecord:
    """An opened ArrayRecord file; one thread at a time reads."""

    def __init__(self, path: DataPath):
        """Opens it.

        Raises:
            DataError: it cannot be read, or the package is missing.
        """
        require_disk(path, "ArrayRecord")
        self._path, self._lock = path, threading.Lock()
        with _array_record(path) as module:
            if os.path.getsize(path) < _SMALLEST:
                raise TruncatedShardError("ends early", path)
            # No threads and no reading ahead: what is wanted is one record.
            options = "readahead_buffer_size:0,max_parallelism:0"
            self._reader = module.ArrayRecordReader(str(path), options)
            self.count = self._reader.num_records()

    def __getitem__(self, number: int) -> bytes:
        with self._lock, _array_record(self._path):
            return self._reader.read([number])[0]


@contextmanager
def _array_record(path: DataPath) -> Iterator[Any]:
    """The package's module; what it raises while it reads `path` becomes a `DataError`."""
    try:
        from array_record.python import array_record_module
    except ImportError as error:
        hint = f"ArrayRecord needs the package array_record: {install_hint('data')}"
        raise DataError(hint, path) from error
    try:
        yield array_record_module
    # It raises what its C++ side says, by kind of status.
    except (RuntimeError, ValueError, LookupError) as error:
        if isinstance(error, DataError):
            raise
        other = explain_file(path) or f"cannot be read: {error}"
        raise CorruptRecordError(other, path) from error


@functools.lru_cache(maxsize=min(_OPENED, limit()))
def _opened(path: DataPath, owner: int) -> _ArrayRecord:
    return _ArrayRecord(path)


def _array_record_parts() -> Parts:
    owner = new_owner()
    return _RecordParts(lambda path, number: _opened(path, owner)[number])


def scan_array_record(path: DataPath, check_crc: bool = False) -> Iterator[tuple[int, bytes, bool]]:
    """`records.scan_records` of an ArrayRecord file, which always checks what it reads."""
    file = _ArrayRecord(path)
    for number in range(file.count):
        try:
            record = file[number]
        except DataError as error:
            raise type(error)(error.problem, path, number) from error
        yield 0, record, True


def _parquet_parts() -> Parts:
    pages = ImagePages()

    def read(path: DataPath, number: int) -> bytes:
        return pages.read(path, _COLUMN, [number])[0] or b""

    return _RecordParts(read)


def scan_parquet(path: DataPath, check_crc: bool = False) -> Iterator[tuple[int, bytes, bool]]:
    """`records.scan_records` of a parquet file; its checksums count where it has some."""
    with opened_parquet(path) as file:
        if _COLUMN not in file.schema_arrow.names:
            problem = f"has no column {_COLUMN!r}, in which TFDS puts its examples"
            raise CorruptRecordError(problem, path)
        for batch in file.iter_batches(_AT_ONCE, columns=[_COLUMN]):
            for record in batch.column(0).to_pylist():
                yield 0, record or b"", True


# `fileFormat` in dataset_info.json -> how such files are read.
CONTAINERS: dict[str, Container] = {
    "tfrecord": Container(records.scan_records, records.fingerprint, FileParts),
    "array_record": Container(scan_array_record, _whole_file, _array_record_parts),
    "parquet": Container(scan_parquet, _whole_file, _parquet_parts),
}
