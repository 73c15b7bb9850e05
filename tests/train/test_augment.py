import colorsys
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.train.toy import Toy, make_batch, make_config
from vla_jax.config import AugmentConfig, AugmentParity
from vla_jax.models.image import ImageSpec, preprocess
from vla_jax.train import augment as module
from vla_jax.train.mesh import make_mesh, shard_batch
from vla_jax.types import Batch

OFF = AugmentConfig()
ALL = dataclasses.replace(
    OFF, shift={"primary": 2, "wrist": 1}, crop_scale=0.9, brightness=0.2, contrast=0.2,
    saturation=0.2, hue=0.05, dropout=0.3, per_frame=True,
)  # fmt: skip


lanczos3 = jax.jit(module.lanczos3, static_argnums=(1, 2))


def run(batch: Batch, config: AugmentConfig, seed: int = 3, train: bool = True) -> dict:
    out = compiled(config, seed, train)(batch)
    return {camera: np.asarray(x) for camera, x in out.images.items()}


@functools.cache
def _jit(key: str, seed: int, train: bool):
    config = eval(key)  # a dict inside a config cannot be a cache key
    return jax.jit(
        lambda b: module.augment(b.observation, b.sample, seed, config, Toy.image, train)
    )


def compiled(config: AugmentConfig, seed: int, train: bool):
    return _jit(repr(config), seed, train)


def masks(batch: Batch, config: AugmentConfig) -> dict:
    out = compiled(config, 3, True)(batch)
    return {camera: np.asarray(x) for camera, x in out.image_mask.items()}


def raw(images: np.ndarray) -> np.ndarray:
    mean, std = np.asarray(Toy.image.mean), np.asarray(Toy.image.std)
    return images * std + mean


def test_switched_off_or_evaluating_is_plain_preprocessing():
    batch = make_batch(size=12)
    for images in (run(batch, OFF), run(batch, ALL, train=False)):
        for camera, x in images.items():
            expected = preprocess(jnp.asarray(batch.observation.images[camera]), Toy.image)
            np.testing.assert_allclose(x, expected, rtol=0, atol=5e-7)  # jit may fuse


def test_pixels_depend_on_the_sample_number_alone():
    batch = make_batch(rows=8)
    full = run(batch, ALL)
    mesh = make_mesh(make_config().mesh)
    spread = run(shard_batch(batch, mesh), ALL)
    order = np.array([5, 2, 7, 0, 1, 3, 6, 4])
    shuffled = run(jax.tree.map(lambda x: x[order], batch), ALL)
    for camera in full:  # to a thousandth of a grey level
        np.testing.assert_allclose(spread[camera], full[camera], rtol=0, atol=5e-6)
        np.testing.assert_allclose(shuffled[camera], full[camera][order], rtol=0, atol=5e-6)


def test_samples_cameras_and_seeds_draw_differently():
    batch = make_batch(rows=8)
    same = np.broadcast_to(batch.observation.images["primary"][0], (8, 3, 8, 8, 3)).copy()
    observed = dict.fromkeys(("primary", "wrist"), np.ones((8, 3), bool))
    observation = dataclasses.replace(
        batch.observation, images={"primary": same, "wrist": same}, image_mask=observed
    )
    batch = dataclasses.replace(batch, observation=observation)
    config = dataclasses.replace(OFF, brightness=0.2)
    images = run(batch, config)
    draws = [float(x[0].mean()) for camera in images.values() for x in camera]
    draws += [float(x[0].mean()) for x in run(batch, config, seed=4)["primary"]]
    assert len(set(draws)) == 24
    high = dataclasses.replace(batch, sample=batch.sample + np.array([1, 0], np.uint32))
    assert not np.array_equal(run(high, config)["primary"], images["primary"])


@pytest.mark.parametrize("per_frame", [False, True])
def test_shift_is_a_crop_of_the_replicate_padded_image(per_frame):
    rows, pad = 64, 2
    batch = make_batch(rows=rows)
    config = dataclasses.replace(OFF, shift={"wrist": pad}, per_frame=per_frame)
    images = run(batch, config)
    np.testing.assert_array_equal(images["primary"], run(batch, OFF)["primary"])
    before = run(batch, OFF)["wrist"]
    wide = np.pad(before, [(0, 0), (0, 0), (pad, pad), (pad, pad), (0, 0)], mode="edge")
    offsets = np.full((rows, 3, 2), -1)
    for row in range(rows):
        for frame in range(row % 2, 3):  # padding is black and fits every offset
            for y, x in np.ndindex(2 * pad + 1, 2 * pad + 1):
                if np.array_equal(images["wrist"][row, frame], wide[row, frame, y:, x:][:8, :8]):
                    offsets[row, frame] = y, x
    assert (offsets[::2] >= 0).all()
    assert set(np.unique(offsets[::2])) == set(range(2 * pad + 1))
    together = (offsets[::2] == offsets[::2, :1]).all()
    assert together != per_frame


def test_lanczos3_is_tensorflows_within_a_grey_level():
    tf = pytest.importorskip("tensorflow")
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (1, 64, 48, 3)).astype(np.uint8)
    edges = np.kron(rng.integers(0, 2, (1, 8, 6, 3)), np.ones((1, 8, 8, 1))).astype(np.uint8) * 255
    for images in (noise, edges):
        for size in ((56, 56), (24, 40), (100, 90)):
            reference = tf.image.resize(images, size, "lanczos3", antialias=True)
            reference = np.clip(np.round(reference.numpy()), 0, 255)
            ours = np.asarray(lanczos3(images, *size)).astype(int)
            assert np.abs(ours - reference).max() <= 1
            assert np.abs(ours - reference).mean() < 0.02  # of halves that round either way


def test_lanczos3_comes_before_what_the_backbone_does():
    batch = make_batch(size=12)
    config = dataclasses.replace(OFF, parity=AugmentParity(resize="lanczos3"))
    for images in (run(batch, config), run(batch, config, train=False)):
        for camera, x in images.items():
            small = lanczos3(batch.observation.images[camera], 8, 8)
            np.testing.assert_allclose(x, preprocess(small, Toy.image), rtol=0, atol=5e-7)
            plain = preprocess(jnp.asarray(batch.observation.images[camera]), Toy.image)
            assert not np.allclose(x, plain, atol=1e-3)


def test_a_random_crop_takes_the_place_of_the_center():
    batch, spec = make_batch(size=8), dataclasses.replace(Toy.image, zoom=0.5)
    cropped = dataclasses.replace(OFF, crop_scale=0.5)

    def images(config: AugmentConfig, train: bool, image: ImageSpec = spec) -> dict[str, Any]:
        run = functools.partial(module.augment, seed=3, config=config, spec=image, train=train)
        return jax.jit(run)(batch.observation, batch.sample).images

    unchanged = [images(*how) for how in ((OFF, True), (OFF, False), (cropped, False))]
    drawn, same = images(cropped, True), images(cropped, True, Toy.image)
    for camera, pixels in batch.observation.images.items():
        center = preprocess(jnp.asarray(pixels), spec)
        for result in unchanged:
            np.testing.assert_allclose(result[camera], center, atol=5e-7)
        np.testing.assert_allclose(drawn[camera], same[camera], atol=5e-7)


def test_crop_resize_is_bilinear_sampling_of_the_box():
    rng = np.random.default_rng(0)
    x, corner, side = rng.random((2, 8, 8, 3)).astype(np.float32), np.array([0.03, 0.05]), 0.9
    ours = module.crop_resize(jnp.asarray(x), jnp.asarray(corner, jnp.float32), side)
    position = [c * 7 + np.arange(8) * side for c in corner]
    low = [np.floor(p).astype(int) for p in position]
    high = [np.minimum(i + 1, 7) for i in low]
    ty, tx = (p - i for p, i in zip(position, low, strict=True))
    ty, tx = ty[:, None, None], tx[None, :, None]
    top = x[:, low[0]][:, :, low[1]] * (1 - tx) + x[:, low[0]][:, :, high[1]] * tx
    bottom = x[:, high[0]][:, :, low[1]] * (1 - tx) + x[:, high[0]][:, :, high[1]] * tx
    np.testing.assert_allclose(ours, top * (1 - ty) + bottom * ty, atol=1e-5)
    full = module.crop_resize(jnp.asarray(x), jnp.zeros(2), 1.0)
    np.testing.assert_allclose(full, x, atol=1e-6)


@pytest.mark.parametrize("factor", [0.0, 0.8, 1.2, 3.0])
def test_saturation_scales_in_hsv(factor):
    pixels = colours()
    expected = []
    for p in np.asarray(pixels).tolist():
        h, s, v = colorsys.rgb_to_hsv(*p)
        expected.append(colorsys.hsv_to_rgb(h, min(s * factor, 1.0), v))
    np.testing.assert_allclose(
        jax.jit(module.scale_saturation)(pixels, jnp.float32(factor)), expected, atol=2e-6
    )


@pytest.mark.parametrize("turn", [-0.3, -0.05, 0.0, 0.05, 0.7])
def test_hue_turns_in_hsv(turn):
    pixels = colours()
    expected = []
    for p in np.asarray(pixels).tolist():
        h, s, v = colorsys.rgb_to_hsv(*p)
        expected.append(colorsys.hsv_to_rgb((h + turn) % 1.0, s, v))
    turned = jax.jit(module.turn_hue)(pixels, jnp.float32(turn))
    np.testing.assert_allclose(turned, expected, atol=2e-6)


def colours() -> jax.Array:
    rng = np.random.default_rng(1)
    special = [[0, 0, 0], [1, 1, 1], [0.5, 0.5, 0.5], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]]
    return jnp.asarray(np.concatenate([rng.random((40, 3)), special]), jnp.float32)


def test_brightness_and_contrast_draw_within_their_ranges():
    batch = make_batch(rows=64)
    grey = np.full_like(batch.observation.images["primary"], 128)
    grey[..., :4, :] = 100
    observation = dataclasses.replace(
        batch.observation,
        images={"primary": grey},
        image_mask={"primary": np.ones(grey.shape[:2], bool)},
    )
    batch = dataclasses.replace(batch, observation=observation)
    bright = raw(run(batch, dataclasses.replace(OFF, brightness=0.2))["primary"])
    delta = bright[:, 0, 0, -1, 0] - 128 / 255
    np.testing.assert_allclose(bright[:, :, 0, -1] - 128 / 255 - delta[:, None, None], 0, atol=1e-6)
    assert np.abs(delta).max() <= 0.2
    assert delta.min() < -0.15
    assert delta.max() > 0.15
    contrast = raw(run(batch, dataclasses.replace(OFF, contrast=0.3))["primary"])
    factor = (contrast[:, 0, 0, -1, 0] - contrast[:, 0, 0, 0, 0]) / (28 / 255)
    np.testing.assert_allclose(contrast.mean((2, 3)), 114 / 255, atol=1e-5)
    assert 0.7 <= factor.min() < 0.8
    assert 1.2 < factor.max() <= 1.3


def test_values_stay_in_range_and_padding_stays_black():
    batch = make_batch(rows=16)
    extreme = dataclasses.replace(ALL, brightness=0.9, contrast=0.9, saturation=0.9, hue=0.5)
    observed = masks(batch, extreme)
    for camera, x in run(batch, extreme).items():
        pixels = raw(x)
        assert pixels.min() > -1e-5
        assert pixels.max() < 1 + 1e-5
        black = ~observed[camera]
        assert (black | batch.observation.image_mask[camera]).all()
        np.testing.assert_allclose(pixels[black], 0, atol=1e-6)
        assert (pixels[~black].max((-3, -2, -1)) > 0.1).mean() > 0.9
    existing = sum(int(mask.sum()) for mask in batch.observation.image_mask.values())
    assert sum(int(mask.sum()) for mask in observed.values()) < existing  # some are dropped


def alike(rows: int = 8) -> Batch:
    """Two cameras that see the same still picture all the time."""
    batch = make_batch(rows=rows)
    picture = batch.observation.images["primary"][0, -1]
    pixels = np.broadcast_to(picture, (rows, 3, 8, 8, 3)).copy()
    observation = dataclasses.replace(
        batch.observation,
        images=dict.fromkeys(("primary", "wrist"), pixels),
        image_mask=dict.fromkeys(("primary", "wrist"), np.ones((rows, 3), bool)),
    )
    return dataclasses.replace(batch, observation=observation)


JITTER = dataclasses.replace(ALL, shift={}, dropout=0.0, per_frame=False)


@pytest.mark.parametrize("share_cameras", [False, True])
@pytest.mark.parametrize("jitter_per_frame", [False, True])
def test_draws_are_shared_as_asked(share_cameras, jitter_per_frame):
    parity = AugmentParity(share_cameras=share_cameras, jitter_per_frame=jitter_per_frame)
    config = dataclasses.replace(JITTER, parity=parity)
    images = run(alike(), config)
    same_camera = [
        np.allclose(a, b, atol=1e-5)
        for a, b in zip(images["primary"], images["wrist"], strict=True)
    ]
    assert same_camera == [share_cameras] * 8
    same_time = [np.allclose(x[0], x[1], atol=1e-5) for x in images["primary"]]
    assert same_time == [not jitter_per_frame] * 8
    assert not np.allclose(images["primary"][0], images["primary"][1], atol=1e-3)


def test_the_first_frame_draws_alike_whether_others_follow_or_not():
    each = dataclasses.replace(JITTER, parity=AugmentParity(jitter_per_frame=True))
    for camera, x in run(alike(), each).items():
        np.testing.assert_allclose(x[:, 0], run(alike(), JITTER)[camera][:, 0], atol=2e-6)


def test_shared_draws_are_one_number_for_place_and_colours():
    """As dlimp's shared seed has it; the random shift keeps draws of its own."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.random((2, 16, 16, 3), np.float32))
    u = jnp.asarray(rng.random((2, 8), np.float32))
    shared = dataclasses.replace(ALL, parity=AugmentParity(draws="shared"))
    same = jnp.concatenate([jnp.repeat(u[:, :1], 6, axis=1), u[:, 6:]], axis=1)
    result = module._window(u, x, shared, 2)
    np.testing.assert_array_equal(result, module._window(same, x, ALL, 2))
    assert not np.array_equal(result, module._window(u, x, ALL, 2))


@pytest.mark.parametrize("jitter_per_frame", [False, True])
def test_dropout_leaves_a_view(jitter_per_frame):
    batch = alike(256)
    parity = AugmentParity(jitter_per_frame=jitter_per_frame)
    config = dataclasses.replace(OFF, dropout=0.4, parity=parity)
    observed, plain = masks(batch, config), run(batch, OFF)
    images = run(batch, config)
    stacked = np.stack([observed["primary"], observed["wrist"]])
    assert stacked.any(0).all()
    # One of two is safe, the other goes in 40 %: each camera in 20 % of the rows.
    for camera, mask in observed.items():
        assert abs((~mask).mean() - 0.2) < 0.08
        np.testing.assert_array_equal(images[camera][mask], plain[camera][mask])
        np.testing.assert_allclose(raw(images[camera])[~mask], 0, atol=1e-6)
    together = (stacked == stacked[:, :, :1]).all()
    assert together != jitter_per_frame


def test_a_view_that_is_missing_is_not_the_one_that_stays():
    batch = alike(64)
    missing = np.ones((64, 3), bool)
    missing[::2] = False
    mask = {"primary": missing, "wrist": np.ones((64, 3), bool)}
    observation = dataclasses.replace(batch.observation, image_mask=mask)
    config = dataclasses.replace(OFF, dropout=0.9)
    observed = masks(dataclasses.replace(batch, observation=observation), config)
    assert observed["wrist"][::2].all()
    assert not observed["primary"][::2].any()
    assert (~observed["wrist"][1::2]).any()
