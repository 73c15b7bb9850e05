"""What the server's tests speak with."""

import base64
import http.client
import inspect
import json
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from websockets.sync.client import connect as _connect

from vla_jax.serve import msgpack_numpy

IMAGE: Any = np.full((8, 8, 3), 7, np.uint8)


def connect(uri: str, **options: Any) -> Any:
    if "legacy" in inspect.signature(_connect).parameters:  # websockets 17
        options["legacy"] = True
    return _connect(uri, compression=None, max_size=None, proxy=None, **options)


def obs(prompt: Any = "go", **changes: Any) -> dict[str, Any]:
    return {"observation/image": IMAGE, "prompt": prompt} | changes


def close_code(caught: Any) -> int:
    return caught.value.rcvd.code


def ask(ws: Any, request: Any) -> Any:
    ws.send(request if isinstance(request, (bytes, str)) else msgpack_numpy.pack(request))
    reply = ws.recv(timeout=10)
    return reply if isinstance(reply, str) else msgpack_numpy.unpack(reply)


def http_connection(uri: str, timeout: float = 10) -> http.client.HTTPConnection:
    address = urlsplit(uri)
    assert address.hostname is not None
    return http.client.HTTPConnection(address.hostname, address.port, timeout=timeout)


def get(uri: str, path: str, **headers: str) -> tuple[int, bytes]:
    connection = http_connection(uri, timeout=5)
    connection.request("GET", path, headers=headers)
    response = connection.getresponse()
    return response.status, response.read()


def numpy_json(value: Any) -> Any:
    """As json_numpy writes arrays; not this project's code, so that both are checked."""
    if isinstance(value, (np.ndarray, np.generic)):
        text = base64.b64encode(value.tobytes()).decode()
        return {"__numpy__": text, "dtype": value.dtype.str, "shape": value.shape}
    raise TypeError(type(value))


def from_numpy_json(items: Any) -> Any:
    if "__numpy__" not in items:
        return items
    flat = np.frombuffer(base64.b64decode(items["__numpy__"]), np.dtype(items["dtype"]))
    return flat.reshape(items["shape"]) if items["shape"] else flat[0]


def post(target: Any, request: Any, path: str = "/act", **headers: str) -> tuple[int, Any]:
    """Status and decoded reply; `target` is a URI, or a connection to go on with."""
    connection = http_connection(target) if isinstance(target, str) else target
    body = request if isinstance(request, bytes) else json.dumps(request, default=numpy_json)
    headers = {"Content-Type": "application/json", **headers}
    connection.request("POST", path, body, headers)
    response = connection.getresponse()
    text = response.read()
    return response.status, json.loads(text, object_hook=from_numpy_json)
