"""Where a token stands: tables over a grid, rotations by row and column, windows, buckets.

Legend: n patches of a grid, row by row · m of a stored table · d width · k image tokens

What depends on static shapes alone is made in numpy.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

Grid = tuple[int, int]  # rows, columns


def _keys(distance: Float[np.ndarray, "*n"], a: float = -0.75) -> Float[np.ndarray, "*n"]:
    """Keys' cubic convolution kernel with torch's sharpness (Pillow's and jax's is -0.5)."""
    near = ((a + 2.0) * distance - (a + 3.0)) * distance**2 + 1.0
    far = ((a * distance - 5.0 * a) * distance + 8.0 * a) * distance - 4.0 * a
    return np.where(distance <= 1.0, near, np.where(distance < 2.0, far, 0.0))


# How a stored table becomes one of another shape: kind -> (kernel, its reach, ends meet ends).
# Neither widens its filter when shrinking, as torch's interpolate does not by default.
INTERPOLATIONS = {
    "bicubic": (_keys, 2, False),
    "bilinear_corners": (lambda distance: np.maximum(0.0, 1.0 - distance), 1, True),
}


def interpolation(source: int, target: int, kind: str) -> Float[np.ndarray, "target source"]:
    """The matrix that resamples one axis; edges repeat.

    Args:
        source: length of the axis.
        target: its length afterwards.
        kind: a key of `INTERPOLATIONS`.
    """
    kernel, reach, corners = INTERPOLATIONS[kind]
    index = np.arange(target, dtype=np.float64)
    if corners:
        # The first and last entries of both axes coincide ("align_corners").
        position = index * (source - 1) / max(target - 1, 1)
    else:
        # Entries are the centers of cells, as in torch without "align_corners".
        position = (index + 0.5) * source / target - 0.5
    matrix = np.zeros((target, source))
    for offset in range(1 - reach, reach + 1):
        tap = np.floor(position) + offset
        column = np.clip(tap, 0, source - 1).astype(int)
        # Clipped taps fall on the same edge column, so their weights must add up.
        np.add.at(matrix, (np.arange(target), column), kernel(np.abs(position - tap)))
    return matrix.astype(np.float32)


def resample(table: Float[Array, "m d"], source: Grid, target: Grid, kind: str) -> Array:
    """A table over one grid as a table [n, d] over another; the same array where they agree."""
    if source == target:
        return table
    rows, columns = (interpolation(a, b, kind) for a, b in zip(source, target, strict=True))
    grid = table.reshape(*source, -1).astype(jnp.float32)
    # TPUs would multiply in bfloat16 by default, and a table loses its fine structure.
    grid = jnp.einsum("ys,xr,srd->yxd", rows, columns, grid, precision="highest")
    return grid.reshape(target[0] * target[1], -1).astype(table.dtype)


def coordinates(grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of every patch."""
    rows, columns = np.indices(grid)
    return rows.reshape(-1), columns.reshape(-1)


def sincos(grid: Grid, width: int) -> Float[np.ndarray, "n d"]:
    """MAE's table: sines and cosines of the column, then of the row, a quarter of `width` each.

    Raises:
        ValueError: if `width` is not a multiple of four.
    """
    if width % 4:
        raise ValueError(f"positions by sine and cosine need a multiple of 4 channels, not {width}")
    frequency = 10000.0 ** -(np.arange(width // 4) / (width / 4))
    rows, columns = coordinates(grid)
    waves = []
    for axis in (columns, rows):
        angle = axis[:, None] * frequency
        waves += [np.sin(angle), np.cos(angle)]
    return np.concatenate(waves, axis=1).astype(np.float32)


def rotation(grid: Grid, head_width: int, theta: float) -> Float[np.ndarray, "n half"]:
    """Angles of the two-dimensional rotary embedding: of the row, then of the column.

    Channel i is turned with channel i + head_width / 2, by angle i.

    Raises:
        ValueError: if a head's width is not a multiple of four.
    """
    if head_width % 4:
        raise ValueError(f"rotation by row and column needs heads of 4 k channels: {head_width}")
    frequency = theta ** -(np.arange(0, head_width // 2, 2) / (head_width / 2))
    rows, columns = coordinates(grid)
    angles = [axis[:, None] * frequency for axis in (rows, columns)]
    return np.concatenate(angles, axis=1).astype(np.float32)


def to_windows(x: Float[Array, "b n d"], grid: Grid, side: int) -> Float[Array, "_ _ d"]:
    """Tokens of a grid -> [b * windows, side^2, d], window by window; they must fill the grid."""
    b, _, d = x.shape
    x = x.reshape(b, grid[0] // side, side, grid[1] // side, side, d).swapaxes(2, 3)
    return x.reshape(-1, side * side, d)


def from_windows(x: Float[Array, "m k d"], grid: Grid, side: int) -> Float[Array, "_ _ d"]:
    """Inverse of `to_windows`."""
    x = x.reshape(-1, grid[0] // side, grid[1] // side, side, side, x.shape[-1]).swapaxes(2, 3)
    return x.reshape(len(x), grid[0] * grid[1], x.shape[-1])


def window_mask(grid: Grid, side: int) -> Bool[np.ndarray, "n n"]:
    """True between patches of the same square window; windows at the far edges may be smaller."""
    rows, columns = coordinates(grid)
    # A row of windows has fewer of them than the grid has columns, so numbers are unique.
    window = rows // side * grid[1] + columns // side
    return window[:, None] == window[None]


# Distances between tokens that OFA tells apart end here: its longest text.
FARTHEST = 1023


def token_buckets(count: int) -> Int[np.ndarray, " m"]:
    """OFA's buckets of the distances -FARTHEST .. FARTHEST (query less key), from 0.

    Distances up to count / 2 have one each, farther ones share them by their logarithm. Made in
    float32, as the original, whose rounding up decides at the borders.

    Args:
        count: buckets of one sign, the distance 0 included; 2 count - 1 in all.
    """
    distance, middle = np.arange(-FARTHEST, FARTHEST + 1), count // 2
    # Distance 0 has no logarithm; it has a bucket of its own.
    size = np.maximum(np.abs(distance), 1).astype(np.float32)
    fraction = np.log(size / np.float32(middle)) / np.float32(np.log(FARTHEST / middle))
    far = np.ceil(fraction * np.float32(middle - 1)).astype(int) + middle
    # Rounding may take the farthest distances one bucket too far.
    far = np.sign(distance) * np.minimum(far, count - 1)
    return (np.where(np.abs(distance) <= middle, distance, far) + count - 1).astype(np.int32)


def image_buckets(place: Int[Array, " k"], side: int, count: int) -> Int[Array, "k k"]:
    """OFA's buckets of where one image token stands from another.

    Tokens of one image have theirs by rows and columns apart (query less key). The three last
    buckets the original's encoder never uses. Here they tell cameras apart, which OFA, whose images
    all stand at the same places, could not: the key is in a later image, or in an earlier one, or
    neither token has a place.

    Args:
        place: which of its image's tokens, row by row, each is; -1 if it has no place.
        side: rows and columns of an image.
        count: of rows and columns the table is made for.
    """
    # A token at place 0 begins a new image, so the running count numbers the images.
    span, order, image = 2 * count - 1, jnp.arange(len(place)), jnp.cumsum(place == 0)
    rows, columns, image = (x[:, None] - x for x in (place // side, place % side, image))
    has_place = place >= 0
    # Differences run from -(count - 1) to count - 1; shifted, they index a square table.
    within = (rows + count - 1) * span + columns + count - 1
    # The three rows behind the square table.
    across = span * span + jnp.where(order[:, None] < order, 0, 1)
    across = jnp.where(has_place[:, None] | has_place, across, span * span + 2)
    return jnp.where((image == 0) & has_place[:, None] & has_place, within, across)


def sinusoid(positions: Int[Array, "*b n"], width: int, pad: int) -> Float[Array, "*b n d"]:
    """Fairseq's sinusoidal positions: sines then cosines; the row of `pad` is zero."""
    half = width // 2  # fairseq divides by half - 1, so that the last frequency is 1 / 10000
    frequency = jnp.exp(jnp.arange(half) * -(math.log(10000.0) / (half - 1)))
    angle = positions[..., None].astype(jnp.float32) * frequency
    table = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
    return jnp.where((positions == pad)[..., None], 0.0, table)


def alibi_slopes(heads: int, largest: float) -> tuple[float, ...]:
    """MPT's slopes: powers of two down to 2^-largest, odd ones first where heads is no power."""
    power = 2 ** math.ceil(math.log2(heads))
    slopes = [2.0 ** (-largest * (i + 1) / power) for i in range(power)]
    if power != heads:
        slopes = (slopes[1::2] + slopes[::2])[:heads]
    return tuple(slopes)
