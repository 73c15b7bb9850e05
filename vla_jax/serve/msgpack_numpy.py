"""msgpack with numpy arrays, as openpi's clients speak it; decoding is hardened.

An array is the map {b"__ndarray__": True, b"data": bytes, b"dtype": "|u1", b"shape": [...]}; a
numpy scalar is {b"__npgeneric__": True, b"data": 1.5, b"dtype": "<f4"}. Bytes from the network
never become Python objects other than None, bool, int, float, str, bytes, list, dict and numpy
arrays of plain numbers: no pickle, no extension types, no object arrays. `eval_servers/wire.py` is
the client's side; the tests have each decode the other.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np

MAX_DEPTH = 16  # nested maps and lists
MAX_CONTAINERS = 4096  # maps and lists in one message: bounds what a small message can expand to
MAX_ITEMS = 65536  # entries of one map or list; numbers in bulk travel as arrays

_ARRAY_KEYS = frozenset({b"__ndarray__", b"data", b"dtype", b"shape"})
_SCALAR_KEYS = frozenset({b"__npgeneric__", b"data", b"dtype"})
_DTYPE = re.compile(r"[<>|=]?([biuf])(1|2|4|8)|[<>|=]?\?")
_KINDS = "biuf"  # bool, int, unsigned, float


class WireError(ValueError):
    """Bytes that are not a message of this wire, or a value that cannot be sent."""


def pack(value: Any) -> bytes:
    """Encode a tree of dicts, lists, strings, numbers and numpy arrays.

    Raises:
        WireError: for a value the wire has no form for (objects, complex, strings in arrays, ...).
    """
    try:
        packed: Any = msgpack.packb(value, default=_encode)  # its stub says bytes or None
        return packed
    except (TypeError, ValueError, OverflowError) as error:
        raise WireError(f"cannot send this value: {error}") from error


def unpack(data: bytes) -> Any:
    """Decode one message; arrays are read-only views of `data`'s copy, in native byte order.

    Raises:
        WireError: saying what is wrong, for anything that is not one complete legal message.
    """
    budget = _Budget()
    # Every entry takes a byte at least: a list makes room for what it claims before it is read.
    max_entries = min(MAX_ITEMS, len(data))
    try:
        value = msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            max_array_len=max_entries,
            max_map_len=max_entries,
            max_ext_len=0,
            ext_hook=_refuse_ext,
            object_pairs_hook=budget.decode_map,
            list_hook=budget.count,
        )
    except WireError:
        raise
    except (ValueError, TypeError, OverflowError, msgpack.exceptions.UnpackException) as error:
        detail = str(error) or type(error).__name__
        raise WireError(f"not a msgpack message ({len(data)} bytes): {detail}") from error
    check_tree(value)
    return value


class _Budget:
    """Counts a message's containers while it is decoded."""

    def __init__(self) -> None:
        self.left = MAX_CONTAINERS

    def count(self, items: list[Any]) -> list[Any]:
        self.left -= 1
        if self.left < 0:
            raise WireError(f"more than {MAX_CONTAINERS} maps and lists in one message")
        return items

    def decode_map(self, pairs: list[tuple[Any, Any]]) -> Any:
        self.count(pairs)
        items = dict(pairs)
        # Of a key sent twice this decoder keeps the last; another might keep the first.
        if len(items) != len(pairs):
            raise WireError("a map names the same key twice")
        if b"__ndarray__" in items:
            return kept(_decode_array, items)
        if b"__npgeneric__" in items:
            return kept(_decode_scalar, items)
        return items


def _encode(value: Any) -> Any:
    if isinstance(value, (np.ndarray, np.generic)):
        check_numbers(value.dtype)
        if isinstance(value, np.generic):
            return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
        return {
            b"__ndarray__": True,
            b"data": value.tobytes(),
            b"dtype": value.dtype.str,
            b"shape": value.shape,
        }
    raise TypeError(f"{type(value).__module__}.{type(value).__qualname__} has no msgpack form")


def _decode_array(items: dict[Any, Any]) -> np.ndarray:
    if items.keys() != _ARRAY_KEYS:
        raise WireError(f"array with the keys {sorted(map(repr, items))}, not data, dtype, shape")
    return make_array(items[b"dtype"], items[b"shape"], items[b"data"])


def check_numbers(dtype: np.dtype) -> None:
    """Raise TypeError for a dtype that is not sent: anything but plain numbers."""
    # Wider types, such as longdouble, differ between platforms.
    if dtype.kind not in _KINDS or dtype.itemsize > 8:
        raise TypeError(f"numpy dtype {dtype} is not bool, int or float of 1-8 bytes")


def make_array(dtype_text: Any, shape: Any, data: Any) -> np.ndarray:
    """A read-only array of plain numbers from what came over a network, in native byte order.

    Raises:
        WireError: unless a legal dtype, a list of sizes and bytes that fill exactly these.
    """
    dtype = _dtype(dtype_text)
    legal = isinstance(shape, list) and len(shape) <= 8
    if not legal or not all(type(n) is int and 0 <= n < 2**48 for n in shape):
        raise WireError(f"array shape {_short(shape)} is not a list of at most 8 sizes")
    expected = math.prod(shape) * dtype.itemsize
    if not isinstance(data, bytes) or len(data) != expected:
        got = f"{len(data)} bytes" if isinstance(data, bytes) else type(data).__name__
        raise WireError(
            f"array of dtype {dtype} and shape {shape} needs {expected} bytes, got {got}"
        )
    # A view, because images are the bulk of a request and msgpack has copied them once.
    array = np.ndarray(shape, dtype, buffer=data)
    return array if dtype.isnative else array.astype(dtype.newbyteorder("="))


def _decode_scalar(items: dict[Any, Any]) -> np.generic:
    if items.keys() != _SCALAR_KEYS:
        raise WireError(f"numpy scalar with the keys {sorted(map(repr, items))}, not data, dtype")
    dtype, data = _dtype(items[b"dtype"]), items[b"data"]
    if not isinstance(data, (bool, int, float)):
        raise WireError(f"numpy scalar holds a {type(data).__name__}, not a number")
    return dtype.newbyteorder("=").type(data)


def _dtype(text: Any) -> np.dtype:
    if not isinstance(text, str) or not _DTYPE.fullmatch(text):
        raise WireError(f"dtype {_short(text)} is not bool, int or float of 1-8 bytes, as '<f4'")
    try:
        return np.dtype(text)
    except TypeError:  # the pattern lets through combinations numpy lacks, as f1
        raise WireError(f"dtype {text!r} does not exist") from None


def _refuse_ext(code: int, data: bytes) -> Any:
    raise WireError(f"msgpack extension type {code} ({len(data)} bytes) is not allowed")


@dataclass(frozen=True)
class Refused:
    """Stands in a message where an array cannot be: only the map around it knows its key."""

    reason: str


def kept(decode: Callable[[dict[Any, Any]], Any], items: dict[Any, Any]) -> Any:
    """An array that `decode` makes of a map, or why it does not; `check_tree` says where."""
    try:
        return decode(items)
    except WireError as error:
        return Refused(str(error))


def check_tree(value: Any, path: str = "", depth: int = 1) -> None:
    """Raise WireError for a tree with a refused array, or nested more than `MAX_DEPTH` deep."""
    if isinstance(value, Refused):
        raise WireError(f"{_short(path)}: {value.reason}" if path else value.reason)
    if not isinstance(value, (dict, list)):
        return
    if depth > MAX_DEPTH:
        raise WireError(f"maps and lists nested more than {MAX_DEPTH} deep")
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(item, (dict, list, Refused)):
            check_tree(item, f"{path}.{key}" if path else str(key), depth + 1)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
