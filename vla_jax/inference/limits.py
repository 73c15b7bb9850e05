"""What a client may send: images and numbers that a policy can use, and how large they may be."""

from typing import Any

import numpy as np

# An image far from any camera's would be resized by filters, or padded to a square, that take
# gigabytes and minutes; a prompt is tokenized before it is measured.
MAX_SIDE = 4096  # pixels
MAX_ASPECT = 16  # longer side over shorter
MAX_PROMPT = 8192  # characters

_NUMBERS = (int, float, np.number)


def image_problems(image: Any, key: str, camera: str) -> list[str]:
    """What is wrong with a camera's image, [] if nothing; `key` is the client's name for it."""
    if image is None:
        return [f"{key}: missing ({camera} camera)"]
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        kind = image.dtype if isinstance(image, np.ndarray) else type(image).__name__
        return [f"{key}: expected a uint8 array [h, w, 3], got {kind}"]
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        return [f"{key}: expected shape [h, w, 3], got {list(image.shape)}"]
    if max(image.shape) > min(MAX_SIDE, MAX_ASPECT * min(image.shape[:2])):
        limit = f"{MAX_SIDE} pixels a side and {MAX_ASPECT} times as long as wide"
        return [f"{key}: {list(image.shape)} is no camera's; at most {limit}"]
    return []


def state_problems(value: Any, key: str, dim: int) -> list[str]:
    """What is wrong with a robot's state of `dim` numbers, [] if nothing."""
    state = _numbers(value)
    if state.shape != (dim,) or state.dtype.kind not in "fiu":
        return [f"{key}: expected {dim} numbers, got shape {list(state.shape)}"]
    # A NaN would stay in the history for the rest of the episode.
    if not np.isfinite(state).all():
        return [f"{key}: {np.round(state, 3).tolist()} are not all finite"]
    return []


def _numbers(value: Any) -> np.ndarray:
    """An array, or a list of numbers, as an array; an empty one for what is neither.

    Anything else stays as it is: numpy would make room for the longest of a list's texts in each.
    """
    listed = isinstance(value, list) and all(isinstance(x, _NUMBERS) for x in value)
    return np.asarray(value) if listed or isinstance(value, np.ndarray) else np.empty(0)
