"""Images as TensorFlow resizes and crops them, which octo, OpenVLA and OpenVLA-OFT trained on.

Legend: h, x image height and width · height, width of the result · w frames · s, r rows and columns
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8


def lanczos3(images: UInt8[Array, "*lead h x 3"], height: int, width: int) -> UInt8[Array, "..."]:
    """`tf.image.resize(images, (height, width), "lanczos3", antialias=True)`, rounded and clipped.

    Equal to within one gray level; Pillow's (`vla_jax.models.image.resize`) clips between its two
    passes and differs by up to 33 where edges are sharp. The aspect ratio is not kept.
    """
    if images.shape[-3:-1] == (height, width):
        return images
    shape = (*images.shape[:-3], height, width, 3)
    x = jax.image.resize(images.astype(jnp.float32), shape, "lanczos3", antialias=True)
    return jnp.clip(jnp.round(x), 0, 255).astype(jnp.uint8)


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
        # Bilinear weights as a matrix, since gathers are slow on accelerators.
        grid = jnp.arange(size, dtype=jnp.float32)
        position = (start * (size - 1) + grid * side)[:, None]
        return jnp.maximum(0.0, 1.0 - jnp.abs(position - grid[None]))

    # The default precision on a TPU is bfloat16, which is too coarse for pixels.
    exact, (rows, columns) = jax.lax.Precision.HIGHEST, x.shape[1:3]
    x = jnp.einsum("wijc,yi->wyjc", x, matrix(corner[0], rows), precision=exact)
    return jnp.einsum("wyjc,xj->wyxc", x, matrix(corner[1], columns), precision=exact)


def zoom(images: UInt8[Array, "*lead h x 3"], area: float) -> UInt8[Array, "*lead h x 3"]:
    """The center of an image, enlarged to the image's size, as OpenVLA acts by.

    Weights that were trained on random crops of this share of the area see the crop in the middle.

    Args:
        images: pixels.
        area: share that is kept; 1 = all, without a change.
    """
    if area == 1.0:
        return images
    side = area**0.5
    corner = jnp.full(2, (1.0 - side) / 2, jnp.float32)
    x = images.reshape(-1, *images.shape[-3:]).astype(jnp.float32) / 255.0
    x = jnp.clip(crop_resize(x, corner, side), 0.0, 1.0)
    # `tf.image.convert_image_dtype` cuts behind this factor, so that 1 is 255.
    return jnp.minimum(x * 255.5, 255.0).astype(jnp.uint8).reshape(images.shape)
