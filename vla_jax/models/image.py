"""From a camera's uint8 pixels to what the backbone expects, on the device.

Legend: h, x image height and width · s the model's square size · k filter taps

The resize is Pillow's 8-bit resampling (Resample.c of Pillow): two separable passes, horizontal
then vertical, fixed-point weights of 22 bits, rounded and clipped to uint8 after each. It equals
`PIL.Image.resize` to the bit, so weights tuned on Pillow-resized images see the same pixels;
floating-point resizes differ by up to 21 grey levels on noise.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, UInt8

# 32 bits less 8 of the pixel less 2 of headroom: sums of |weight| stay below 1.9 for every filter.
_PRECISION = 22


def _bicubic(x: float, a: float = -0.5) -> float:
    x = abs(x)
    if x < 1.0:
        return ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    return (((x - 5.0) * x + 8.0) * x - 4.0) * a if x < 2.0 else 0.0


def _bilinear(x: float) -> float:
    return max(0.0, 1.0 - abs(x))


def _sinc(x: float) -> float:
    return math.sin(math.pi * x) / (math.pi * x) if x else 1.0


def _lanczos(x: float) -> float:
    return _sinc(x) * _sinc(x / 3.0) if -3.0 <= x < 3.0 else 0.0


# name -> (kernel, its support in source pixels when enlarging)
FILTERS: dict[str, tuple[Callable[[float], float], float]] = {
    "bilinear": (_bilinear, 1.0),
    "bicubic": (_bicubic, 2.0),
    "lanczos": (_lanczos, 3.0),
}


@dataclass(frozen=True)
class ImageSpec:
    """What a backbone's image tower takes.

    Attributes:
        size: side of the square image, pixels.
        mean: per-channel mean of images in [0, 1].
        std: per-channel standard deviation, same units.
        resample: a key of `FILTERS`.

    Raises:
        ValueError: for a filter that is not in `FILTERS` or a size that is not positive.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resample: str = "bicubic"

    def __post_init__(self):
        if self.resample not in FILTERS:
            raise ValueError(f"resample: {self.resample!r} is none of {sorted(FILTERS)}")
        if self.size <= 0:
            raise ValueError(f"size: must be positive, not {self.size}")


@functools.lru_cache(maxsize=256)
def taps(
    source: int, target: int, resample: str
) -> tuple[Int32[np.ndarray, "k s"], Int32[np.ndarray, "k s"]]:
    """Fixed-point weights of one pass and the source index of each tap.

    The filter widens with the reduction (antialiasing). Taps are summed one after the other in
    float64, as Pillow does: another order may round a weight differently.
    """
    kernel, support = FILTERS[resample]
    scale = source / target
    stretch = max(scale, 1.0)
    support *= stretch
    count = math.ceil(support) * 2 + 1
    weights = np.zeros((count, target), np.int32)
    start = np.zeros(target, np.int32)
    for out in range(target):
        centre = (out + 0.5) * scale
        first = max(int(centre - support + 0.5), 0)
        last = min(int(centre + support + 0.5), source)
        row = [kernel((i - centre + 0.5) * (1.0 / stretch)) for i in range(first, last)]
        total = 0.0
        for value in row:
            total += value
        for i, value in enumerate(row):
            fixed = value / total * (1 << _PRECISION)
            weights[i, out] = int(fixed - 0.5) if fixed < 0 else int(fixed + 0.5)
        start[out] = first
    used = int(np.flatnonzero(weights.any(axis=1))[-1]) + 1
    index = np.minimum(start[None] + np.arange(used, dtype=np.int32)[:, None], source - 1)
    return weights[:used], index


def _pass(images: UInt8[Array, "..."], target: int, resample: str, axis: int) -> Array:
    weights, index = taps(images.shape[axis], target, resample)
    shape = [1] * images.ndim
    shape[axis] = target
    # A sum of gathers, not an integer matmul: 4 to 20 taps of hundreds of columns, and XLA fuses
    # it into one loop (CPU: 1.6 to 6 times faster than the dense int32 product).
    total = jnp.int32(1 << (_PRECISION - 1))
    for weight, i in zip(weights, index, strict=True):
        column = jnp.take(images, i, axis=axis, indices_are_sorted=True, mode="clip")
        total = total + column.astype(jnp.int32) * weight.reshape(shape)
    return jnp.clip(total >> _PRECISION, 0, 255).astype(jnp.uint8)


def resize(
    images: UInt8[Array, "*lead h x 3"], height: int, width: int, resample: str
) -> UInt8[Array, "*lead height width 3"]:
    """`PIL.Image.resize((width, height), resample)` of every image, bit-exact; free if no change.

    The aspect ratio is not kept.
    """
    if images.shape[-2] != width:
        images = _pass(images, width, resample, images.ndim - 2)
    if images.shape[-3] != height:
        images = _pass(images, height, resample, images.ndim - 3)
    return images


def normalize(images: Float[Array, "*lead 3"], spec: ImageSpec) -> Float[Array, "*lead 3"]:
    """[0, 1] -> the backbone's units: subtract the mean, then divide, in float32."""
    return (images - jnp.asarray(spec.mean, jnp.float32)) / jnp.asarray(spec.std, jnp.float32)


def preprocess(images: UInt8[Array, "*lead h x 3"], spec: ImageSpec) -> Float[Array, "*lead s s 3"]:
    """Resize, scale to [0, 1], normalise: torchvision's Resize, ToTensor, Normalize.

    Raises:
        TypeError: if the images are not uint8.
    """
    if images.dtype != jnp.uint8:
        raise TypeError(f"images: expected uint8 pixels, not {images.dtype}")
    images = resize(images, spec.size, spec.size, spec.resample)
    return normalize(images.astype(jnp.float32) / 255.0, spec)
