import dataclasses

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


SIZES = [
    ((200, 200), (224, 224)), ((84, 84), (224, 224)), ((120, 160), (56, 56)), ((33, 57), (64, 40)),
    ((480, 640), (224, 224)), ((64, 64), (64, 30)), ((2, 3), (5, 7)),
    ((40, 1000), (8, 8)),  # more taps than are unrolled
]  # fmt: skip
# Every size with one filter, the sizes of every kind of change with the others.
FEW = SIZES[1:4] + SIZES[-1:]


@pytest.mark.parametrize(
    ("source", "target", "resample"),
    [
        pytest.param(
            *size, name, marks=() if name == "bicubic" or size in FEW else pytest.mark.slow
        )
        for size in SIZES
        for name in sorted(PILLOW)
    ],
)
def test_resize_equals_pillow_to_the_bit(source, target, resample):
    pixels = noise(2, *source, 3)
    ours = jax.jit(image.resize, static_argnums=(1, 2, 3))(pixels, *target, resample)
    for actual, original in zip(np.asarray(ours), pixels, strict=True):
        reference = Image.fromarray(original).resize(target[::-1], PILLOW[resample])
        np.testing.assert_array_equal(actual, np.asarray(reference))


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
    with pytest.raises(ValueError, match=r"'stretch' is none of.*'up' is none of.*leave no crop"):
        image.ImageSpec(224, *CLIP, fit="stretch", crop_rounding="up", shortest=200)


def ours(pixels: np.ndarray, spec: image.ImageSpec) -> np.ndarray:
    return np.asarray(jax.jit(lambda x: image.preprocess(x, spec))(pixels))


SHAPES = [(48, 64), (64, 48), (57, 100), (33, 33)]


def theirs(processor, pixels: np.ndarray) -> np.ndarray:
    out = processor(Image.fromarray(pixels), return_tensors="np")["pixel_values"]
    return np.moveaxis(out[0], 0, -1)


# Hugging Face's Pillow processors, the recipes of the released preprocessor_config.json files.
def hugging_face_cases():
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    clip = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=28)
    yield "clip", clip, image.ImageSpec(28, *CLIP, fit="crop")
    siglip = SiglipImageProcessorPil(size={"height": 30, "width": 30})
    half = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    # Its class default is bicubic; PaliGemma's file says so too.
    yield "siglip", siglip, image.ImageSpec(30, *half)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_equals_the_hugging_face_processor(name, shape):
    processor, spec = {n: (p, s) for n, p, s in hugging_face_cases()}[name]
    pixels = noise(*shape, 3)
    np.testing.assert_allclose(ours(pixels, spec), theirs(processor, pixels), rtol=0, atol=2e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_hugging_face_processor_of_qwen2_vl(shape):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
        Qwen2VLImageProcessorPil,
    )

    pixels, limits = noise(*shape, 3), (24 * 24, 40 * 40)
    processor = Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, size={"shortest_edge": limits[0], "longest_edge": limits[1]}
    )
    out = processor(Image.fromarray(pixels), return_tensors="np")
    _, rows, columns = (int(side) for side in np.asarray(out["image_grid_thw"])[0])
    height, width = 4 * rows, 4 * columns
    # Patches [y, x, y in the merge, x in the merge, channel, frame, row, column] -> an image.
    patches = np.asarray(out["pixel_values"])
    patches = patches.reshape(rows // 2, columns // 2, 2, 2, 3, 2, 4, 4)[..., 0, :, :]
    expected = patches.transpose(0, 2, 5, 1, 3, 6, 4).reshape(height, width, 3)
    actual = ours(pixels, image.ImageSpec(height, *CLIP, width=width))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_crop_of_torchvision_rounds_half_to_even(shape):
    # Resize(32), CenterCrop(23) by their definitions: UForm-Gen's first processor.
    pixels = noise(*shape, 3)
    spec = image.ImageSpec(23, *CLIP, fit="crop", shortest=32, crop_rounding="half_even")
    h, x = shape
    size = (32, int(32 * h / x)) if x <= h else (int(32 * x / h), 32)
    scaled = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
    left, top = round((size[0] - 23) / 2), round((size[1] - 23) / 2)
    expected = np.asarray(scaled.crop((left, top, left + 23, top + 23)))
    np.testing.assert_array_equal(image.fit(jnp.asarray(pixels), spec), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_pad_is_pillows_paste_on_a_square(shape):
    # UForm-Gen2: the mean's colour around the image, then a bilinear resize.
    pixels = noise(*shape, 3)
    spec = image.ImageSpec(20, *CLIP, resample="bilinear", fit="pad")
    h, x = shape
    side = max(h, x)
    square = Image.new("RGB", (side, side), tuple(int(255 * c) for c in CLIP[0]))
    square.paste(Image.fromarray(pixels), ((side - x) // 2, (side - h) // 2))
    expected = np.asarray(square.resize((20, 20), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(image.fit(jnp.asarray(pixels), spec), expected)


def test_larger_sizes_are_for_large_images_by_aspect_ratio():
    spec = image.ImageSpec(378, *CLIP, larger=((378, 756), (756, 378), (756, 756)), larger_from=512)
    chosen = {s: spec.shape_for(*s) for s in [(200, 300), (480, 640), (300, 700), (900, 400)]}
    assert chosen == {
        (200, 300): (378, 378), (480, 640): (378, 378), (300, 700): (378, 756),
        (900, 400): (756, 378),
    }  # fmt: skip
    # Equal ratios: the nearer one.
    assert spec.shape_for(1000, 1000) == (756, 756)


def test_zoom_is_openvlas_center_crop():
    tf = pytest.importorskip("tensorflow")
    pixels, side = noise(2, 40, 40, 3), np.float32(0.9) ** 0.5
    box = [(1 - side) / 2, (1 - side) / 2, (1 + side) / 2, (1 + side) / 2]
    scaled = tf.image.convert_image_dtype(pixels, tf.float32)
    reference = tf.image.crop_and_resize(scaled, [box] * 2, [0, 1], (40, 40))
    reference = tf.image.convert_image_dtype(
        tf.clip_by_value(reference, 0, 1), tf.uint8, saturate=True
    )
    spec = image.ImageSpec(40, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), zoom=0.9)
    off = np.abs(np.asarray(image.fit(jnp.asarray(pixels), spec)).astype(int) - reference.numpy())
    # Sums of another order end on the other side of a cut now and then.
    assert off.max() <= 1
    assert off.mean() < 0.01


def test_an_image_that_is_zoomed_into_is_not_left_as_it_is():
    spec = image.ImageSpec(16, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    assert spec.keeps(16, 16)
    assert not spec.keeps(16, 20)
    assert not dataclasses.replace(spec, zoom=0.9).keeps(16, 16)
    assert dataclasses.replace(spec, fit="pad").keeps(16, 16)
    assert not dataclasses.replace(spec, fit="crop", shortest=20).keeps(16, 16)


def test_tensorflows_filter_is_for_squashing_alone():
    image.ImageSpec(16, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), resample="lanczos3")
    with pytest.raises(ValueError, match="resample: 'lanczos3' is none of"):
        image.ImageSpec(16, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), resample="lanczos3", fit="crop")
