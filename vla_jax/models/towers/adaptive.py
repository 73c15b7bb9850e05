"""Norms that follow a condition (pi0.5).

Legend: b batch · n tokens · d width · c condition
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vla_jax.models.towers.layers import Dense


class Modulation(NamedTuple):
    """What an adaptive norm makes of a condition, where that is made beforehand.

    Attributes:
        value: [b, 3 d], or [1, 3 d] of a condition that all rows share.
    """

    value: Array


class AdaptiveRMSNorm(nn.Module):
    """RMS normalization whose scale and shift, and a gate, are a linear map of a condition.

    The map starts at zero, so that a fresh layer gates itself off and is the identity.
    """

    eps: float = 1e-6
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"], level: Float[Array, "b c"] | Modulation
    ) -> tuple[Float[Array, "b n d"], Float[Array, "#b 1 d"]]:
        """The normalized tokens, and the factor on what is made of them."""
        if isinstance(level, Modulation):
            made = level.value
        else:
            zeros = nn.initializers.zeros
            made = Dense((3 * x.shape[-1],), dtype=self.dtype, init=zeros, name="modulation")(level)
        scale, shift, gate = jnp.split(made[:, None], 3, axis=-1)
        x = x.astype(jnp.float32)  # bfloat16 is too coarse for a mean of squares
        x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + self.eps)
        return (x * (1 + scale) + shift).astype(self.dtype), gate
