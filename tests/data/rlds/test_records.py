import struct

import numpy as np
import pytest

from vla_jax.data.errors import CorruptRecordError, TruncatedShardError
from vla_jax.data.rlds import records
from vla_jax.data.rlds.crc32c import crc32c, masked_crc32c, numpy_crc32c


def bitwise_crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


@pytest.mark.parametrize(
    ("data", "expected"),
    [  # RFC 3720, appendix B.4
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (b"123456789", 0xE3069283),
    ],
)
def test_crc32c_published_vectors(data, expected):
    assert crc32c(data) == numpy_crc32c(data) == expected


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 1023, 4096, 5001])
def test_crc32c_lanes_equal_the_bitwise_definition(size):
    data = np.random.default_rng(size).bytes(size)
    assert crc32c(data) == numpy_crc32c(data) == bitwise_crc32c(data)


@pytest.fixture
def shard(tmp_path):
    path = tmp_path / "x-train.tfrecord-00000-of-00001"
    payloads = [b"", b"abc", bytes(range(256)) * 40]
    path.write_bytes(b"".join(records.frame_record(p) for p in payloads))
    return path, payloads


def test_framing_round_trip_and_offsets(shard):
    path, payloads = shard
    full = path.read_bytes()
    results = list(records.read_records(path, check_crc=True))
    assert [payload for _, payload in results] == payloads
    assert all(full[at : at + len(payload)] == payload for at, payload in results)


@pytest.mark.parametrize("cut", [1, 5, 2000, 10250])
def test_truncated_shard_names_file_and_episode(shard, cut):
    path, _ = shard
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(TruncatedShardError, match="bytes early") as caught:
        list(records.read_records(path))
    assert caught.value.file == str(path)
    assert caught.value.episode == 2


def test_wrong_checksums_are_found(shard):
    path, _ = shard
    good = bytearray(path.read_bytes())
    payload_at = 16 + 19 + 12 + 100
    bad = good.copy()
    bad[payload_at] ^= 1
    path.write_bytes(bad)
    assert len(list(records.read_records(path))) == 3
    with pytest.raises(CorruptRecordError, match="checksum of the record differs") as caught:
        list(records.read_records(path, check_crc=True))
    assert caught.value.episode == 2
    bad = good.copy()
    bad[0] ^= 1
    path.write_bytes(bad)
    with pytest.raises(CorruptRecordError, match="length"):
        list(records.read_records(path))


def test_masking_matches_its_definition():
    crc = crc32c(b"abc")
    rotated = (crc >> 15) | (crc << 17 & 0xFFFFFFFF)
    assert masked_crc32c(b"abc") == (rotated + 0xA282EAD8) % 2**32


def test_example_round_trip():
    ints = np.array([0, 1, 127, 128, 300, -1, 2**62, -(2**63)])
    floats = np.array([0.5, -1e9, np.pi], np.float32)
    blobs = [b"", b"x" * 200, b"yz"]
    record = records.build_example(
        {
            "i": (records.INT, ints),
            "f": (records.FLOAT, floats),
            "b": (records.BYTES, blobs),
            "small": (records.INT, np.array([1, 0])),
        }
    )
    fields = records.walk_example(record)
    np.testing.assert_array_equal(records.ints(record, fields["i"]), ints)
    np.testing.assert_array_equal(records.ints(record, fields["small"]), [1, 0])
    np.testing.assert_array_equal(records.floats(record, fields["f"]), floats)
    spans = records.byte_spans(record, fields["b"])
    assert [record[a:b] for a, b in spans] == blobs


def test_unpacked_lists_are_read_too():
    # proto2 writers may repeat the tag instead of packing; both are legal on the wire.
    values = b"".join(b"\x0d" + struct.pack("<f", v) for v in (1.0, 2.0))
    feature = b"\x12" + bytes([len(values)]) + values
    entry = b"\x0a\x01f\x12" + bytes([len(feature)]) + feature
    body = b"\x0a" + bytes([len(entry)]) + entry
    record = b"\x0a" + bytes([len(body)]) + body
    numbers = records.floats(record, records.walk_example(record)["f"])
    np.testing.assert_array_equal(numbers, [1.0, 2.0])


@pytest.mark.parametrize("junk", [b"", b"\x0a\xff\x01", b"hello world, this is no protobuf"])
def test_junk_is_not_an_example(junk):
    with pytest.raises(CorruptRecordError, match=r"not a tf\.train\.Example"):
        records.walk_example(junk)
