"""TFRecord framing and the wire format of tf.train.Example, without TensorFlow.

Framing: u64 length, masked CRC of the length, payload, masked CRC of the payload (little endian).
Example: features(1) -> map entries(1) -> {name(1), Feature(2)}; a Feature is one of bytes_list(1),
float_list(2), int64_list(3), each with repeated value(1). Source: tensorflow/core/example/*.proto.

All values of one feature lie back to back, so the encoded frames of a camera are one byte range.
"""

import hashlib
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int64

from vla_jax.data.errors import CorruptRecordError, TruncatedShardError
from vla_jax.data.places import DataPath, opened
from vla_jax.data.rlds.crc32c import masked_crc32c
from vla_jax.files import explain_file
from vla_jax.moved import names_of

DIFFERS = "checksum of the record differs"
EMPTY, BYTES, FLOAT, INT = 0, 1, 2, 3  # numbers of the oneof in tf.train.Feature


class Field(NamedTuple):
    """Where one feature's list lies in a record: its kind and the byte range of the list."""

    kind: int
    start: int
    stop: int


_NO_FIELD = Field(EMPTY, 0, 0)  # made once: every entry of every record begins with it


def read_records(path: DataPath, check_crc: bool = False) -> Iterator[tuple[int, bytes]]:
    """Yields (byte offset of the payload in the file, payload) for every record of a shard.

    Args:
        path: TFRecord file, uncompressed.
        check_crc: also verify every payload's checksum; lengths are always verified.

    Raises:
        TruncatedShardError: the file ends within a record.
        CorruptRecordError: a checksum does not match.
    """
    for episode, (offset, record, sound) in enumerate(scan_records(path, check_crc)):
        if not sound:
            raise CorruptRecordError(DIFFERS, path, episode)
        yield offset, record


def scan_records(path: DataPath, check_crc: bool = False) -> Iterator[tuple[int, bytes, bool]]:
    """Yields what `read_records` does, and whether the checksum of each payload matches."""
    size, position, episode = path.stat().st_size, 0, 0
    with opened(path) as file:
        while position < size:
            header = file.read(12)  # the length and the checksum of it
            length, length_crc = struct.unpack("<QI", header.ljust(12, b"\0"))
            if len(header) < 12 or masked_crc32c(header[:8]) != length_crc:
                # Wrong from the first byte on: probably no TFRecord file at all.
                other = "" if position else explain_file(path)
                if other:
                    raise CorruptRecordError(other, path)
                if len(header) < 12:
                    raise TruncatedShardError(f"ends {12 - len(header)} bytes early", path, episode)
                raise CorruptRecordError("checksum of the record's length differs", path, episode)
            # 16 bytes frame a payload: its length and two checksums.
            missing = position + 16 + length - size
            if missing > 0:
                raise TruncatedShardError(f"ends {missing} bytes early", path, episode)
            record = file.read(length)
            payload_crc = struct.unpack("<I", file.read(4))[0]
            yield position + 12, record, not check_crc or masked_crc32c(record) == payload_crc
            position += 16 + length
            episode += 1


def fingerprint(path: Path) -> str:
    """A digest of the lengths and checksums of a shard's records, whose payloads are not read.

    Raises:
        OSError: the file cannot be read.
    """
    digest, position = hashlib.sha256(), 0
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        tail, header = b"", os.pread(file.fileno(), 12, 0)
        while len(header) == 12:
            digest.update(tail + header)
            length = struct.unpack("<Q", header[:8])[0]
            if position + 16 + length > size:
                break
            # The checksum of this payload and the header of the next record lie back to back.
            both = os.pread(file.fileno(), 16, position + 12 + length)
            tail, header, position = both[:4], both[4:], position + 16 + length
        digest.update(tail + header + size.to_bytes(8, "little"))
    return digest.hexdigest()


def frame_record(record: bytes) -> bytes:
    """A payload with its TFRecord framing; inverse of `read_records`."""
    header = struct.pack("<Q", len(record))
    checks = struct.pack("<I", masked_crc32c(header)), struct.pack("<I", masked_crc32c(record))
    return b"".join((header, checks[0], record, checks[1]))


def walk_example(record: bytes) -> dict[str, Field]:
    """Feature name -> where its values are. Values are not touched.

    Raises:
        CorruptRecordError: the bytes are not an Example (the caller adds file and episode).
    """
    fields: dict[str, Field] = {}
    try:
        for number, start, stop in message_fields(record, 0, len(record)):
            if number != 1:
                continue
            for _, entry_start, entry_stop in message_fields(record, start, stop):
                # protobuf leaves out what is empty.
                name, field = "", _NO_FIELD
                for key, value_start, value_stop in message_fields(record, entry_start, entry_stop):
                    if key == 1:
                        name = record[value_start:value_stop].decode()
                    else:
                        for kind, list_start, list_stop in message_fields(
                            record, value_start, value_stop
                        ):
                            field = Field(kind, list_start, list_stop)
                fields[name] = field
    except (IndexError, UnicodeDecodeError) as error:
        raise CorruptRecordError(f"not a tf.train.Example ({error})") from error
    if not fields:
        raise CorruptRecordError("not a tf.train.Example (no features)")
    return fields


def byte_spans(record: bytes, field: Field) -> Int64[np.ndarray, "n 2"]:
    """Start and stop in `record` of each element of a bytes_list."""
    spans = [(start, stop) for _, start, stop in message_fields(record, field.start, field.stop)]
    return np.array(spans, np.int64).reshape(-1, 2)


def floats(record: bytes, field: Field) -> Float32[np.ndarray, "n"]:
    """Elements of a float_list; a copy."""
    # Packed or one by one, the numbers are the same bytes once joined.
    packed = [
        record[start:stop] for _, start, stop in message_fields(record, field.start, field.stop)
    ]
    return np.frombuffer(b"".join(packed), "<f4")


def ints(record: bytes, field: Field) -> Int64[np.ndarray, "n"]:
    """Elements of an int64_list."""
    # Joining serves lists that are not packed, too.
    packed = [
        record[start:stop] for _, start, stop in message_fields(record, field.start, field.stop)
    ]
    data = np.frombuffer(b"".join(packed), np.uint8)
    # The top bit of a byte says that its varint goes on.
    last = data < 128
    if last.all():
        return data.astype(np.int64)
    ends = np.flatnonzero(last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    # 7 bits a byte, the lowest ones first.
    shift = 7 * (np.arange(len(data)) - np.repeat(starts, ends - starts + 1))
    parts = (data & 127).astype(np.uint64) << shift.astype(np.uint64)
    # Negative numbers are stored as two's complement, which the cast turns back.
    return np.add.reduceat(parts, starts).astype(np.int64)


def build_example(features: Mapping[str, tuple[int, list[bytes] | np.ndarray]]) -> bytes:
    """A serialized Example from name -> (kind, values); names are written in sorted order."""
    entries = []
    for name in sorted(features):
        kind, values = features[name]
        if kind == BYTES:
            body = b"".join(_delimited(1, bytes(value)) for value in values)
        elif kind == FLOAT:
            body = _delimited(1, np.asarray(values, "<f4").tobytes())
        else:
            body = _delimited(1, b"".join(_encode_varint(int(v)) for v in values))
        feature = _delimited(kind, body)
        entries.append(_delimited(1, _delimited(1, name.encode()) + _delimited(2, feature)))
    return _delimited(1, b"".join(entries))


def message_fields(record: bytes, position: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """(field number, start, stop) of the values in a message; fixed and varint values too."""
    while position < stop:
        tag, position = record[position], position + 1
        # Nearly every tag and most lengths are one byte: a call for each would cost the most here.
        if tag > 127:
            tag, position = _varint(record, position - 1)
        wire = tag & 7
        begin = position
        # protobuf's wire types: 0 varint, 1 eight bytes, 2 with a length, 5 four bytes.
        if wire == 2:
            length, begin = record[position], position + 1
            if length > 127:
                length, begin = _varint(record, position)
            position = begin + length
        elif wire == 5:
            position += 4
        elif wire == 0:
            _, position = _varint(record, position)
        elif wire == 1:
            position += 8
        else:
            raise IndexError(f"wire type {wire}")
        if position > stop:
            raise IndexError("a field is longer than its message")
        yield tag >> 3, begin, position


def _varint(record: bytes, position: int) -> tuple[int, int]:
    byte = record[position]
    position += 1
    if byte < 128:
        return byte, position
    result, shift = byte & 127, 7
    while True:
        byte = record[position]
        position += 1
        result |= (byte & 127) << shift
        if byte < 128:
            return result, position
        shift += 7


def _encode_varint(value: int) -> bytes:
    value &= 0xFFFFFFFFFFFFFFFF  # negative int64 as two's complement, ten bytes
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _delimited(number: int, body: bytes) -> bytes:
    return _encode_varint(number << 3 | 2) + _encode_varint(len(body)) + body


__getattr__ = names_of(__name__)
