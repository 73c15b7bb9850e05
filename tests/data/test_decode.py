import io

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from vla_jax.data.decode import decode, decode_into, image_size
from vla_jax.data.errors import ImageDecodeError

PIXELS = np.random.default_rng(0).integers(0, 255, (20, 28, 3)).astype(np.uint8)
JPEG = simplejpeg.encode_jpeg(PIXELS, quality=95, colorsubsampling="444")


def png(pixels, mode="RGB"):
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


def test_png_is_lossless_and_becomes_rgb():
    np.testing.assert_array_equal(decode(png(PIXELS)), PIXELS)
    np.testing.assert_array_equal(decode(png(PIXELS, "RGBA")), PIXELS)
    assert decode(png(PIXELS, "L")).shape == (20, 28, 3)


def test_into_a_preallocated_array():
    out = np.full((2, 20, 28, 3), 7, np.uint8)
    decode_into(JPEG, out[1])
    np.testing.assert_array_equal(out[1], decode(JPEG))
    assert (out[0] == 7).all()
    decode_into(memoryview(png(PIXELS)), out[0])
    np.testing.assert_array_equal(out[0], PIXELS)


def test_other_sizes_are_squashed_with_antialiasing():
    out = np.empty((10, 10, 3), np.uint8)
    decode_into(JPEG, out)
    expected = Image.fromarray(decode(JPEG)).resize((10, 10), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(out, np.asarray(expected))


def test_the_accurate_dct_is_pils():
    expected = np.asarray(Image.open(io.BytesIO(JPEG)))
    np.testing.assert_array_equal(decode(JPEG, fast_dct=False), expected)
    out = np.empty((20, 28, 3), np.uint8)
    decode_into(JPEG, out, fast_dct=False)
    np.testing.assert_array_equal(out, expected)
    assert not np.array_equal(decode(JPEG), expected)


def test_no_bytes_are_a_black_image():
    out = np.full((4, 4, 3), 9, np.uint8)
    decode_into(b"", out)
    assert (out == 0).all()


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (JPEG[: len(JPEG) // 2], "corrupt JPEG"),
        (JPEG[:30], "corrupt JPEG"),
        (png(PIXELS)[:60], "corrupt PNG"),
        (b"GIF89a.....", "neither JPEG nor PNG"),
    ],
)
def test_corrupt_images(data, kind):
    with pytest.raises(ImageDecodeError, match=kind):
        decode(data)
    with pytest.raises(ImageDecodeError, match=kind):
        decode_into(data, np.empty((20, 28, 3), np.uint8))


def test_image_size_reads_the_header():
    assert image_size(JPEG) == image_size(png(PIXELS)) == (20, 28)
    with pytest.raises(ImageDecodeError):
        image_size(b"nothing")
