"""Modules that turn a vision tower's tokens into a fixed number of VLM tokens."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vla_jax.models import layers


class LatentQueryProjection(nn.Module):
    """Kosmos-2: project, then let learned queries attend to [projected tokens, queries].

    Legend: b batch · n image tokens · c tower width · q queries · d text width
    """

    queries: int
    width: int
    heads: int
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b q d"]:
        """Image tokens -> text-width tokens."""
        # The tokens are unit vectors, so unit weights give outputs of the queries' own size; with
        # the usual 1 / sqrt(c) a model trained from scratch would hardly see its images.
        unit = nn.initializers.normal(1.0)
        x = layers.Dense((self.width,), dtype=self.dtype, init=unit, name="dense")(x)
        init = nn.initializers.normal(1.0)
        queries = self.param("queries", init, (self.queries, self.width)).astype(self.dtype)
        queries = jnp.broadcast_to(queries, (x.shape[0], self.queries, self.width))
        keys = jnp.concatenate([x, queries], axis=1)
        return layers.Attention(self.heads, dropout=self.dropout, dtype=self.dtype, name="attn")(
            queries, keys
        )
