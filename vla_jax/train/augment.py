"""Random changes of the images, on the device, drawn from each sample's own number.

Legend: b batch · w window · h, x camera's height and width · s, r the model's

The draws of a sample depend on the seed, the sample number and the camera, and on nothing else:
the same pixels come after a restart, on another mesh and in a batch of another size. One draw
serves all frames of a window, except the shift's where `per_frame` is set.

The order and the definitions are the reference pipelines': crop, brightness, contrast,
saturation and hue of octo and openvla (dlimp's augmentations, values clipped to [0, 1] after each
but the crop, which cannot leave it), then the random shift of RoboVLMs' CALVIN loader.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, UInt8, UInt32

from vla_jax.config import AugmentConfig
from vla_jax.models.image import ImageSpec, fit, normalize, preprocess
from vla_jax.types import CAMERAS, Observation

# Every window draws one row of uniform numbers, whatever is on: [crop top, crop left, brightness,
# contrast, saturation, hue, then (rows, columns) of the shift for each frame]. So switching one
# change on moves no other's draw, and a hash function is compiled once a camera, not once a change.
_CROP, _BRIGHTNESS, _CONTRAST, _SATURATION, _HUE, _SHIFT = 0, 2, 3, 4, 5, 6


def augment(
    observation: Observation,
    sample: UInt32[Array, "b 2"],
    seed: int,
    config: AugmentConfig,
    spec: ImageSpec,
    train: bool,
) -> Observation:
    """Resize to the model's size, change at random when training, normalise.

    Args:
        observation: with uint8 images [b, w, h, x, 3].
        sample: sample numbers as (high, low) words.
        seed: of the run.
        config: which changes and how strong; what is off costs nothing.
        spec: of the backbone.
        train: False leaves only `preprocess`.

    Returns:
        The observation with float32 images [b, w, s, r, 3]. Frames that `image_mask` calls
        padding are black before normalisation.
    """
    images = {}
    draws = {}
    if train and (config.shift or _colour(config) or config.crop_scale != 1.0):
        draws = _draw(observation.images, sample, seed)
    for camera, pixels in observation.images.items():
        shift = config.shift.get(camera, 0)
        if camera not in draws or not (shift or _colour(config) or config.crop_scale != 1.0):
            images[camera] = preprocess(pixels, spec)
            continue
        small = fit(pixels, spec).astype(jnp.float32) / 255.0
        changed = jax.vmap(lambda u, x, p=shift: _window(u, x, config, p))(draws[camera], small)
        if config.brightness:  # the only change that lights up a black frame
            mask = observation.image_mask[camera][..., None, None, None]
            changed = jnp.where(mask, changed, 0.0)
        images[camera] = normalize(changed, spec)
    return replace(observation, images=images)


def _colour(config: AugmentConfig) -> bool:
    return any((config.brightness, config.contrast, config.saturation, config.hue))


def _draw(
    images: dict[str, UInt8[Array, "b w h x 3"]], sample: UInt32[Array, "b 2"], seed: int
) -> dict[str, Float[Array, "b n"]]:
    """Uniform numbers in [0, 1) for every sample and camera."""

    def sample_key(number: UInt32[Array, "2"]) -> PRNGKeyArray:
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), number[0]), number[1])

    def draw(key: PRNGKeyArray, camera: int, count: int) -> Float[Array, "n"]:
        return jax.random.uniform(jax.random.fold_in(key, camera), (count,))

    keys = jax.vmap(sample_key)(sample)
    return {
        camera: jax.vmap(draw, (0, None, None))(keys, CAMERAS.index(camera), count)
        for camera, x in images.items()
        for count in [_SHIFT + 2 * x.shape[1]]
    }


def _window(
    u: Float[Array, "n"], x: Float[Array, "w s r 3"], config: AugmentConfig, shift: int
) -> Float[Array, "w s r 3"]:
    """All changes of one window of one camera, from its draws; pixels in [0, 1]."""
    if config.draws == "shared":
        u = u.at[:_SHIFT].set(u[0])

    def around(i: int, centre: float, reach: float) -> Array:
        return centre + reach * (2.0 * u[i] - 1.0)

    if config.crop_scale != 1.0:
        side = config.crop_scale**0.5
        x = crop_resize(x, (1.0 - side) * u[_CROP : _CROP + 2], side)
    if config.brightness:
        x = jnp.clip(x + around(_BRIGHTNESS, 0.0, config.brightness), 0.0, 1.0)
    if config.contrast:
        mean = x.mean((-3, -2), keepdims=True)
        x = jnp.clip((x - mean) * around(_CONTRAST, 1.0, config.contrast) + mean, 0.0, 1.0)
    if config.saturation:
        x = scale_saturation(x, around(_SATURATION, 1.0, config.saturation))
    if config.hue:
        x = turn_hue(x, around(_HUE, 0.0, config.hue))
    if shift:
        offsets = jnp.floor(u[_SHIFT:].reshape(-1, 2) * (2 * shift + 1)).astype(jnp.int32) - shift
        if not config.per_frame:
            offsets = jnp.broadcast_to(offsets[:1], offsets.shape)
        x = jax.vmap(move)(x, offsets)
    return x


def crop_resize(
    x: Float[Array, "w s r 3"], corner: Float[Array, "2"], side: float
) -> Float[Array, "w s r 3"]:
    """Bilinear enlargement of a crop of the same shape, as `tf.image.crop_and_resize`.

    Args:
        x: pixels.
        corner: top and left of the crop, as shares of the image.
        side: of the crop, as a share of the image's.
    """

    def matrix(start: Array, size: int) -> Array:
        grid = jnp.arange(size, dtype=jnp.float32)
        position = (start * (size - 1) + grid * side)[:, None]
        return jnp.maximum(0.0, 1.0 - jnp.abs(position - grid[None]))

    exact, (rows, columns) = jax.lax.Precision.HIGHEST, x.shape[1:3]
    x = jnp.einsum("wijc,yi->wyjc", x, matrix(corner[0], rows), precision=exact)
    return jnp.einsum("wyjc,xj->wyxc", x, matrix(corner[1], columns), precision=exact)


def scale_saturation(x: Float[Array, "*lead 3"], factor: Array) -> Float[Array, "*lead 3"]:
    """HSV saturation times `factor`, clipped to [0, 1]; hue and value stay.

    In HSV each channel is v * (1 - s * k) with k set by the hue alone, so scaling s scales each
    channel's distance to v.
    """
    value = x.max(-1, keepdims=True)
    chroma = value - x.min(-1, keepdims=True)
    limit = value / jnp.where(chroma > 0, chroma, 1.0)  # the factor at which saturation is 1
    factor = jnp.where(chroma > 0, jnp.minimum(factor, limit), 1.0)
    return jnp.clip(value - (value - x) * factor, 0.0, 1.0)


def turn_hue(x: Float[Array, "*lead 3"], turn: Array) -> Float[Array, "*lead 3"]:
    """HSV hue plus `turn` (1 = once around); saturation and value stay."""
    red, green, blue = x[..., 0], x[..., 1], x[..., 2]
    value, low = x.max(-1), x.min(-1)
    chroma = value - low
    safe = jnp.where(chroma > 0, chroma, 1.0)
    sixth = jnp.where(
        value == red,
        (green - blue) / safe,
        jnp.where(value == green, 2.0 + (blue - red) / safe, 4.0 + (red - green) / safe),
    )
    # Smith (1978): the channel at n in (5, 3, 1) is v - chroma * clip(min(k, 4 - k), 0, 1).
    k = (jnp.asarray((5.0, 3.0, 1.0)) + sixth[..., None] + 6.0 * turn) % 6.0
    return value[..., None] - chroma[..., None] * jnp.clip(jnp.minimum(k, 4.0 - k), 0.0, 1.0)


def move(x: Float[Array, "s r 3"], offset: Array) -> Float[Array, "s r 3"]:
    """The image moved by whole pixels; edges repeat, which is a crop of a replicate-padded image.

    Args:
        x: pixels.
        offset: int32 [2], rows and columns; pixel (i, j) is taken from (i, j) + offset.
    """
    rows, columns = (
        jnp.clip(jnp.arange(size) + offset[i], 0, size - 1) for i, size in enumerate(x.shape[:2])
    )
    return x[rows][:, columns]
