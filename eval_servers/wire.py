"""The client's side of the policy server's wire: msgpack with numpy arrays (openpi's layout)."""

from __future__ import annotations

from typing import Any

import msgpack
import numpy as np


def pack(value: Any) -> bytes:
    """Encode dicts, lists, strings, numbers and numpy arrays of numbers."""
    packed: Any = msgpack.packb(value, default=_encode)  # its stub says bytes or None
    return packed


def unpack(data: bytes) -> Any:
    """Decode one message; arrays come out read-only. Raises ValueError on anything else."""
    return msgpack.unpackb(data, object_hook=_decode)


def _encode(value: Any) -> Any:
    if not isinstance(value, (np.ndarray, np.generic)) or value.dtype.kind not in "biuf":
        kind = getattr(value, "dtype", type(value).__name__)
        raise TypeError("cannot send {}: only plain data and arrays of numbers".format(kind))
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    # The keys are bytes because openpi's msgpack_numpy writes them so.
    data, dtype, shape = value.tobytes(), value.dtype.str, value.shape
    return {b"__ndarray__": True, b"data": data, b"dtype": dtype, b"shape": shape}


def _decode(items: Any) -> Any:
    if b"__ndarray__" not in items and b"__npgeneric__" not in items:
        return items
    dtype = np.dtype(items[b"dtype"])
    # An object array would be a pointer read from the network.
    if dtype.kind not in "biuf":
        raise ValueError("the server sent an array of dtype {}".format(dtype))
    if b"__npgeneric__" in items:
        return dtype.type(items[b"data"])
    return np.ndarray(items[b"shape"], dtype, buffer=items[b"data"])
