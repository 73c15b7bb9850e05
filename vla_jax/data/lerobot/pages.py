"""Single images out of parquet files, without reading what lies around them.

pyarrow reads a column of a whole row group, which may be a whole file of hundreds of megabytes:
LeRobot's tools write such ones when they merge. A column of a row group is a chain of pages, each
with a header that says how many rows it holds and how long it is. The headers are read once. A
small page is read whole; of a large one (pyarrow puts 1024 images into it) it is found out once
where its images lie, and then they are read alone: JPEG and PNG cannot be packed any further, so
that snappy, which LeRobot writes, leaves them in blocks that can be unpacked one by one.
"""

import functools
import threading
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from vla_jax.data.errors import CorruptRecordError, DataError, MissingCameraError
from vla_jax.data.lerobot import parquet_bytes
from vla_jax.data.lerobot.parquet_bytes import BLOCK, CODECS, DAMAGE
from vla_jax.data.lerobot.tables import opened_parquet
from vla_jax.data.open_files import new_owner, shared_file
from vla_jax.data.places import DataPath

_COLUMNS = 1024  # columns of files whose pages are known
_LARGE = 1 << 20  # bytes of a page from which single images are read
_LOCATED = 4096  # large pages whose images are known
_KEPT = 32 << 20  # bytes of pages taken apart that are kept for the next read
_HEADER = 512, 1 << 16  # bytes read for a page's header, and once more if that is too little
_DATA, _DICTIONARY, _DATA_V2 = 0, 2, 3  # types of pages
_PLAIN, _BY_DICTIONARY = 0, (2, 8)  # encodings of values


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
    """One column of one row group: how it is packed, where its dictionary lies."""

    codec: str | None
    dictionary: tuple[int, dict[int, Any]] | None


class _Column(NamedTuple):
    """One column of a file; `nested` says how often a value may be absent on the way to it."""

    starts: np.ndarray
    pages: list[_Page]
    chunks: list[_Chunk]
    nested: int


class _Spans(NamedTuple):
    """Where the images of a large page lie: begin and end in its unpacked bytes, -1 = no image.

    `blocks` are those of `snappy_blocks`; without any the page is not packed.
    """

    begin: np.ndarray
    end: np.ndarray
    size: int
    blocks: np.ndarray | None


class ImagePages:
    """Images stored in the parquet files of one dataset, for any number of threads."""

    def __init__(self):
        """Nothing is read yet."""
        self._owner = new_owner()
        self._column = functools.lru_cache(_COLUMNS)(self._read_column)
        self._spans = functools.lru_cache(_LOCATED)(self._locate)
        self._kept: OrderedDict[tuple, tuple[int, list[bytes | None]]] = OrderedDict()
        self._bytes_kept, self._lock = 0, threading.Lock()

    def read(self, path: DataPath, key: str, rows: Sequence[int]) -> list[bytes | None]:
        """The encoded images in these rows of a column; None where a row holds none.

        Raises:
            MissingCameraError: there is no such column, or it holds no encoded images.
            DataError: the file is missing or damaged.
        """
        column, images = self._column(path, key), []
        for row in rows:
            number = int(np.searchsorted(column.starts, row, side="right")) - 1
            page = column.pages[number] if number >= 0 else None
            if page is None or row >= page.row + page.rows:
                raise CorruptRecordError(f"has no row {row}", path)
            try:
                spans = self._spans(path, key, number)
                if spans is None:
                    images.append(self._whole(path, key, number)[row - page.row])
                else:
                    codec = column.chunks[page.chunk].codec
                    images.append(self._single(path, page, spans, row - page.row, codec))
            except DAMAGE as error:
                if isinstance(error, DataError):
                    raise
                raise CorruptRecordError(f"column {key!r} is damaged: {error!r}", path) from error
        return images

    def _single(
        self, path: DataPath, page: _Page, spans: _Spans, row: int, codec: str | None
    ) -> bytes | None:
        """One image of a large page."""
        begin, end = int(spans.begin[row]), int(spans.end[row])
        if begin < 0:
            return None
        if spans.blocks is None:
            return self._bytes(path, page.at + begin, end - begin)
        # The blocks that the image reaches into.
        first, last = begin // BLOCK, max(end - 1, begin) // BLOCK
        skipped, stop = first * BLOCK, min((last + 1) * BLOCK, spans.size)
        at = int(spans.blocks[first])
        packed = self._bytes(path, page.at + at, int(spans.blocks[last + 1]) - at)
        # Blocks refer only to themselves: with a length in front they are a stream again.
        stream = parquet_bytes.framed(stop - skipped, packed)
        data = parquet_bytes.unpacked(stream, codec, stop - skipped)
        return data[begin - skipped : end - skipped]

    def _locate(self, path: DataPath, key: str, number: int) -> _Spans | None:
        """Where the images of a page lie; None if it has to be read whole."""
        column = self._column(path, key)
        page = column.pages[number]
        # header[2] is the unpacked size: a small page costs little to read whole.
        if not page.header or page.header[2] < _LARGE or page.header[1] != _DATA:
            return None
        codec = column.chunks[page.chunk].codec
        # The other codecs pack a page as one, so no part of it can be unpacked.
        if codec not in (None, "snappy"):
            return None
        body = self._body(path, page.at, page.header)
        blocks = parquet_bytes.snappy_blocks(body) if codec else None
        if codec and blocks is None:
            return None
        data = parquet_bytes.unpacked(body, codec, page.header[2])
        levels, values, encoding = _split(data, page, column.nested)
        if encoding != _PLAIN:
            return None
        is_present = levels == column.nested if column.nested else np.ones(page.rows, bool)
        # Counted from the beginning of the page, where the levels lie.
        ends = parquet_bytes.plain_ends(values, int(is_present.sum())) + len(data) - len(values)
        begin, end = np.full((2, page.rows), -1, np.int64)
        end[is_present] = ends
        # 4 bytes of length lie in front of every image.
        begin[is_present] = np.concatenate([[len(data) - len(values)], ends[:-1]])[: len(ends)] + 4
        return _Spans(begin, end, len(data), blocks)

    def _whole(self, path: DataPath, key: str, number: int) -> list[bytes | None]:
        """All images of a page, kept for the next read while there is room."""
        place = (path, key, number)
        with self._lock:
            if place in self._kept:
                self._kept.move_to_end(place)
                return self._kept[place][1]
        values = self._read_page(path, key, number)
        size = sum(len(value or b"") for value in values)
        with self._lock:
            # Another thread may have read the same page meanwhile.
            if place not in self._kept:
                self._kept[place] = size, values
                self._bytes_kept += size
            # The newest page stays, even one that is too large by itself.
            while self._bytes_kept > _KEPT and len(self._kept) > 1:
                self._bytes_kept -= self._kept.popitem(last=False)[1][0]
        return values

    def _read_column(self, path: DataPath, key: str) -> _Column:
        with opened_parquet(path) as file:
            number = _find(file, key, path)
            nested = file.schema.column(number).max_definition_level
            groups = [file.metadata.row_group(g) for g in range(file.metadata.num_row_groups)]
            described = [(g.num_rows, g.column(number)) for g in groups]
            size = path.stat().st_size
        # What is packed in other ways is left to pyarrow, a row group at a time.
        if not all(_readable(chunk) for _, chunk in described):
            ends = np.cumsum([0, *(rows for rows, _ in described)]).tolist()
            whole_groups = [_Page(ends[g], n, 0, {}, g) for g, (n, _) in enumerate(described)]
            return _Column(np.array(ends[:-1]), whole_groups, [], nested)
        chunks: list[_Chunk] = []
        pages: list[_Page] = []
        row = 0
        try:
            for group, (rows, chunk) in enumerate(described):
                codec = CODECS[chunk.compression]
                at = chunk.data_page_offset
                if chunk.has_dictionary_page and chunk.dictionary_page_offset:
                    # The dictionary, where there is one, lies before the data.
                    at = min(at, chunk.dictionary_page_offset)
                stop = min(at + chunk.total_compressed_size, size)
                chunks.append(_Chunk(codec, None))
                next_row = row
                while next_row < row + rows and at < stop:
                    header, at = self._header(path, at)
                    if header[1] == _DICTIONARY:
                        chunks[-1] = chunks[-1]._replace(dictionary=(at, header))
                    elif header[1] in (_DATA, _DATA_V2):
                        # Thrift fields: 5 and 8 are the headers of data pages v1 and v2, 1 in them
                        # the count.
                        count = header[5 if header[1] == _DATA else 8][1]
                        pages.append(_Page(next_row, count, at, header, group))
                        next_row += count
                    at += header[3]
                if next_row != row + rows:
                    raise ValueError(f"{next_row - row} values in {rows} rows")
                row += rows
        except DAMAGE as error:
            raise CorruptRecordError(f"column {key!r} is damaged: {error!r}", path) from error
        return _Column(np.array([page.row for page in pages]), pages, chunks, nested)

    def _header(self, path: DataPath, at: int) -> tuple[dict[int, Any], int]:
        """A page's header, and where its body begins."""
        # Statistics can make a header long, but they seldom do.
        for size in _HEADER:
            data = self._bytes(path, at, size, whole=False)
            try:
                header, length = parquet_bytes.thrift(data, 0)
            except IndexError:
                continue
            # 1 is the type, 2 the unpacked and 3 the stored size.
            if not all(isinstance(header.get(field), int) for field in (1, 2, 3)):
                break
            if min(header[2], header[3]) < 0:
                break
            return header, at + length
        raise ValueError(f"no page begins at byte {at}")

    def _bytes(self, path: DataPath, at: int, size: int, whole: bool = True) -> bytes:
        data = shared_file(path, self._owner).read(size, at)
        if whole and len(data) < size:
            raise ValueError("the file has become shorter")
        return data

    def _body(self, path: DataPath, at: int, header: dict[int, Any]) -> bytes:
        """The bytes of a page as they are stored, checked where a checksum is stored too."""
        body = self._bytes(path, at, header[3])
        if header.get(4) is not None and zlib.crc32(body) != header[4] & 0xFFFFFFFF:
            raise ValueError("the checksum of a page differs")
        return body

    def _read_page(self, path: DataPath, key: str, number: int) -> list[bytes | None]:
        column = self._column(path, key)
        page = column.pages[number]
        if not page.header:
            return _row_group(path, key, page.chunk)
        chunk, header = column.chunks[page.chunk], page.header
        body = self._body(path, page.at, header)
        if header[1] == _DATA_V2:
            levels, values, encoding = _split_v2(body, page, column.nested, chunk.codec)
        else:
            data = parquet_bytes.unpacked(body, chunk.codec, header[2])
            levels, values, encoding = _split(data, page, column.nested)
        present = int((levels == column.nested).sum()) if column.nested else page.rows
        if encoding in _BY_DICTIONARY and chunk.dictionary:
            at, about = chunk.dictionary
            # Field 7 is the header of a dictionary page, 1 in it the count.
            words = parquet_bytes.unpacked(self._body(path, at, about), chunk.codec, about[2])
            entries = parquet_bytes.plain(words, about[7][1])
            # The first byte says how many bits a code has.
            codes = parquet_bytes.hybrid(values[1:], values[0], present)
            images = [entries[code] for code in codes.tolist()]
        else:
            images = parquet_bytes.plain(values, present)
        if present == page.rows:
            return list(images)
        # Values that are absent take no place in the page.
        coming = iter(images)
        return [next(coming) if level == column.nested else None for level in levels.tolist()]


def _split(data: bytes, page: _Page, nested: int) -> tuple[np.ndarray, bytes, int]:
    """Splits an unpacked page into its levels, its values and the encoding of these."""
    levels = np.zeros(0, np.int64)
    if nested:
        # Pages v1 put the length of the levels in front of them.
        size = int.from_bytes(data[:4], "little")
        levels = parquet_bytes.hybrid(data[4 : 4 + size], int(nested).bit_length(), page.rows)
        data = data[4 + size :]
    return levels, data, page.header[5][2]


def _split_v2(
    body: bytes, page: _Page, nested: int, codec: str | None
) -> tuple[np.ndarray, bytes, int]:
    """Splits a page of the second version, in which the values alone are packed."""
    about = page.header[8]
    # 5 and 6 are the bytes of definition and of repetition levels, which come first.
    cut = about[5] + about[6]
    width = int(nested).bit_length()
    levels = parquet_bytes.hybrid(body[about[6] : cut], width, page.rows)
    if about.get(7) is False:  # 7: whether values are packed
        codec = None
    return levels, parquet_bytes.unpacked(body[cut:], codec, page.header[2] - cut), about[4]


def _find(file: Any, key: str, path: DataPath) -> int:
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
    encodings = {"PLAIN", "RLE", "PLAIN_DICTIONARY", "RLE_DICTIONARY", "BIT_PACKED"}
    return set(chunk.encodings) <= encodings and chunk.compression in CODECS


def _row_group(path: DataPath, key: str, group: int) -> list[bytes | None]:
    """The images of a row group that pyarrow alone can take apart."""
    with opened_parquet(path) as file:
        rows = file.read_row_group(group, [key])[key].to_pylist()
    return [row.get("bytes") if isinstance(row, dict) else row for row in rows]
