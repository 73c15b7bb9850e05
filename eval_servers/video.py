"""Frames -> an animated WebP or GIF, which every browser plays without a codec."""

from __future__ import annotations

import io
import os
from typing import List

import numpy as np
from PIL import Image

_FRAMES = 240  # of a film at most


def jpeg(picture: np.ndarray) -> bytes:
    """A uint8 [h, w, 3] frame, small enough to keep a long episode's in memory."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def film(path: str, frames: List[bytes]) -> None:
    """Write a video of frames that `jpeg` made, every n-th of a long episode."""
    # Rounded up, so that the film never exceeds `_FRAMES`.
    stride = -(-len(frames) // _FRAMES)
    save_video(path, [np.asarray(Image.open(io.BytesIO(frame))) for frame in frames[::stride]])


def save_video(path: str, frames: List[np.ndarray], fps: float = 15.0) -> None:
    """Write uint8 [h, w, 3] frames; the last is held for a second before the loop starts over.

    A path that ends in .gif becomes a GIF, any other a WebP.
    """
    gif = path.lower().endswith(".gif")
    images = [Image.fromarray(frame) for frame in frames]
    frame_ms = round(1000 / fps)
    beside = path + ".tmp"
    images[0].save(
        beside,
        format="GIF" if gif else "WEBP",
        save_all=True,
        append_images=images[1:],
        duration=[frame_ms] * (len(images) - 1) + [1000],
        loop=0,
        **({} if gif else {"quality": 70, "method": 2}),
    )
    os.replace(beside, path)
