"""The robot's state as a token of the VLM."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vla_jax.models.towers.layers import ACTIVATIONS, Dense


class StateToken(nn.Module):
    """Two linear layers.

    Legend: b batch · w window · p proprio dimension · d width
    """

    width: int
    dtype: Any = jnp.float32
    activation: str = "gelu_pytorch_tanh"

    @nn.compact
    def __call__(self, proprio: Float[Array, "b w p"]) -> Float[Array, "b w d"]:
        """Normalized state -> token, a small one at the start, to leave the VLM as it is."""
        x = Dense((self.width,), dtype=self.dtype, name="fc1")(proprio)
        x = ACTIVATIONS[self.activation](x)
        # The root of the width keeps the sum over the inputs at 0.02 whatever the width.
        init = nn.initializers.normal(0.02 * self.width**-0.5)
        return Dense((self.width,), dtype=self.dtype, init=init, name="fc2")(x)
