"""Gated cross-attention: how a language model that was trained without images sees them.

Source: Alayrac et al. 2022, as in open_flamingo's GatedCrossAttentionBlock.

Legend: b batch · n tokens · k image tokens · d width · c width of the image tokens
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vla_jax.models import weights as w
from vla_jax.models.towers.layers import MLP, Attention, LayerNorm


class Media(NamedTuple):
    """What a sequence can look at.

    Attributes:
        tokens: of the images.
        seen: which of them each token of the sequence attends to.
    """

    tokens: Float[Array, "b k c"]
    seen: Bool[Array, "b n k"]


class GatedCrossAttention(nn.Module):
    """Attention to images, then an MLP, each behind a gate that is shut at the start.

    Attributes:
        widen: hidden units of the MLP, times the width.
    """

    heads: int = 8
    head_width: int = 64
    widen: int = 4
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"], context: Media) -> Float[Array, "b n d"]:
        """Tokens -> tokens; those that see no image attend to nothing."""
        attention = Attention(
            self.heads,
            head_width=self.head_width,
            qkv_bias=False,
            out_bias=False,
            dtype=self.dtype,
            name="attn",
        )
        media = context.tokens.astype(self.dtype)
        y = attention(LayerNorm(dtype=self.dtype, name="norm")(x), media, context.seen)
        # A softmax over nothing is uniform, not zero.
        y = jnp.where(context.seen.any(axis=-1, keepdims=True), y, 0)
        x = x + self._gate("attn_gate") * y
        mlp = MLP(self.widen * x.shape[-1], "gelu", use_bias=False, dtype=self.dtype, name="mlp")
        return x + self._gate("ff_gate") * mlp(LayerNorm(dtype=self.dtype, name="mlp_norm")(x))

    def _gate(self, name: str) -> Float[Array, "1"]:
        # tanh(0) = 0: at the start the language model is as it was without images.
        return jnp.tanh(self.param(name, nn.initializers.zeros, (1,))).astype(self.dtype)


def weight_map() -> list[w.Weight]:
    """One layer under open_flamingo's names."""
    return [
        w.Weight("attn_gate", "attn_gate"),
        w.Weight("ff_gate", "ff_gate"),
        *w.norm("attn.norm", "norm"),
        w.Weight("attn.to_q.weight", "attn/q/kernel", "linear"),
        # One matrix of theirs makes keys and values.
        w.Weight("attn.to_kv.weight", "attn/{k,v}/kernel", "linear"),
        w.Weight("attn.to_out.weight", "attn/o/kernel", "linear_from_heads"),
        # Their MLP is a Sequential: norm, linear, GELU, linear.
        *w.norm("ff.0", "mlp_norm"),
        w.Weight("ff.1.weight", "mlp/fc1/kernel", "linear"),
        w.Weight("ff.3.weight", "mlp/fc2/kernel", "linear"),
    ]
