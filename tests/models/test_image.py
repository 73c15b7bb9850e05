import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from vla_jax.models import image

PILLOW = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def noise(*shape: int) -> np.ndarray:
    # Noise has every rounding case; black and white edges reach both clips.
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    pixels[..., : shape[-2] // 4, :] = np.where(pixels[..., : shape[-2] // 4, :] < 128, 0, 255)
    return pixels


@pytest.mark.parametrize("resample", sorted(PILLOW))
@pytest.mark.parametrize(
    ("source", "target"),
    [((200, 200), (224, 224)), ((84, 84), (224, 224)), ((120, 160), (56, 56)),
     ((33, 57), (64, 40)), ((480, 640), (224, 224)), ((64, 64), (64, 30)), ((2, 3), (5, 7))],
)  # fmt: skip
def test_resize_equals_pillow_to_the_bit(source, target, resample):
    pixels = noise(2, *source, 3)
    ours = jax.jit(image.resize, static_argnums=(1, 2, 3))(pixels, *target, resample)
    for mine, original in zip(np.asarray(ours), pixels, strict=True):
        theirs = Image.fromarray(original).resize(target[::-1], PILLOW[resample])
        np.testing.assert_array_equal(mine, np.asarray(theirs))


def test_resize_keeps_leading_axes_and_skips_when_the_size_matches():
    pixels = jnp.asarray(noise(2, 3, 16, 16, 3))
    assert image.resize(pixels, 16, 16, "lanczos") is pixels
    smaller = image.resize(pixels, 8, 8, "lanczos")
    np.testing.assert_array_equal(smaller[1, 2], image.resize(pixels[1, 2], 8, 8, "lanczos"))


def test_preprocess_is_totensor_then_normalize():
    pixels, spec = noise(2, 32, 32, 3), image.ImageSpec(32, *CLIP)
    mean, std = (np.asarray(values, np.float32) for values in CLIP)
    expected = (pixels.astype(np.float32) / np.float32(255) - mean) / std
    ours = jax.jit(lambda x: image.preprocess(x, spec))(pixels)
    assert ours.dtype == jnp.float32
    # XLA may multiply by a reciprocal: one rounding more, at most.
    np.testing.assert_allclose(ours, expected, rtol=0, atol=5e-7)


def test_wrong_dtype_filter_and_size_are_refused():
    with pytest.raises(TypeError, match=r"(?i)uint8"):
        image.preprocess(jnp.zeros((4, 4, 3)), image.ImageSpec(4, *CLIP))
    with pytest.raises(ValueError, match="'nearest' is none of"):
        image.ImageSpec(224, *CLIP, resample="nearest")
    with pytest.raises(ValueError, match="positive"):
        image.ImageSpec(0, *CLIP)
