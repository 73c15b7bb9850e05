"""From a camera's uint8 pixels to what the backbone expects, on the device.

Legend: h, x image height and width · height, width of the model's image · k filter taps · s outputs

The resize is Pillow's 8-bit resampling (Resample.c of Pillow): two separable passes, horizontal
then vertical, fixed-point weights of 22 bits, rounded and clipped to uint8 after each. It equals
`PIL.Image.resize` to the bit, so weights tuned on Pillow-resized images see the same pixels;
floating-point resizes differ by up to 21 gray levels on noise.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, UInt8

from vla_jax.models import letterbox, tensorflow_image

# 32 bits less 8 of the pixel less 2 of headroom: sums of |weight| stay below 1.9 for every filter.
_PRECISION = 22
# Taps beyond which a loop is compiled: the unrolled sum takes minutes to compile at 500.
_UNROLLED = 64


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


# A filter whose passes are TensorFlow's.
_TENSORFLOW = "lanczos3"
# How an image of another shape becomes the model's; see `ImageSpec.fit`.
FITS = ("squash", "crop", "pad", "letterbox")


@dataclass(frozen=True)
class ImageSpec:
    """What a backbone's image tower takes, and how a camera's image becomes it.

    Attributes:
        size: height of the model's image, pixels.
        mean: per-channel mean of images in [0, 1].
        std: per-channel standard deviation, same units.
        resample: a key of `FILTERS`; of "letterbox" also of `letterbox.FLOATING`, of "squash" also
            lanczos3, TensorFlow's.
        fit: squash: resize both sides, the aspect ratio is lost; crop: resize the shorter side to
            `shortest`, keep the center; pad: paste on the middle of a square, then resize;
            letterbox: resize until it fits, then paste on a canvas.
        shortest: of "crop", pixels; 0 = the model's shorter side.
        crop_rounding: of "crop", where an odd margin's half goes: down (Hugging Face) or
            half_even (torchvision's CenterCrop).
        background: of "pad" and "letterbox", the color in [0, 1]; None = `mean`.
        corner: of "letterbox": the canvas shows above and left alone; else on all sides.
        larger: sizes to take instead of `size` for images whose longer side has at least
            `larger_from` pixels: of these and `size` the one of the nearest aspect ratio.
        larger_from: see `larger`.
        width: of the model's image, pixels; 0 = as high as wide.
        zoom: share of the model's image, its center, that is enlarged to all of it; 1 = no change.

    Raises:
        ValueError: naming every value that cannot be.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resample: str = "bicubic"
    fit: str = "squash"
    shortest: int = 0
    crop_rounding: str = "down"
    background: tuple[float, float, float] | None = None
    larger: tuple[tuple[int, int], ...] = ()
    larger_from: int = 0
    width: int = 0
    corner: bool = False
    zoom: float = 1.0

    def __post_init__(self):
        problems = [
            f"{name}: {value!r} is none of {sorted(legal)}"
            for name, value, legal in (
                ("resample", self.resample, self._filters),
                ("fit", self.fit, FITS),
                ("crop_rounding", self.crop_rounding, ("down", "half_even")),
            )
            if value not in legal
        ]
        if min(self.shape) <= 0:
            problems.append(f"size: must be positive, not {self.shape}")
        if self.shortest and self.shortest < max(self.shape):
            problems.append(f"shortest: {self.shortest} pixels leave no crop of {self.shape}")
        if problems:
            raise ValueError("image: " + "; ".join(problems))

    @classmethod
    def clip(cls, size: int, resample: str = "bicubic", fit: str = "squash") -> "ImageSpec":
        """OpenAI-CLIP's preprocessing, with its mean and deviation."""
        mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
        return cls(size, mean, std, resample, fit)

    @property
    def _filters(self) -> tuple[str, ...]:
        floating = {"letterbox": (*letterbox.FLOATING,), "squash": (_TENSORFLOW,)}
        return (*FILTERS, *floating.get(self.fit, ()))

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the model's image (before `larger`)."""
        return self.size, self.width or self.size

    def keeps(self, height: int, width: int) -> bool:
        """Whether `fit` leaves an image of this shape as it is."""
        if self.zoom != 1.0:
            return False
        # Fits other than squash may cut or pad even an image of the right size.
        changes = self.fit != "squash" and (height != width or self.shortest > 0)
        return not changes and self.shape_for(height, width) == (height, width)

    def shape_for(self, height: int, width: int) -> tuple[int, int]:
        """Height and width that an image of this shape is resized to."""
        if not self.larger or max(height, width) < self.larger_from:
            return self.shape
        # Of equal ratios the nearest size. Moondream's comparison of heights with widths is kept.
        return min(
            (self.shape, *self.larger),
            key=lambda s: (
                abs(s[1] / s[0] - width / height),
                abs(s[0] - width) + abs(s[1] - height),
            ),
        )


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
        # Pillow cuts the filter off at the edges and divides by what is left of its sum.
        first = max(int(centre - support + 0.5), 0)
        last = min(int(centre + support + 0.5), source)
        # The center of a pixel lies at i + 0.5.
        row = [kernel((i - centre + 0.5) * (1.0 / stretch)) for i in range(first, last)]
        total = 0.0
        for value in row:
            total += value
        for i, value in enumerate(row):
            # Pillow rounds half away from zero, which Python's `round` does not.
            fixed = value / total * (1 << _PRECISION)
            weights[i, out] = int(fixed - 0.5) if fixed < 0 else int(fixed + 0.5)
        start[out] = first
    # Taps that are zero for every pixel would be gathered for nothing.
    used = int(np.flatnonzero(weights.any(axis=1))[-1]) + 1
    index = np.minimum(start[None] + np.arange(used, dtype=np.int32)[:, None], source - 1)
    return weights[:used], index


def _pass(images: UInt8[Array, "..."], target: int, resample: str, axis: int) -> Array:
    weights, index = taps(images.shape[axis], target, resample)
    shape = [1] * images.ndim
    shape[axis] = target

    def add(total: Any, tap: Any) -> tuple[Array, None]:
        weight, i = tap
        column = jnp.take(images, i, axis=axis, indices_are_sorted=True, mode="clip")
        return total + column.astype(jnp.int32) * weight.reshape(shape), None

    # A sum of gathers, not an integer matmul: 4 to 20 taps of hundreds of columns, and XLA fuses
    # it into one loop (CPU: 1.6 to 6 times faster than the dense int32 product).
    total: Any = jnp.int32(1 << (_PRECISION - 1))
    if len(weights) <= _UNROLLED:
        for tap in zip(weights, index, strict=True):
            total, _ = add(total, tap)
    else:
        # The carry of a scan has its full shape from the start.
        sides = [target if i == axis else side for i, side in enumerate(images.shape)]
        total, _ = jax.lax.scan(add, jnp.full(sides, total), (weights, index))
    # The half that the sum began with makes the shift round.
    return jnp.clip(total >> _PRECISION, 0, 255).astype(jnp.uint8)


def resize(
    images: UInt8[Array, "*lead h x 3"], height: int, width: int, resample: str
) -> UInt8[Array, "*lead height width 3"]:
    """`PIL.Image.resize((width, height), resample)` of every image, bit-exact; free if no change.

    The aspect ratio is not kept.
    """
    # Pillow makes the horizontal pass first and rounds to uint8 between the two.
    if images.shape[-2] != width:
        images = _pass(images, width, resample, images.ndim - 2)
    if images.shape[-3] != height:
        images = _pass(images, height, resample, images.ndim - 3)
    return images


def fit(
    images: UInt8[Array, "*lead h x 3"], spec: ImageSpec
) -> UInt8[Array, "*lead height width 3"]:
    """The model's size and shape, by the way of `spec.fit`; still uint8.

    Raises:
        TypeError: if the images are not uint8.
    """
    if images.dtype != jnp.uint8:
        raise TypeError(f"images: expected uint8 pixels, not {images.dtype}")
    h, x = images.shape[-3:-1]
    height, width = spec.shape_for(h, x)
    if spec.fit == "pad" and h != x:
        images = _pad_to_square(images, spec)
    elif spec.fit == "crop":
        # The longer side is truncated, as torchvision and Hugging Face do.
        short = spec.shortest or min(height, width)
        scaled = (short, int(short * x / h)) if h <= x else (int(short * h / x), short)
        images = resize(images, *scaled, spec.resample)
        images = _centre(images, height, width, spec.crop_rounding)
    elif spec.fit == "letterbox":
        images = _letterbox(images, height, width, spec)
    if spec.resample == _TENSORFLOW:
        images = tensorflow_image.lanczos3(images, height, width)
    else:
        images = resize(images, height, width, spec.resample)
    return tensorflow_image.zoom(images, spec.zoom)


def _letterbox(
    images: UInt8[Array, "*lead h x 3"], height: int, width: int, spec: ImageSpec
) -> UInt8[Array, "*lead height width 3"]:
    h, x = images.shape[-3:-1]
    inner = letterbox.shape_within(h, x, height, width)
    change = letterbox.interpolate if spec.resample in letterbox.FLOATING else resize
    scaled = change(images, inner[0], inner[1], spec.resample)
    # The canvas is of one gray value; a colored one fails here.
    (value,) = {int(part * 255) for part in spec.background or spec.mean}
    return letterbox.paste(scaled, height, width, spec.corner, float(value))


def _pad_to_square(images: UInt8[Array, "*lead h x 3"], spec: ImageSpec) -> Array:
    h, x = images.shape[-3:-1]
    side = max(h, x)
    # Truncated, as LLaVA's code does.
    colour = [int(value * 255) for value in spec.background or spec.mean]
    canvas = jnp.broadcast_to(jnp.asarray(colour, jnp.uint8), (*images.shape[:-3], side, side, 3))
    corner = (0,) * (images.ndim - 3) + ((side - h) // 2, (side - x) // 2, 0)
    return jax.lax.dynamic_update_slice(canvas, images, corner)


def _centre(images: UInt8[Array, "*lead h x 3"], height: int, width: int, rounding: str) -> Array:
    h, x = images.shape[-3:-1]

    def start(margin: int) -> int:
        # `round` goes to the even neighbor, as in torchvision's center crop.
        return margin // 2 if rounding == "down" else round(margin / 2)

    top, left = start(h - height), start(x - width)
    return images[..., top : top + height, left : left + width, :]


def normalize(images: Float[Array, "*lead 3"], spec: ImageSpec) -> Float[Array, "*lead 3"]:
    """[0, 1] -> the backbone's units: subtract the mean, then divide, in float32."""
    return (images - jnp.asarray(spec.mean, jnp.float32)) / jnp.asarray(spec.std, jnp.float32)


def preprocess(
    images: UInt8[Array, "*lead h x 3"], spec: ImageSpec
) -> Float[Array, "*lead height width 3"]:
    """`fit`, scale to [0, 1], `normalize`.

    Raises:
        TypeError: if the images are not uint8.
    """
    return normalize(fit(images, spec).astype(jnp.float32) / 255.0, spec)
