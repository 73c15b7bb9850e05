"""JSON with numpy arrays, as the json_numpy package writes it for OpenVLA's clients.

An array or numpy scalar is {"__numpy__": base64 of its bytes, "dtype": "|u1", "shape": [...]}; a
scalar's shape is []. Decoding yields None, bool, int, float, str, list, dict and arrays of plain
numbers and nothing else, under the same limits as `msgpack_numpy`.
"""

import base64
import binascii
import json
from typing import Any

import numpy as np

from vla_jax.serve import msgpack_numpy
from vla_jax.serve.msgpack_numpy import MAX_CONTAINERS, MAX_ITEMS, WireError

_KEYS = {"__numpy__", "dtype", "shape"}


def pack(value: Any) -> bytes:
    """Encode a tree of dicts, lists, strings, numbers and numpy arrays.

    Raises:
        WireError: for a value the wire has no form for, NaN and infinity outside arrays included.
    """
    try:
        return json.dumps(value, default=_encode, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise WireError(f"cannot send this value: {error}") from error


def unpack(data: bytes | str) -> Any:
    """Decode one document; arrays are read-only and in native byte order.

    Raises:
        WireError: saying what is wrong, for anything that is not one legal document.
    """
    # Half of a surrogate pair must not raise here: decoding it below makes an answer of it.
    raw = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
    # Counted before anything is built: base64 has none of these characters.
    containers, items = raw.count(b"{") + raw.count(b"["), raw.count(b",")
    if containers > MAX_CONTAINERS or items > MAX_ITEMS:
        raise WireError(
            f"more than {MAX_CONTAINERS} maps and lists or {MAX_ITEMS} entries in one document; "
            "send arrays as json_numpy writes them"
        )
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_decode, parse_constant=_refuse)
    except WireError:
        raise
    except RecursionError as error:
        # How deep Python's parser goes depends on its version; the wire goes less deep than any.
        limit = msgpack_numpy.MAX_DEPTH
        raise WireError(f"maps and lists nested more than {limit} deep") from error
    except ValueError as error:
        detail = str(error).replace("\n", " ")[:200]
        raise WireError(f"not a JSON document ({len(raw)} bytes): {detail}") from error
    msgpack_numpy.check_tree(value)
    # Only an escape can spell half a pair, UTF-8 cannot.
    if b"\\u" in raw:
        _check_text(value)
    return value


def _encode(value: Any) -> Any:
    if isinstance(value, (np.ndarray, np.generic)):
        msgpack_numpy.check_numbers(value.dtype)
        data = base64.b64encode(value.tobytes()).decode("ascii")
        return {"__numpy__": data, "dtype": value.dtype.str, "shape": list(value.shape)}
    raise TypeError(f"{type(value).__module__}.{type(value).__qualname__} has no JSON form")


def _decode(pairs: list[tuple[str, Any]]) -> Any:
    items = dict(pairs)
    if len(items) != len(pairs):
        raise WireError("a map names the same key twice")
    return msgpack_numpy.kept(_decode_array, items) if "__numpy__" in items else items


def _decode_array(items: dict[str, Any]) -> Any:
    if items.keys() != _KEYS or not isinstance(items["__numpy__"], str):
        raise WireError(f"array with the keys {sorted(items)[:8]}, not text and dtype and shape")
    try:
        # Without `validate` characters that are not base64 would be passed over.
        data = base64.b64decode(items["__numpy__"], validate=True)
    except (binascii.Error, ValueError) as error:
        raise WireError(f"an array's bytes are not base64: {error}") from error
    array = msgpack_numpy.make_array(items["dtype"], items["shape"], data)
    # A shape of [] stands for a numpy scalar.
    return array if array.ndim else array[()]


def _check_text(value: Any) -> None:
    """Refuse half characters, which JSON can escape and which are no text anywhere else."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode("utf-8")
    except UnicodeEncodeError as error:
        raise WireError("a text holds half of a surrogate pair") from error


def _refuse(constant: str) -> Any:
    raise WireError(f"{constant} is not JSON; numbers that are not finite travel in arrays")
