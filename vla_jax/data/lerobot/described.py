"""The features that info.json describes: their paths here, their kinds, their sizes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vla_jax.data.features import STEPS, Feature

_NUMBERS = (
    "bool", "uint8", "int8", "int16", "uint16", "int32", "uint32", "int64", "uint64",
    "float16", "float32", "float64",
)  # fmt: skip
_CHANNELS = (1, 3, 4)  # how many an image has
# Initials of the axes' names: height, width, channel; rgb, bgr, color.
_AXES = {"h": 0, "y": 0, "w": 1, "x": 1, "c": 2, "r": 2, "b": 2}
_DEPTH = ("is_depth_map", "video.is_depth_map")


def paths_of(described: Mapping[str, Any]) -> dict[str, str]:
    """Path -> key: dots become slashes, but below a key that is a feature itself underscores."""
    keys: dict[str, str] = {}
    path_of: dict[str, str] = {}
    # The shorter ones first, so that a key finds the path of the one above it.
    for key in sorted(described, key=lambda k: k.count(".")):
        above = [k for k in path_of if key.startswith(k + ".")]
        parent = max(above, key=len, default="")
        suffix = key[len(parent) + 1 :].replace(".", "_")
        path_of[key] = f"{path_of[parent]}_{suffix}" if parent else STEPS + key.replace(".", "/")
        keys[path_of[key]] = key
    return keys


def feature_of(body: Mapping[str, Any]) -> Feature:
    """What one entry of `features` in info.json describes.

    Raises:
        KeyError, TypeError, ValueError: it is no such entry.
    """
    dtype, shape = body["dtype"], tuple(int(size) for size in body.get("shape") or ())
    if dtype in ("video", "image"):
        kind = "depth" if is_depth(body) else "image"
        height, width = _size(shape, body.get("names"))
        channels = 1 if kind == "depth" else 3
        return Feature(kind, (height, width, channels), "uint16" if channels == 1 else "uint8", "")
    if dtype == "string":
        return Feature("text")
    if dtype in _NUMBERS:
        # One number a step is a scalar, in the files and in LeRobot's own loader.
        return Feature("tensor", () if shape == (1,) else shape, np.dtype(dtype).name)
    return Feature("other")


def is_depth(body: Mapping[str, Any]) -> bool:
    """Whether a camera is marked as one of distances, as LeRobot does since 0.6 and did in v2.1."""
    marks = [body, *(v for k in ("info", "video_info") if isinstance(v := body.get(k), Mapping))]
    return any(mark.get(name) is True for mark in marks for name in _DEPTH)


def _size(shape: Sequence[int], names: Any) -> tuple[int, int]:
    """Height and width, whatever the order of the axes and however they are called.

    The names decide where they are understood. Without them the channels are the axis of 1, 3 or 4;
    where both ends could be, they are last.
    """
    if len(shape) != 3:
        raise ValueError(f"an image of shape {list(shape)}")
    called = [_AXES.get(str(name)[:1].lower()) for name in names or ()]
    if sorted(axis for axis in called if axis is not None) == [0, 1, 2]:
        return shape[called.index(0)], shape[called.index(1)]
    if called.count(2) == 1 and len(called) == 3:
        first = called[0] == 2
    else:
        first = shape[0] in _CHANNELS and shape[2] not in _CHANNELS
    return (shape[1], shape[2]) if first else (shape[0], shape[1])
