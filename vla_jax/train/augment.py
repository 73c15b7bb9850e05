"""Random changes of the images, on the device, drawn from each sample's own number.

Legend: b batch · w window · h, x camera's height and width · s, r the model's

The draws of a sample depend on the seed, the sample number and the camera, and on nothing else:
the same pixels come after a restart, on another mesh and in a batch of another size. One draw
serves all frames of a window unless the config asks for one a frame, and every camera has its own
unless they share.

The order and the definitions are the reference pipelines': crop, brightness, contrast,
saturation and hue of octo and openvla (dlimp's augmentations, values clipped to [0, 1] after each
but the crop, which cannot leave it), then the random shift of RoboVLMs' CALVIN loader.
"""

import functools
from collections.abc import Iterable, Mapping
from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key, PRNGKeyArray, UInt32

from vla_jax.cameras import CAMERAS
from vla_jax.config import AugmentConfig
from vla_jax.models.image import ImageSpec, fit, normalize, preprocess
from vla_jax.models.tensorflow_image import crop_resize, lanczos3
from vla_jax.types import Observation

# Every frame draws one row of uniform numbers, whatever is on: crop top, crop left, brightness,
# contrast, saturation, hue, shift of rows and of columns. So switching one change on moves no
# other's draw, and a hash function is compiled once a camera, not once a change.
_CROP, _BRIGHTNESS, _CONTRAST, _SATURATION, _HUE, _SHIFT, _COUNT = 0, 2, 3, 4, 5, 6, 8


def augment(
    observation: Observation,
    sample: UInt32[Array, "b 2"],
    seed: int,
    config: AugmentConfig,
    spec: ImageSpec,
    train: bool,
) -> Observation:
    """Resize to the model's size, change at random when training, normalize.

    Args:
        observation: with uint8 images [b, w, h, x, 3].
        sample: sample numbers as (high, low) words.
        seed: of the run.
        config: which changes and how strong; what is off costs nothing.
        spec: of the backbone.
        train: False leaves only `preprocess`, behind `config.parity.resize`.

    Returns:
        The observation with float32 images [b, w, s, r, 3]. Frames that `image_mask` calls
        padding are black before normalization, and so are views that are dropped; of these
        `image_mask` is False.
    """
    mask, cameras = dict(observation.image_mask), list(observation.images)
    dropped, draws = train and config.dropout > 0, {}
    changed = [c for c in cameras if train and (config.shift.get(c) or _changes(config))]
    if dropped or changed:
        keys = _keys(sample, seed)
        w = observation.images[cameras[0]].shape[1]
        if dropped:
            # This stream lies behind the cameras' own numbers, so that no other draw moves.
            mask = drop_views(mask, _draw(keys, list(mask), len(CAMERAS), w, 2), config)
        # Cameras that share a draw all go by number 0.
        drawing = {c: 0 for c in changed} if config.parity.share_cameras else changed
        draws = _draw(keys, drawing, 0, w, _COUNT)
    images = {}
    for camera, pixels in observation.images.items():
        if config.parity.resize == "lanczos3":
            pixels = lanczos3(pixels, *spec.shape_for(*pixels.shape[-3:-1]))
        if not dropped and camera not in draws:
            # Unchanged cameras go the way that evaluation and serving go.
            images[camera] = preprocess(pixels, spec)
            continue
        # A random crop takes the place of the center's, which evaluation and serving see.
        cropped = camera in draws and config.crop_scale != 1.0
        # The strengths in the config are for pixels in [0, 1].
        x = fit(pixels, replace(spec, zoom=1.0) if cropped else spec).astype(jnp.float32) / 255.0
        if camera in draws:
            shift = config.shift.get(camera, 0)
            x = jax.vmap(lambda u, x, p=shift: _window(u, x, config, p))(draws[camera], x)
        if dropped or config.brightness:  # the only change that lights up a black frame
            x = jnp.where(mask[camera][..., None, None, None], x, 0.0)
        images[camera] = normalize(x, spec)
    return replace(observation, images=images, image_mask=mask)


def drop_views(
    mask: dict[str, Bool[Array, "b w"]],
    draws: dict[str, Float[Array, "b w 2"]],
    config: AugmentConfig,
) -> dict[str, Bool[Array, "b w"]]:
    """`image_mask` without the views that are dropped; of those there are, one always stays.

    Args:
        mask: camera -> which frames exist.
        draws: camera -> uniform numbers: whether it is dropped, and which one stays.
        config: `dropout` and `parity.jitter_per_frame`.
    """
    stacked, u = jnp.stack(list(mask.values())), jnp.stack([draws[c] for c in mask])
    exist = stacked
    if not config.parity.jitter_per_frame:
        # One draw a window: a view is dropped in all its frames or in none.
        u = jnp.broadcast_to(u[:, :, :1], u.shape)
        exist = jnp.broadcast_to(stacked.any(-1, keepdims=True), stacked.shape)
    # The existing view with the largest draw stays, so that no frame is left blind.
    stays = jnp.where(exist, u[..., 1], -1.0)
    stays = stays == stays.max(0)
    stacked = stacked & (stays | (u[..., 0] >= config.dropout))
    return dict(zip(mask, stacked, strict=True))


def _changes(config: AugmentConfig) -> bool:
    colors = (config.brightness, config.contrast, config.saturation, config.hue)
    return any(colors) or config.crop_scale != 1.0


def _keys(sample: UInt32[Array, "b 2"], seed: int) -> Key[Array, "b"]:
    """One key a sample."""

    def key(number: UInt32[Array, "2"]) -> PRNGKeyArray:
        # Two words, because fold_in takes 32 bits and sample numbers have 64.
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), number[0]), number[1])

    return jax.vmap(key)(sample)


def _draw(
    keys: Key[Array, "b"], cameras: Iterable[str], stream: int, w: int, count: int
) -> dict[str, Float[Array, "b w n"]]:
    """Uniform numbers in [0, 1) for every sample, camera and frame.

    Args:
        keys: of the samples.
        cameras: each draws by its number in `CAMERAS`; of a mapping, by the number given there.
        stream: added to these numbers.
        w: frames.
        count: n.
    """

    def draw(key: PRNGKeyArray, number: int) -> Float[Array, "w n"]:
        return jax.random.uniform(jax.random.fold_in(key, number), (w, count))

    numbers = cameras if isinstance(cameras, Mapping) else {c: CAMERAS.index(c) for c in cameras}
    # Cameras of one number share the draw, and it is made once.
    drawn = {n: jax.vmap(draw, (0, None))(keys, n) for n in {stream + n for n in numbers.values()}}
    return {camera: drawn[stream + n] for camera, n in numbers.items()}


def _window(
    u: Float[Array, "w n"], x: Float[Array, "w s r 3"], config: AugmentConfig, shift: int
) -> Float[Array, "w s r 3"]:
    """All changes of one window of one camera, from its draws; pixels in [0, 1]."""
    # Shared draws turn all changes by one number, as if each had been seeded alike.
    rows = jnp.broadcast_to(u[:, :1], u.shape) if config.parity.draws == "shared" else u
    if config.parity.jitter_per_frame:
        x = jax.vmap(lambda v, frame: _jitter(v, frame[None], config)[0])(rows, x)
    else:
        x = _jitter(rows[0], x, config)
    if shift:
        # The floor of [0, 2 s + 1) makes each of -s .. s equally likely.
        offsets = jnp.floor(u[:, _SHIFT:] * (2 * shift + 1)).astype(jnp.int32) - shift
        if not config.per_frame:
            offsets = jnp.broadcast_to(offsets[:1], offsets.shape)
        x = jax.vmap(functools.partial(move, reach=shift))(x, offsets)
    return x


def _jitter(
    u: Float[Array, "n"], x: Float[Array, "w s r 3"], config: AugmentConfig
) -> Float[Array, "w s r 3"]:
    """Crop and colors, the same for all frames."""

    def around(i: int, center: float, reach: float) -> Array:
        return center + reach * (2.0 * u[i] - 1.0)

    if config.crop_scale != 1.0:
        # The scale is a share of the area.
        side = config.crop_scale**0.5
        x = crop_resize(x, (1.0 - side) * u[_CROP : _CROP + 2], side)
    if config.brightness:
        x = jnp.clip(x + around(_BRIGHTNESS, 0.0, config.brightness), 0.0, 1.0)
    if config.contrast:
        # As in tf.image.adjust_contrast: about the mean of each frame and channel.
        mean = x.mean((-3, -2), keepdims=True)
        x = jnp.clip((x - mean) * around(_CONTRAST, 1.0, config.contrast) + mean, 0.0, 1.0)
    if config.saturation:
        x = scale_saturation(x, around(_SATURATION, 1.0, config.saturation))
    if config.hue:
        x = turn_hue(x, around(_HUE, 0.0, config.hue))
    return x


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
    # A gray pixel has no hue: chroma 0 below leaves it as it is, whatever the divisor.
    safe = jnp.where(chroma > 0, chroma, 1.0)
    # Not `value == red`: a compiler may round the two apart, and a step in hue follows. Where
    # two channels are equally high, both formulas give the same.
    sixth = jnp.where(
        (red >= green) & (red >= blue),
        (green - blue) / safe,
        jnp.where(green >= blue, 2.0 + (blue - red) / safe, 4.0 + (red - green) / safe),
    )
    # Smith (1978): the channel at n in (5, 3, 1) is v - chroma * clip(min(k, 4 - k), 0, 1).
    k = (jnp.asarray((5.0, 3.0, 1.0)) + sixth[..., None] + 6.0 * turn) % 6.0
    return value[..., None] - chroma[..., None] * jnp.clip(jnp.minimum(k, 4.0 - k), 0.0, 1.0)


def move(x: Float[Array, "s r 3"], offset: Array, reach: int) -> Float[Array, "s r 3"]:
    """The image moved by whole pixels; edges repeat, which is a crop of a replicate-padded image.

    Args:
        x: pixels.
        offset: int32 [2], rows and columns; pixel (i, j) is taken from (i, j) + offset.
        reach: the largest offset to either side.
    """
    # One slice an image: picked by row and by column it would be millions of three numbers each.
    wide = jnp.pad(x, ((reach, reach), (reach, reach), (0, 0)), mode="edge")
    return jax.lax.dynamic_slice(wide, (offset[0] + reach, offset[1] + reach, 0), x.shape)
