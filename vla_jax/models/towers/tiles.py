"""Images larger than the vision tower: a shrunk overview and the tiles, side by side.

Legend: b batch · h, x image height and width · n tokens of one tile · d width

Source: vikhyat/moondream at 22565c0, moondream/hf/vision_encoder.py. All sizes are whole multiples
of the tower's, so the original's bilinear and adaptive-average resizes are means of whole blocks.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from vla_jax.models.towers.vit import VisionSpec


def two_streams(
    encode: Callable[[Float[Array, "m s s 3"]], Float[Array, "m n d"]],
    images: Float[Array, "b h x 3"],
    spec: VisionSpec,
) -> Float[Array, "b n _"]:
    """Features of the overview beside the mean features of the tiles at the same place.

    Args:
        encode: the tower.
        images: normalized, a whole number of tiles high and wide. One tile is its own overview.
        spec: of the tower.

    Raises:
        ValueError: for other sizes.
    """
    (height, width), (h, x), batch = spec.image, images.shape[1:3], len(images)
    rows, columns = h // height, x // width
    if (rows * height, columns * width) != (h, x) or not rows * columns:
        raise ValueError(f"images of {h} x {x} pixels are not made of tiles {height} x {width}")
    if rows == columns == 1:
        features = encode(images)
        return jnp.concatenate([features, features], axis=-1)
    overview = _block_mean(images, rows, columns)
    # Row by row, as the tiles are put together again below.
    cut = images.reshape(batch, rows, height, columns, width, 3).swapaxes(2, 3)
    cut = cut.reshape(batch, rows * columns, height, width, 3)
    # Overview and tiles of an image stay together: split over devices, no image has to move.
    views = jnp.concatenate([overview[:, None], cut], axis=1)
    features = encode(views.reshape(-1, height, width, 3))
    features = features.reshape(batch, 1 + rows * columns, *features.shape[1:])
    of_tiles = features[:, 1:].reshape(batch, rows, columns, *spec.grid, -1).swapaxes(2, 3)
    of_tiles = of_tiles.reshape(batch, rows * spec.grid[0], columns * spec.grid[1], -1)
    # Back to the size of one tile, so that both streams have the same number of tokens.
    of_tiles = _block_mean(of_tiles, rows, columns).reshape(batch, *features.shape[2:])
    return jnp.concatenate([features[:, 0], of_tiles], axis=-1)


def _block_mean(x: Float[Array, "b h x d"], rows: int, columns: int) -> Array:
    b, h, width, d = x.shape
    x = x.reshape(b, h // rows, rows, width // columns, columns, d)
    return x.mean(axis=(2, 4))
