"""Encoded images to pixels; training and serving share it, so they see the same bits."""

import contextlib
import io

import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from vla_jax.data.errors import ImageDecodeError

_JPEG, _PNG = b"\xff\xd8", b"\x89PNG"


def decode(data: bytes | memoryview, fast_dct: bool = True) -> UInt8[np.ndarray, "h x 3"]:
    """A JPEG or PNG as RGB.

    The fast integer DCT with smooth chroma upsampling is what `tf.io.decode_image` does: the same
    bits as the pipelines the published weights were trained with. The accurate DCT differs by 1.2
    grey levels on average; it is PIL's, OpenCV's and most serving code's.

    Raises:
        ImageDecodeError: the bytes are not a sound image (the caller adds the place).
    """
    if bytes(data[:2]) == _JPEG:
        try:
            return simplejpeg.decode_jpeg(data, fastdct=fast_dct, fastupsample=False)
        except ValueError as error:
            raise ImageDecodeError(f"corrupt JPEG: {error}") from error
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert("RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        kind = "corrupt PNG" if bytes(data[:4]) == _PNG else "neither JPEG nor PNG"
        raise ImageDecodeError(f"{kind}: {_told(error)}") from error


def decode_into(
    data: bytes | memoryview | np.ndarray,
    out: UInt8[np.ndarray, "h x 3"],
    fast_dct: bool = True,
) -> None:
    """Decodes into `out`; an image of another size is squashed to it (Lanczos, antialiased).

    No bytes at all mean no image: `out` becomes black. Pixels need no decoding. `fast_dct`: see
    `decode`.

    Raises:
        ImageDecodeError: the bytes are not a sound image.
    """
    if not len(data):
        out[...] = 0
        return
    if isinstance(data, np.ndarray):
        _squash(data, out)
        return
    if bytes(data[:2]) == _JPEG and out.flags.c_contiguous:
        # Reading the header first would take 6 % of the time; a larger image is an error here too.
        with contextlib.suppress(ValueError):
            pixels = simplejpeg.decode_jpeg(data, fastdct=fast_dct, fastupsample=False, buffer=out)
            if pixels.shape == out.shape:
                return
    _squash(decode(data, fast_dct), out)


def _squash(pixels: UInt8[np.ndarray, "height width 3"], out: UInt8[np.ndarray, "h x 3"]) -> None:
    if pixels.shape != out.shape:
        size = (out.shape[1], out.shape[0])
        pixels = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))
    out[...] = pixels


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
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ImageDecodeError(f"not an image: {_told(error)}") from error


def _told(error: Exception) -> str:
    # Its own words name an object in memory.
    unknown = isinstance(error, UnidentifiedImageError)
    return "its beginning is no image's" if unknown else str(error)
