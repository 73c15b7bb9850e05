import tracemalloc
from typing import Any

import msgpack
import numpy as np
import pytest

from eval_servers import wire as client_wire
from vla_jax.serve import msgpack_numpy

DTYPES = ["?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", ">f4", ">i2"]
CODECS = [
    pytest.param(msgpack_numpy, msgpack_numpy, id="server-server"),
    pytest.param(msgpack_numpy, client_wire, id="server-client"),
    pytest.param(client_wire, msgpack_numpy, id="client-server"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (2, 3, 4)])
@pytest.mark.parametrize(("encoder", "decoder"), CODECS)
def test_arrays_survive(encoder, decoder, shape, dtype):
    array = np.random.default_rng(0).integers(0, 100, shape).astype(dtype)
    back = decoder.unpack(encoder.pack({"a": array}))["a"]
    assert isinstance(back, np.ndarray)
    assert back.dtype.kind == array.dtype.kind
    assert back.dtype.itemsize == array.dtype.itemsize
    np.testing.assert_array_equal(back, array)


@pytest.mark.parametrize(("encoder", "decoder"), CODECS)
def test_everything_else_survives(encoder, decoder):
    value = {
        "none": None,
        "flag": True,
        "int": -3,
        "float": 0.1,
        "text": "große Tasse 杯",
        "bytes": b"\x00\xff",
        "list": [1, [2, {"three": 3}]],
        "scalar": np.float32(0.1),
        "int scalar": np.int16(-7),
        "bool scalar": np.bool_(True),
        "strided": np.arange(24).reshape(4, 6)[::2, ::-3],
    }
    back = decoder.unpack(encoder.pack(value))
    assert back["scalar"].dtype == np.float32
    assert back["int scalar"].dtype == np.int16
    assert back["bool scalar"].dtype == np.bool_
    np.testing.assert_array_equal(back.pop("strided"), value.pop("strided"))
    assert back == value


def test_native_byte_order_after_decoding():
    back = msgpack_numpy.unpack(msgpack_numpy.pack(np.array([1.5, 2.5], ">f4")))
    assert back.dtype.isnative
    assert back.tolist() == [1.5, 2.5]


def test_arrays_are_read_only():
    with pytest.raises(ValueError, match="read-only"):
        msgpack_numpy.unpack(msgpack_numpy.pack(np.zeros(3)))[0] = 1


def array(**changes) -> Any:
    fields = {"__ndarray__": True, "data": bytes(12), "dtype": "<f4", "shape": [3]} | changes
    return msgpack.packb({k.encode(): v for k, v in fields.items() if v is not ...})


def nested(depth):
    return b"\x91" * depth + b"\xc0"


BAD: dict[str, tuple[Any, str]] = {
    "empty": (b"", "msgpack"),
    "garbage": (b"\xc1\xc1\xc1", "msgpack"),
    "truncated": (msgpack_numpy.pack({"a": np.zeros(100)})[:-5], "incomplete"),
    "trailing": (msgpack_numpy.pack(1) + b"\x00", "extra"),
    "invalid utf-8": (b"\xa2\xff\xfe", "utf-8"),
    "extension": (msgpack.packb(msgpack.ExtType(4, b"abc")), "ext"),
    "empty extension": (b"\xc7\x00\x04", "extension type 4"),
    "timestamp": (msgpack.packb(msgpack.Timestamp(1)), "ext"),
    "integer key": (msgpack.packb({1: 2}), "not allowed"),
    "double key": (b"\x82\xa1a\x01\xa1a\x02", "twice"),
    "object dtype": (array(dtype="|O", data=bytes(24)), "dtype '|O'"),
    "string dtype": (array(dtype="<U1"), "dtype '<U1'"),
    "struct dtype": (array(dtype="i4,i4"), "dtype 'i4,i4'"),
    "void dtype": (array(dtype="|V4"), "dtype '|V4'"),
    "complex dtype": (array(dtype="<c8"), "dtype '<c8'"),
    "long double": (array(dtype="<f16"), "dtype '<f16'"),
    "no such float": (array(dtype="<f1"), "f1"),
    "no such bool": (array(dtype="<b4"), "b4"),
    "list dtype": (array(dtype=[["a", "<f4"]]), "dtype"),
    "shape too large": (array(shape=[2**40]), "needs"),
    "shape too small": (array(shape=[2]), "needs 8 bytes, got 12"),
    "shape overflows": (array(shape=[2**40, 2**40]), "needs"),
    "negative shape": (array(shape=[-3]), "shape"),
    "shape of floats": (array(shape=[3.0]), "shape"),
    "shape of bools": (array(shape=[True, 3]), "shape"),
    "many dimensions": (array(shape=[1] * 9 + [3]), "at most 8"),
    "no shape": (array(shape=...), "keys"),
    "extra key": (array(pickle=b"x"), "keys"),
    "text data": (array(data="abc"), "got str"),
    "scalar of text": (
        msgpack.packb({b"__npgeneric__": True, b"data": "1", b"dtype": "<f4"}),
        "holds a str",
    ),
    "scalar overflows": (
        msgpack.packb({b"__npgeneric__": True, b"data": 300, b"dtype": "|u1"}),
        "out of bounds",
    ),
    "deep": (nested(msgpack_numpy.MAX_DEPTH + 1), "deep"),
    "very deep": (nested(100_000), "msgpack"),
    "wide list": (b"\xdd\x7f\xff\xff\xff", "msgpack"),
    "many containers": (b"\xdc\xff\xff" + b"\x80" * 65535, "maps and lists"),
    "many items": (b"\xdd\x00\x01\x00\x01" + b"\xc0" * 65537, "msgpack"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_bytes_are_refused_with_a_reason(name):
    data, reason = BAD[name]
    with pytest.raises(msgpack_numpy.WireError) as caught:
        msgpack_numpy.unpack(data)
    assert reason in str(caught.value).lower() or reason in str(caught.value)
    assert len(str(caught.value)) < 300


def test_depth_limit_is_exact():
    msgpack_numpy.unpack(nested(msgpack_numpy.MAX_DEPTH))


def test_random_bytes_never_escape_as_another_error():
    rng = np.random.default_rng(1)
    message = {"image": np.zeros((4, 4, 3), np.uint8), "prompt": "x", "l": [1.0]}
    good = bytearray(msgpack_numpy.pack(message))
    for _ in range(3000):
        data = bytearray(good)
        for _ in range(rng.integers(1, 4)):
            data[rng.integers(len(data))] = rng.integers(256)
        try:
            msgpack_numpy.unpack(bytes(data))
        except msgpack_numpy.WireError:
            continue


@pytest.mark.parametrize("value", [object(), 1j, {1, 2}, np.array(["a"]), np.array([None]), 2**70])
def test_values_without_a_form_are_refused(value):
    with pytest.raises(msgpack_numpy.WireError, match="cannot send"):
        msgpack_numpy.pack({"a": value})


@pytest.mark.parametrize("dtype", ["|O", "<U1", "|V4", "<c8"])
def test_client_refuses_foreign_dtypes(dtype):
    with pytest.raises(ValueError, match=r"dtype|object|UTF|sequence"):
        client_wire.unpack(array(dtype=dtype))


def test_nested_claims_get_no_more_room_than_the_message_has_bytes():
    data = b"\xdd\x00\x00\xff\xff" * 1000  # a list of 65535 in a list of 65535 in ...
    tracemalloc.start()
    try:
        with pytest.raises(msgpack_numpy.WireError):
            msgpack_numpy.unpack(data)
        assert tracemalloc.get_traced_memory()[1] < 2e6
    finally:
        tracemalloc.stop()
