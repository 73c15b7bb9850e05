"""Single images out of parquet files, page by page.

pyarrow reads a column of a whole row group, which may be a whole file of hundreds of megabytes:
LeRobot's tools write such ones when they merge. A column of a row group is a chain of pages of
about a megabyte, each with a header that says how many rows it holds and how long it is. The
headers are read once, then a read costs one page.
Source: github.com/apache/parquet-format, parquet.thrift, Encodings.md and README.md.
"""

import functools
import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vla_jax.data.errors import CorruptRecordError, MissingCameraError
from vla_jax.data.lerobot.tables import opened_parquet
from vla_jax.data.open_files import new_owner, shared_file

_COLUMNS = 1024  # columns of files whose pages are known
_PAGES = 16  # of about a megabyte, taken apart and kept for the next read
_HEADER = 512, 1 << 16  # bytes read for a page's header, and once more if that is too little
_DATA, _DICTIONARY, _DATA_V2 = 0, 2, 3  # types of pages
_PLAIN, _BY_DICTIONARY = 0, (2, 8)  # encodings of values
_CODECS = {
    "UNCOMPRESSED": None, "SNAPPY": "snappy", "GZIP": "gzip", "BROTLI": "brotli", "ZSTD": "zstd",
    "LZ4": "lz4_raw", "LZ4_RAW": "lz4_raw",
}  # fmt: skip
# What damaged pages make the code below raise.
_DAMAGE = (LookupError, ValueError, OverflowError, struct.error, zlib.error, MemoryError, OSError)


class _Page(NamedTuple):
    """One page: its first row in the file, how many there are, where its body lies, its header.

    One without a header is a whole row group that pyarrow has to read.
    """

    row: int
    rows: int
    at: int
    header: dict[int, Any]
    chunk: int


class _Chunk(NamedTuple):
    """One column of one row group: how it is packed, its first row, where its dictionary lies."""

    group: int
    row: int
    rows: int
    codec: str | None
    dictionary: tuple[int, dict[int, Any]] | None


class _Column(NamedTuple):
    """One column of a file; `nested` says how often a value may be absent on the way to it."""

    starts: np.ndarray
    pages: list[_Page]
    chunks: list[_Chunk]
    nested: int


class ImagePages:
    """Images stored in the parquet files of one dataset, for any number of threads."""

    def __init__(self):
        """Nothing is read yet."""
        self._owner = new_owner()
        self._column = functools.lru_cache(_COLUMNS)(self._read_column)
        self._page = functools.lru_cache(_PAGES)(self._read_page)

    def read(self, path: Path, key: str, rows: Sequence[int]) -> list[bytes | None]:
        """The encoded images in these rows of a column; None where a row holds none.

        Raises:
            MissingCameraError: there is no such column, or it holds no encoded images.
            DataError: the file is missing or damaged.
        """
        column, found = self._column(path, key), []
        for row in rows:
            number = int(np.searchsorted(column.starts, row, side="right")) - 1
            if not 0 <= number < len(column.pages):
                raise CorruptRecordError(f"has no row {row}", path)
            values = self._page(path, key, number)
            found.append(values[row - column.pages[number].row])
        return found

    def _read_column(self, path: Path, key: str) -> _Column:
        with opened_parquet(path) as file:
            number = _find(file, key, path)
            nested = file.schema.column(number).max_definition_level
            groups = [file.metadata.row_group(g) for g in range(file.metadata.num_row_groups)]
            described = [(g.num_rows, g.column(number)) for g in groups]
            size = os.path.getsize(path)
        if not all(_readable(chunk) for _, chunk in described):
            ends = np.cumsum([0, *(rows for rows, _ in described)]).tolist()
            whole = [_Page(ends[g], n, 0, {}, g) for g, (n, _) in enumerate(described)]
            return _Column(np.array(ends[:-1]), whole, [], nested)
        chunks: list[_Chunk] = []
        pages: list[_Page] = []
        row = 0
        try:
            for group, (rows, chunk) in enumerate(described):
                codec = _CODECS[chunk.compression]
                at = chunk.data_page_offset
                if chunk.has_dictionary_page and chunk.dictionary_page_offset:
                    at = min(at, chunk.dictionary_page_offset)
                stop = min(at + chunk.total_compressed_size, size)
                chunks.append(_Chunk(group, row, rows, codec, None))
                found = row
                while found < row + rows and at < stop:
                    header, at = self._header(path, at)
                    if header[1] == _DICTIONARY:
                        chunks[-1] = chunks[-1]._replace(dictionary=(at, header))
                    elif header[1] in (_DATA, _DATA_V2):
                        count = header[5 if header[1] == _DATA else 8][1]
                        pages.append(_Page(found, count, at, header, group))
                        found += count
                    at += header[3]
                if found != row + rows:
                    raise ValueError(f"{found - row} values in {rows} rows")
                row += rows
        except _DAMAGE as error:
            raise CorruptRecordError(f"column {key!r} is damaged: {error!r}", path) from error
        return _Column(np.array([page.row for page in pages]), pages, chunks, nested)

    def _header(self, path: Path, at: int) -> tuple[dict[int, Any], int]:
        """A page's header, and where its body begins."""
        for size in _HEADER:
            data = self._bytes(path, at, size, whole=False)
            try:
                header, length = _struct(data, 0)
            except IndexError:
                continue
            if not all(isinstance(header.get(field), int) for field in (1, 2, 3)):
                break
            if min(header[2], header[3]) < 0:
                break
            return header, at + length
        raise ValueError(f"no page begins at byte {at}")

    def _bytes(self, path: Path, at: int, size: int, whole: bool = True) -> bytes:
        data = os.pread(shared_file(path, self._owner).fd, size, at)
        if whole and len(data) < size:
            raise ValueError("the file has become shorter")
        return data

    def _body(self, path: Path, at: int, header: dict[int, Any]) -> bytes:
        """The bytes of a page as they are stored, checked where a checksum is stored too."""
        body = self._bytes(path, at, header[3])
        if header.get(4) is not None and zlib.crc32(body) != header[4] & 0xFFFFFFFF:
            raise ValueError("the checksum of a page differs")
        return body

    def _read_page(self, path: Path, key: str, number: int) -> list[bytes | None]:
        column = self._column(path, key)
        page = column.pages[number]
        if not page.header:
            return _row_group(path, key, page.chunk)
        chunk = column.chunks[page.chunk]
        try:
            levels, values, encoding = self._split(path, page, chunk, column.nested)
            present = int((levels == column.nested).sum()) if column.nested else page.rows
            if encoding in _BY_DICTIONARY and chunk.dictionary:
                at, header = chunk.dictionary
                body = _unpacked(self._body(path, at, header), chunk.codec, header[2])
                entries = _plain(body, header[7][1])
                codes = _hybrid(values[1:], values[0], present)
                found = [entries[code] for code in codes.tolist()]
            else:
                found = _plain(values, present)
        except _DAMAGE as error:
            raise CorruptRecordError(f"column {key!r} is damaged: {error!r}", path) from error
        if present == page.rows:
            return found
        coming = iter(found)
        return [next(coming) if level == column.nested else None for level in levels.tolist()]

    def _split(
        self, path: Path, page: _Page, chunk: _Chunk, nested: int
    ) -> tuple[np.ndarray, bytes, int]:
        """Of a page: which values are there, the values, and how these are encoded."""
        body, header = self._body(path, page.at, page.header), page.header
        width = int(nested).bit_length()
        if header[1] == _DATA_V2:
            about = header[8]
            cut = about[5] + about[6]
            levels = _hybrid(body[about[6] : cut], width, page.rows)
            packed, size = body[cut:], header[2] - cut
            values = packed if about.get(7) is False else _unpacked(packed, chunk.codec, size)
            return levels, values, about[4]
        data, levels = _unpacked(body, chunk.codec, header[2]), np.zeros(0, np.int64)
        if nested:
            size = int.from_bytes(data[:4], "little")
            levels, data = _hybrid(data[4 : 4 + size], width, page.rows), data[4 + size :]
        return levels, data, header[5][2]


def _find(file: Any, key: str, path: Path) -> int:
    """The column of the encoded bytes of an image feature."""
    if key not in file.schema_arrow.names:
        raise MissingCameraError(f"it has no such column: {file.schema_arrow.names}", path)
    columns = [file.schema.column(i) for i in range(len(file.schema.names))]
    for number, column in enumerate(columns):
        plain = column.physical_type == "BYTE_ARRAY" and not column.max_repetition_level
        if column.path in (key, f"{key}.bytes") and plain:
            return number
    kind = file.schema_arrow.field(key).type
    problem = (
        f"the column holds {kind}, not encoded images: numbers in an image's place are not read; "
        "write them as LeRobot's `image` or `video`"
    )
    raise MissingCameraError(problem, path)


def _readable(chunk: Any) -> bool:
    """Whether a column of a row group is packed and encoded in ways that are known here."""
    known = {"PLAIN", "RLE", "PLAIN_DICTIONARY", "RLE_DICTIONARY", "BIT_PACKED"}
    return set(chunk.encodings) <= known and chunk.compression in _CODECS


def _row_group(path: Path, key: str, group: int) -> list[bytes | None]:
    """The images of a row group that pyarrow alone can take apart."""
    with opened_parquet(path) as file:
        rows = file.read_row_group(group, [key])[key].to_pylist()
    return [row.get("bytes") if isinstance(row, dict) else row for row in rows]


def _unpacked(data: bytes, codec: str | None, size: int) -> bytes:
    if codec is None:
        return data
    import pyarrow as arrow

    try:
        found = arrow.Codec(codec).decompress(data, decompressed_size=size, asbytes=True)
    except arrow.ArrowException as error:
        raise ValueError(str(error)) from error
    if len(found) != size:
        raise ValueError("a page has another size than its header says")
    return found


def _plain(data: bytes, count: int) -> list[bytes]:
    """Byte strings, each behind its length."""
    found, at = [], 0
    for _ in range(count):
        size = int.from_bytes(data[at : at + 4], "little")
        at += 4 + size
        if at > len(data):
            raise ValueError("a value reaches beyond its page")
        found.append(data[at - size : at])
    return found


def _hybrid(data: bytes, width: int, count: int) -> np.ndarray:
    """Small numbers, run-length encoded or packed bit by bit."""
    if not width:
        return np.zeros(count, np.int64)
    parts, total, at = [], 0, 0
    while total < count:
        head, at = _varint(data, at)
        if head & 1:
            size = (head >> 1) * width
            bits = np.unpackbits(np.frombuffer(data[at : at + size], np.uint8), bitorder="little")
            parts.append(bits.reshape(-1, width) @ (1 << np.arange(width)))
            at += size
        else:
            size = (width + 7) // 8
            value = int.from_bytes(data[at : at + size], "little")
            parts.append(np.full(min(head >> 1, count - total), value, np.int64))
            at += size
        if not len(parts[-1]):
            raise ValueError("a run of no length")
        total += len(parts[-1])
    return np.concatenate(parts)[:count]


def _varint(data: bytes, at: int) -> tuple[int, int]:
    result = shift = 0
    while True:
        byte = data[at]
        at += 1
        result |= (byte & 127) << shift
        if byte < 128:
            return result, at
        shift += 7


def _struct(data: bytes, at: int) -> tuple[dict[int, Any], int]:
    """A struct of Thrift's compact protocol: field number -> value."""
    found, field = {}, 0
    while True:
        head = data[at]
        at += 1
        kind = head & 15
        if not kind:
            return found, at
        if head >> 4:
            field += head >> 4
        else:
            number, at = _varint(data, at)
            field = (number >> 1) ^ -(number & 1)
        found[field], at = _value(data, at, kind)


def _value(data: bytes, at: int, kind: int) -> tuple[Any, int]:
    if kind in (1, 2):
        return kind == 1, at
    if kind in (4, 5, 6):
        number, at = _varint(data, at)
        return (number >> 1) ^ -(number & 1), at
    if kind == 8:
        size, at = _varint(data, at)
        if at + size > len(data):
            raise IndexError("a string reaches beyond what was read")
        return data[at : at + size], at + size
    if kind == 12:
        return _struct(data, at)
    if kind in (3, 7):
        size = 1 if kind == 3 else 8
        return data[at : at + size], at + size
    raise ValueError(f"type {kind} is not known in a page's header")
