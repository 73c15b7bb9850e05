import json

import numpy as np
import pytest

from tests.serve.clients import from_numpy_json, numpy_json
from vla_jax.serve import json_numpy
from vla_jax.serve.msgpack_numpy import MAX_CONTAINERS, MAX_DEPTH, MAX_ITEMS, WireError


@pytest.mark.parametrize("dtype", ["?", "i1", "i4", "i8", "u1", "u2", "f2", "f4", "f8", ">f4"])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3, 4)])
def test_arrays_survive_both_ways(dtype, shape):
    array = np.random.default_rng(0).integers(0, 100, shape).astype(dtype)
    reference = json.dumps({"a": array}, default=numpy_json)
    back = json_numpy.unpack(reference)["a"]
    assert back.dtype == array.dtype.newbyteorder("=")
    np.testing.assert_array_equal(back, array)
    again = json.loads(json_numpy.pack({"a": array}), object_hook=from_numpy_json)["a"]
    assert again.dtype.itemsize == array.dtype.itemsize
    np.testing.assert_array_equal(again, array)


def test_everything_else_survives():
    value = {"none": None, "flag": True, "n": [1, 2.5, {"text": "große Tasse 杯 🍵"}]}
    assert json_numpy.unpack(json_numpy.pack(value)) == value
    assert json_numpy.unpack(json_numpy.pack(np.float32(0.5))) == np.float32(0.5)


def array(**changes):
    fields = {"__numpy__": "AAAAAAAAAAAAAAAA", "dtype": "<f4", "shape": [3], **changes}
    return json.dumps({k: v for k, v in fields.items() if v is not ...})


BAD = {
    "empty": ("", "JSON"),
    "truncated": ('{"a": [1, 2', "JSON"),
    "two documents": ("1 2", "JSON"),
    "not utf-8": (b"\xff\xfe", "JSON"),
    "lone surrogate": ('"\ud800"', "JSON"),
    "escaped half character": (r'{"a": ["\ud83d"]}', "surrogate"),
    "double key": ('{"a": 1, "a": 2}', "twice"),
    "nan": ("[NaN]", "NaN is not JSON"),
    "infinity": ("[-Infinity]", "Infinity is not JSON"),
    "huge integer": ("1" * 5000, "JSON"),
    "deep": ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "deep"),
    "very deep": ("[" * 4000 + "]" * 4000, "deep"),
    "many containers": ("[" + "[]," * MAX_CONTAINERS + "1]", "more than"),
    "many items": ("[" + "1," * MAX_ITEMS + "1,1]", "more than"),
    "object dtype": (array(dtype="|O"), "dtype '|O'"),
    "string dtype": (array(dtype="<U1"), "dtype '<U1'"),
    "struct dtype": (array(dtype=[["a", "<f4"]]), "dtype"),
    "void dtype": (array(dtype="|V4"), "dtype '|V4'"),
    "a gigabyte": (array(shape=[2**28]), "needs 1073741824 bytes, got 12"),
    "negative shape": (array(shape=[-3]), "shape"),
    "text shape": (array(shape="3"), "shape"),
    "no shape": (array(shape=...), "keys"),
    "another key": (array(pickle="x"), "keys"),
    "number for bytes": (array(__numpy__=3), "keys"),
    "not base64": (array(__numpy__="!!!"), "base64"),
    "base64 of letters beyond ASCII": (array(__numpy__="äöü="), "base64"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_documents_are_refused_with_a_reason(name):
    text, reason = BAD[name]
    with pytest.raises(WireError) as caught:
        json_numpy.unpack(text)
    assert reason in str(caught.value)
    assert len(str(caught.value)) < 300


def test_random_changes_never_escape_as_another_error():
    rng = np.random.default_rng(1)
    image = np.zeros((4, 4, 3), np.uint8)
    good = json.dumps({"image": image, "instruction": "x", "l": [1.0]}, default=numpy_json).encode()
    for _ in range(3000):
        data = bytearray(good)
        for _ in range(rng.integers(1, 4)):
            data[rng.integers(len(data))] = rng.integers(256)
        try:
            json_numpy.unpack(bytes(data))
        except WireError:
            continue


@pytest.mark.parametrize("value", [object(), 1j, np.array(["a"]), np.array([None]), float("nan")])
def test_values_without_a_form_are_refused(value):
    with pytest.raises(WireError, match="cannot send"):
        json_numpy.pack({"a": value})
