"""Vision transformer, driven by a Hugging Face `vision_config`."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vla_jax.models import layers
from vla_jax.models.block import stack


def _grid_positions(key: Array, shape: tuple[int, int]) -> Float[Array, "n d"]:
    """Starting values of learned positions: sines and cosines of row and column, class token zero.

    Of unit size, like the patches: from the usual 0.02 a model trained from scratch takes hundreds
    of steps to find out where things are.
    """
    side, quarter = round((shape[0] - 1) ** 0.5), -(-shape[1] // 4)
    frequency = 10.0 ** -jnp.linspace(0.0, 2.0, quarter)  # radians a patch
    angle = jnp.arange(side)[:, None] * frequency
    waves = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=1)
    rows = jnp.broadcast_to(waves[:, None], (side, side, 2 * quarter))
    grid = jnp.concatenate([rows, rows.swapaxes(0, 1)], axis=-1).reshape(side * side, -1)
    return jnp.pad(grid[:, : shape[1]], ((1, 0), (0, 0)))


class VisionTransformer(nn.Module):
    """CLIP's image tower up to the last block, class token first.

    Legend: b batch · h height = width · n tokens = 1 + (h / patch)^2 · d width

    Attributes:
        config: `vision_config` of the VLM: hidden_size, num_hidden_layers, num_attention_heads,
            intermediate_size, patch_size, image_size, hidden_act, layer_norm_eps,
            attention_dropout.
        remat: see `block.remat`.
        dtype: of the activations.
    """

    config: Any
    remat: str = "full"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "b h h 3"]) -> Float[Array, "b n d"]:
        """Normalised images -> tokens after the last block, before the final norm."""
        c = self.config
        width, patch, side = c["hidden_size"], c["patch_size"], c["image_size"] // c["patch_size"]
        batch = images.shape[0]
        # Patch convolution as reshape + matmul: the strided convolution is 1.4x torch's time on a
        # CPU, the matmul 1.03x, and XLA's sharding handles it better.
        x = images.reshape(batch, side, patch, side, patch, 3).transpose(0, 1, 3, 2, 4, 5)
        x = x.reshape(batch, side * side, patch * patch * 3)
        x = layers.Dense((width,), use_bias=False, dtype=self.dtype, name="patch")(x)
        normal = nn.initializers.normal(0.02)
        class_token = self.param("class_token", normal, (width,)).astype(self.dtype)
        positions = self.param("positions", _grid_positions, (1 + side * side, width))
        positions = positions.astype(self.dtype)
        class_token = jnp.broadcast_to(class_token, (batch, 1, width))
        x = jnp.concatenate([class_token, x], axis=1) + positions
        x = layers.LayerNorm(c["layer_norm_eps"], self.dtype, name="pre_norm")(x)
        x, _ = stack(
            c["num_hidden_layers"],
            self.remat,
            "layers",
            heads=c["num_attention_heads"],
            hidden=c["intermediate_size"],
            activation=c["hidden_act"],
            attention_dropout=c["attention_dropout"],
            eps=c["layer_norm_eps"],
            dtype=self.dtype,
        )(x, None)
        return x
