"""The bytes inside a page of a parquet file, and the Thrift in front of it.

Source: github.com/apache/parquet-format (parquet.thrift, Encodings.md), Thrift's compact protocol,
github.com/google/snappy (format_description.txt).
"""

import struct
import zlib
from typing import Any

import numpy as np

CODECS = {
    "UNCOMPRESSED": None, "SNAPPY": "snappy", "GZIP": "gzip", "BROTLI": "brotli", "ZSTD": "zstd",
    "LZ4": "lz4_raw", "LZ4_RAW": "lz4_raw",
}  # fmt: skip
# What damaged pages make the code below raise.
DAMAGE = (
    LookupError, ValueError, TypeError, OverflowError, MemoryError, OSError, struct.error,
    zlib.error,
)  # fmt: skip
BLOCK = 1 << 16  # bytes that snappy packs on their own
_PARTS = 64  # of a packed block: with more of them finding its end costs more than unpacking all


def unpacked(data: bytes, codec: str | None, size: int) -> bytes:
    """A page's bytes as they were before they were packed into `data`.

    Raises:
        ValueError: they are damaged, or not `size` bytes.
    """
    if codec is None:
        return data
    import pyarrow as arrow

    try:
        raw = arrow.Codec(codec).decompress(data, decompressed_size=size, asbytes=True)
    except arrow.ArrowException as error:
        raise ValueError(str(error)) from error
    if len(raw) != size:
        raise ValueError("a page has another size than its header says")
    return raw


def snappy_blocks(data: bytes) -> np.ndarray | None:
    """Where the packed blocks of `BLOCK` bytes each begin in a snappy stream, and its end.

    A block on its own, behind its length, is a stream again. None where blocks refer to each other
    or are packed so well that images cannot be what is inside.
    """
    size, at = varint(data, 0)
    marks, out, begin, parts = [at], 0, 0, 0
    max_parts = _PARTS * (size // BLOCK + 1)
    while at < len(data):
        tag, parts = data[at], parts + 1
        kind, length = tag & 3, (tag >> 2) + 1
        # A literal; a length above 60 is in the 1 to 4 bytes that follow.
        if kind == 0:
            extra = max(length - 60, 0)
            if extra:
                length = int.from_bytes(data[at + 1 : at + 1 + extra], "little") + 1
            at += 1 + extra + length
        else:
            if kind == 1:
                length, back = ((tag >> 2) & 7) + 4, (tag >> 5) << 8 | data[at + 1]
            else:
                back = int.from_bytes(data[at + 1 : at + (3 if kind == 2 else 5)], "little")
            # A copy of bytes before this block, which therefore cannot be unpacked alone.
            if back > out - begin:
                return None
            at += (2, 3, 5)[kind - 1]
        out += length
        if out - begin >= BLOCK or at >= len(data):
            # An element that ends in another block, or data that no image packs into.
            if out - begin > BLOCK or parts > max_parts:
                return None
            begin = out
            marks.append(at)
    return np.array(marks, np.int64)


def framed(length: int, data: bytes) -> bytes:
    """Packed blocks as a snappy stream of `length` bytes."""
    head = bytearray()
    while length > 127:
        head.append(length & 127 | 128)
        length >>= 7
    head.append(length)
    return bytes(head) + data


def plain_ends(data: bytes, count: int) -> np.ndarray:
    """Where each of `count` byte strings ends; each lies behind four bytes with its length.

    Raises:
        ValueError: one reaches beyond the data.
    """
    ends, at = np.empty(count, np.int64), 0
    for i in range(count):
        at += 4 + int.from_bytes(data[at : at + 4], "little")
        ends[i] = at
    if at > len(data):
        raise ValueError("a value reaches beyond its page")
    return ends


def plain(data: bytes, count: int) -> list[bytes]:
    """Byte strings, each behind its length."""
    ends = plain_ends(data, count).tolist()
    return [data[a + 4 : b] for a, b in zip([0, *ends[:-1]], ends, strict=True)] if count else []


def hybrid(data: bytes, width: int, count: int) -> np.ndarray:
    """Small numbers, run-length encoded or packed bit by bit.

    Raises:
        IndexError, ValueError: there are fewer.
    """
    if not width:
        return np.zeros(count, np.int64)
    parts, total, at = [], 0, 0
    while total < count:
        head, at = varint(data, at)
        # Odd: groups of 8 numbers, packed bit by bit; even: one number, repeated.
        if head & 1:
            size = (head >> 1) * width
            bits = np.unpackbits(np.frombuffer(data[at : at + size], np.uint8), bitorder="little")
            parts.append(bits.reshape(-1, width) @ (1 << np.arange(width)))
        else:
            size = (width + 7) // 8
            value = int.from_bytes(data[at : at + size], "little")
            parts.append(np.full(min(head >> 1, count - total), value, np.int64))
        at += size
        if not len(parts[-1]):  # would go on for ever
            raise ValueError("a run of no length")
        total += len(parts[-1])
    return np.concatenate(parts)[:count] if parts else np.zeros(0, np.int64)


def varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of variable length, and where it ends."""
    result = shift = 0
    while True:
        byte = data[at]
        at += 1
        result |= (byte & 127) << shift
        if byte < 128:
            return result, at
        shift += 7


def thrift(data: bytes, at: int) -> tuple[dict[int, Any], int]:
    """A struct of Thrift's compact protocol as field number -> value, and where it ends.

    Raises:
        IndexError: it does not end within `data`; ValueError: it is none.
    """
    fields: dict[int, Any] = {}
    field = 0
    while True:
        head = data[at]
        at += 1
        if not head & 15:  # type 0 ends the struct
            return fields, at
        # The upper half counts on from the last field; 0 says that a number follows.
        if head >> 4:
            field += head >> 4
        else:
            field, at = _zigzag(data, at)
        fields[field], at = _value(data, at, head & 15)


def _zigzag(data: bytes, at: int) -> tuple[int, int]:
    number, at = varint(data, at)
    return (number >> 1) ^ -(number & 1), at


def _value(data: bytes, at: int, kind: int) -> tuple[Any, int]:
    # The value of a flag is its type.
    if kind in (1, 2):
        return kind == 1, at
    if kind in (4, 5, 6):
        return _zigzag(data, at)
    if kind == 8:
        size, at = varint(data, at)
        if at + size > len(data):
            raise IndexError("a string reaches beyond what was read")
        return data[at : at + size], at + size
    if kind == 12:
        return thrift(data, at)
    if kind in (3, 7):
        size = 1 if kind == 3 else 8
        return data[at : at + size], at + size
    raise ValueError(f"type {kind} is not known in a page's header")
