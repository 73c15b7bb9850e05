"""Frames -> an animated WebP or GIF, which every browser plays without a codec."""

from __future__ import annotations

import os
from typing import List

import numpy as np
from PIL import Image


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
