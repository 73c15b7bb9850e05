"""Encoded images to pixels; training and serving share it, so they see the same bits."""

import contextlib
import io
import struct
import zlib

import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from vla_jax.data.errors import ImageDecodeError

_JPEG, _PNG = b"\xff\xd8", b"\x89PNG"
# Modes of Pillow's that hold colors or gray levels of 8 bits, with or without transparency.
_COLORS = (
    "1",
    "L",
    "LA",
    "La",
    "P",
    "PA",
    "RGB",
    "RGBA",
    "RGBa",
    "RGBX",
    "CMYK",
    "YCbCr",
    "HSV",
    "LAB",
)
_DEEP = {"F": "fractions", "I": "numbers of more than 8 bits"} | {
    mode: "numbers of 16 bits" for mode in ("I;16", "I;16L", "I;16B", "I;16N")
}
# What Pillow raises of bytes that are no sound image.
_UNSOUND = (
    UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError,
    ArithmeticError, MemoryError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip


def decode(data: bytes | memoryview, fast_dct: bool = True) -> UInt8[np.ndarray, "h x 3"]:
    """A JPEG or PNG as RGB.

    The fast integer DCT with smooth chroma upsampling is what `tf.io.decode_image` does: the same
    bits as the pipelines the published weights were trained with. The accurate DCT differs by 1.2
    gray levels on average; it is PIL's, OpenCV's and most serving code's.

    Raises:
        ImageDecodeError: the bytes are not a sound image (the caller adds the place).
    """
    if bytes(data[:2]) == _JPEG:
        try:
            return simplejpeg.decode_jpeg(data, fastdct=fast_dct, fastupsample=False)
        except ValueError as error:
            raise ImageDecodeError(f"corrupt JPEG: {error}") from error
    png = bytes(data[:4]) == _PNG
    try:
        if png:
            _check_png(bytes(data))
        with Image.open(io.BytesIO(data)) as image:
            if image.mode not in _COLORS:
                held = _DEEP.get(image.mode, "unknown numbers")
                raise ImageDecodeError(
                    f"an image of {held} (mode {image.mode}) is no camera's picture: distances "
                    "(depth) are not read as colors"
                )
            return np.asarray(image.convert("RGB"))
    # It is a ValueError too, which the next clause would take for Pillow's.
    except ImageDecodeError:
        raise
    except _UNSOUND as error:
        kind = "corrupt PNG" if png else "neither JPEG nor PNG"
        raise ImageDecodeError(f"{kind}: {_told(error)}") from error


def _check_png(data: bytes) -> None:
    """Compares the checksums of a PNG's chunks, which Pillow does not do for the pixels."""
    at = 8  # bytes of the signature
    # Each part: its length, its type, its content, and a CRC of the last two.
    while at + 12 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        stop = at + 8 + size
        if zlib.crc32(data[at + 4 : stop]) != int.from_bytes(data[stop : stop + 4], "big"):
            raise ValueError(f"the checksum of its part at byte {at} differs")
        if data[at + 4 : at + 8] == b"IEND":
            return
        at = stop + 4
    raise ValueError("its end is missing")


def decode_into(
    data: bytes | memoryview | np.ndarray,
    out: UInt8[np.ndarray, "h x 3"],
    fast_dct: bool = True,
) -> tuple[int, int]:
    """Decodes into `out`; an image of another size is squashed to it (Lanczos, antialiased).

    No bytes at all mean no image: `out` becomes black. Pixels need no decoding. `fast_dct`: see
    `decode`.

    Returns:
        The image's own (height, width); that of `out` where there is no image.

    Raises:
        ImageDecodeError: the bytes are not a sound image.
    """
    if not len(data):
        out[...] = 0
        return out.shape[0], out.shape[1]
    if isinstance(data, np.ndarray):
        return _squash(data, out)
    # The decoder writes straight into `out`, row after row, so it must have no gaps.
    if bytes(data[:2]) == _JPEG and out.flags.c_contiguous:
        # Reading the header first would take 6 % of the time; a larger image is an error here too.
        with contextlib.suppress(ValueError):
            pixels = simplejpeg.decode_jpeg(data, fastdct=fast_dct, fastupsample=False, buffer=out)
            if pixels.shape == out.shape:
                return out.shape[0], out.shape[1]
    return _squash(decode(data, fast_dct), out)


def _squash(
    pixels: UInt8[np.ndarray, "height width 3"], out: UInt8[np.ndarray, "h x 3"]
) -> tuple[int, int]:
    height, width = pixels.shape[:2]
    if pixels.shape != out.shape:
        size = (out.shape[1], out.shape[0])
        # Pillow's own filter shrinks without aliasing, which a plain sampling would not.
        pixels = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))
    out[...] = pixels
    return height, width


def image_size(data: bytes | memoryview | np.ndarray) -> tuple[int, int]:
    """Height and width, of encoded images from the header alone.

    Raises:
        ImageDecodeError: the bytes are not an image.
    """
    if isinstance(data, np.ndarray):
        return data.shape[0], data.shape[1]
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.height, image.width
    except _UNSOUND as error:
        raise ImageDecodeError(f"not an image: {_told(error)}") from error


def _told(error: Exception) -> str:
    # Its own words name an object in memory.
    unknown = isinstance(error, UnidentifiedImageError)
    return "its beginning is no image's" if unknown else str(error)
