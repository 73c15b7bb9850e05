"""Resizing that keeps the aspect ratio and pads what is left: openpi's and LeRobot's ways.

Legend: h, x image height and width · height, width of the result
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Num

# How pixels are interpolated, besides Pillow's ways: linearly in floating point, with the filter
# widened where the image shrinks (`jax.image.resize`), or not (torch's `interpolate`).
FLOATING = {"linear": True, "linear_aliased": False}


def shape_within(h: int, x: int, height: int, width: int) -> tuple[int, int]:
    """Height and width of the resized image; both are truncated, as the originals do."""
    ratio = max(x / width, h / height)
    # A very long image would otherwise be truncated to no pixels at all.
    return max(int(h / ratio), 1), max(int(x / ratio), 1)


def margins(h: int, x: int, height: int, width: int, corner: bool) -> tuple[int, int]:
    """Rows above and columns left of the image.

    Args:
        h: height of the resized image.
        x: its width.
        height: of the result.
        width: of the result.
        corner: all of the padding is above and left (LeRobot), else the image is in the middle,
            of an odd rest the larger half below and right (openpi).
    """
    above, left = height - h, width - x
    return (above, left) if corner else (above // 2, left // 2)


def interpolate(
    images: Num[Array, "*lead h x 3"], height: int, width: int, resample: str
) -> Num[Array, "*lead height width 3"]:
    """Linear interpolation in float32 (a key of `FLOATING`); uint8 is rounded to uint8 again."""
    shape = (*images.shape[:-3], height, width, images.shape[-1])
    if images.shape == shape:
        return images
    resized: Any = jax.image.resize(
        images.astype(jnp.float32), shape, "linear", antialias=FLOATING[resample]
    )
    if images.dtype == jnp.uint8:
        resized = jnp.clip(jnp.round(resized), 0, 255)
    return resized.astype(images.dtype)


def paste(
    images: Num[Array, "*lead h x 3"], height: int, width: int, corner: bool, background: float
) -> Num[Array, "*lead height width 3"]:
    """A resized image on a canvas of one value; see `margins`."""
    h, x = images.shape[-3:-1]
    above, left = margins(h, x, height, width, corner)
    rows, columns = (above, height - h - above), (left, width - x - left)
    edges = [(0, 0)] * (images.ndim - 3) + [rows, columns, (0, 0)]
    return jnp.pad(images, edges, constant_values=jnp.asarray(background, images.dtype))
