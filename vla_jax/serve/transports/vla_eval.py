"""vla-eval's wire: its harness speaks to this server as to a model server of its own.

    server: {url: "ws://127.0.0.1:8000/vla-eval"}

A message is msgpack of {"type", "payload", "seq", "timestamp"}. The client says "hello" and is told
what to send; "episode_start" begins an episode; each "observation" gets an "action", the first of
the chunk, since the harness asks at every control step (--execute=receding replays a chunk here).
Images come as PNG or JPEG and are named by the benchmark: the first is the primary camera's, the
second the wrist's, the third the secondary's, unless the policy's own profile names them.
"""

import io
import time
from collections.abc import Mapping
from typing import Any

import msgpack
import numpy as np
from PIL import Image

from vla_jax.inference.protocol import ACTIONS_KEY, IMAGE_KEYS, PROMPT_KEY, STATE_KEY
from vla_jax.serve import msgpack_numpy
from vla_jax.serve.msgpack_numpy import WireError
from vla_jax.serve.transports.base import Message, Request, RequestError, WebsocketWire, brief

MAX_PIXELS = 2**23  # of all compressed images of a message: a few bytes can claim any size
_FIELDS = ("type", "payload", "seq", "timestamp")
_ORDER = ("primary", "wrist", "secondary")
# How its specs call a gripper's commands for closed and open.
_GRIPPERS = {
    (1.0, -1.0): "binary_close_positive",
    (-1.0, 1.0): "binary_close_negative",
    (1.0, 0.0): "binary_close_01",
    (0.0, 1.0): "continuous_01",
}


class VlaEvalWire(WebsocketWire):
    """See the module."""

    name, path = "vla-eval", "/vla-eval"
    answers_pings = False  # a simulator's reset holds up its event loop, for a minute perhaps

    def greet(self) -> Message | None:
        """Nothing: the client speaks first."""
        return None

    def read(self, message: Message) -> Request:
        """See `Wire`."""
        if isinstance(message, str):
            raise RequestError("expected a binary frame holding msgpack, got a text frame")
        envelope = msgpack_numpy.unpack(message)
        if not isinstance(envelope, dict) or not all(name in envelope for name in _FIELDS):
            raise RequestError(f"expected a map with {list(_FIELDS)}, as vla-eval sends")
        kind, payload, seq = envelope["type"], envelope["payload"], envelope["seq"]
        if not isinstance(payload, dict) or not isinstance(seq, int):
            raise RequestError("payload: expected a map; seq: expected an integer")
        if kind == "hello":
            return Request(answer=_pack("hello", self._hello(), seq))
        if kind == "observation":
            return Request(_observation(payload), note=seq)
        if kind in ("episode_start", "episode_end", "error"):
            return Request(reset=kind == "episode_start")
        raise RequestError(
            f"type {brief(repr(kind), 40)}: expected hello, observation or episode_*"
        )

    def write(self, request: Request, reply: dict[str, Any]) -> Message:
        """The first action alone."""
        return _pack("action", {"actions": reply[ACTIONS_KEY][0]}, request.note)

    def refuse(self, request: Request | None, error: Exception) -> Message:
        """See `Wire`."""
        seq = request.note if request and request.note is not None else 0
        return _pack("error", {"error": brief(error)}, seq)

    def _hello(self) -> dict[str, Any]:
        cameras, gripper = self.metadata.get("cameras", {}), self.metadata.get("gripper")
        wanted = {}
        # Only what is needed: not every benchmark takes every wish.
        if "wrist" in cameras:
            wanted["send_wrist_image"] = True
        if self.metadata.get("needs_proprio"):
            wanted["send_state"] = True
        actions = {"actions": {"name": "raw", "dims": 0, "format": "raw"}}
        if gripper:
            form = _GRIPPERS.get((gripper["closed"], gripper["open"]), "raw")
            actions["gripper"] = {"name": "gripper", "dims": 1, "format": form}
        language = {"name": "language", "dims": 0, "format": "language"}
        return {
            "harness_version": "",
            "protocol_version": 1,
            "model_server": f"vla_jax {self.metadata.get('model', '')}",
            "capabilities": {},
            "observation_params": wanted,
            "action_spec": actions,
            "observation_spec": {"language": language},
        }


def _observation(payload: dict[str, Any]) -> dict[str, Any]:
    obs = _Decoder().decode(payload)
    msgpack_numpy.check_tree(obs)
    images = obs.get("images")
    if isinstance(images, dict):
        # Not strict: a benchmark may have fewer cameras than there are roles.
        obs |= {
            IMAGE_KEYS[role]: image for role, image in zip(_ORDER, images.values(), strict=False)
        }
    # LIBERO says "states", others "state".
    for name, key in (
        ("task_description", PROMPT_KEY),
        ("state", STATE_KEY),
        ("states", STATE_KEY),
    ):
        if name in obs:
            obs[key] = obs[name]
    return obs


class _Decoder:
    """Puts this codec's arrays and images in the place of the maps that describe them."""

    def __init__(self) -> None:
        self._pixels_left = MAX_PIXELS

    def decode(self, value: Any) -> Any:
        """A tree of maps and lists; an array that cannot be becomes a `Refused`."""
        if isinstance(value, list):
            return [self.decode(item) for item in value]
        if not isinstance(value, dict):
            return value
        raw = "__ndarray__" in value or value.get("format") == "raw"
        if "__ndarray__" in value or "__image__" in value:
            return msgpack_numpy.kept(_array if raw else self._picture, value)
        return {key: self.decode(item) for key, item in value.items()}

    def _picture(self, items: Mapping[str, Any]) -> np.ndarray:
        data = items.get("data")
        if not isinstance(data, bytes):
            raise WireError(f"an image's data is a {type(data).__name__}, not bytes")
        try:
            # Only these two: Pillow's other readers have no business with bytes from a network.
            with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
                self._pixels_left -= image.width * image.height
                if self._pixels_left < 0:
                    raise WireError(f"images of more than {MAX_PIXELS} pixels in one message")
                return np.asarray(image)
        except WireError:
            raise
        # Pillow's readers raise whatever their parsing stumbles over.
        except Exception as error:
            raise WireError(f"neither PNG nor JPEG: {brief(error, 200)}") from error


def _array(items: Mapping[str, Any]) -> np.ndarray:
    return msgpack_numpy.make_array(items.get("dtype"), items.get("shape"), items.get("data"))


def _pack(kind: str, payload: dict[str, Any], seq: int) -> bytes:
    envelope = {"type": kind, "payload": payload, "seq": seq, "timestamp": time.time()}
    packed: Any = msgpack.packb(envelope, default=_encode)  # its stub says bytes or None
    return packed


def _encode(value: Any) -> Any:
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{type(value).__name__} has no form in vla-eval's messages")
    data, shape = value.tobytes(), list(value.shape)
    return {"__ndarray__": True, "data": data, "dtype": value.dtype.str, "shape": shape}
