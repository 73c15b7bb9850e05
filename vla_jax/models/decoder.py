"""Causal text decoder, driven by a Hugging Face `text_config`.

Legend: b batch · n tokens · d width · v vocabulary
"""

import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vla_jax.models import layers
from vla_jax.models.block import stack


def sinusoid(positions: Int[Array, "*b n"], width: int, pad: int) -> Float[Array, "*b n d"]:
    """Fairseq's sinusoidal positions: sines then cosines; the row of `pad` is zero."""
    half = width // 2
    frequency = jnp.exp(jnp.arange(half) * -(math.log(10000.0) / (half - 1)))
    angle = positions[..., None].astype(jnp.float32) * frequency
    table = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
    return jnp.where((positions == pad)[..., None], 0.0, table)


def causal_mask(valid: Bool[Array, "b n"]) -> Bool[Array, "b n n"]:
    """Each token sees the valid ones at or before it."""
    n = valid.shape[1]
    return jnp.tril(jnp.ones((n, n), bool)) & valid[:, None, :]


class Decoder(nn.Module):
    """Pre-norm decoder with Kosmos-2's inner norms and sinusoidal positions.

    Attributes:
        config: `text_config` of the VLM: vocab_size, embed_dim, layers, attention_heads, ffn_dim,
            activation_function, dropout, attention_dropout, layer_norm_eps, pad_token_id,
            scale_embedding.
        remat: see `block.remat`.
        dtype: of the activations.
    """

    config: Any
    remat: str = "full"
    dtype: Any = jnp.float32

    def setup(self):
        c = self.config
        self.embedding = self.param(
            "embedding",
            nn.initializers.normal(c["embed_dim"] ** -0.5),
            (c["vocab_size"], c["embed_dim"]),
        )
        self.layers = stack(
            c["layers"],
            self.remat,
            "layers",
            heads=c["attention_heads"],
            hidden=c["ffn_dim"],
            activation=c["activation_function"],
            sub_norm=True,
            dropout=c["dropout"],
            attention_dropout=c["attention_dropout"],
            eps=c["layer_norm_eps"],
            dtype=self.dtype,
        )
        self.norm = layers.LayerNorm(c["layer_norm_eps"], self.dtype)
        self.drop = layers.Dropout(c["dropout"])

    def embed(self, ids: Int[Array, "b n"]) -> Float[Array, "b n d"]:
        """Plain lookup; scaling happens in `__call__`, for images and actions alike."""
        return jnp.take(self.embedding, ids, axis=0).astype(self.dtype)

    def __call__(
        self,
        embeds: Float[Array, "b n d"],
        valid: Bool[Array, "b n"],
        positions: Int[Array, "b n"] | None = None,
    ) -> Float[Array, "b n d"]:
        """Embeddings -> hidden states after the final norm.

        Args:
            embeds: text, image and action embeddings in sequence order.
            valid: False on padding.
            positions: table rows; by default pad + 1, pad + 2, ... with padding counted, which is
                what the original does whenever it is given embeddings.
        """
        c = self.config
        pad = c["pad_token_id"]
        if positions is None:
            positions = jnp.arange(pad + 1, pad + 1 + embeds.shape[1])[None]
        scale = math.sqrt(c["embed_dim"]) if c["scale_embedding"] else 1.0
        x = embeds * scale + sinusoid(positions, c["embed_dim"], pad).astype(self.dtype)
        # Twice, as the original does in training.
        x = self.drop(self.drop(x))
        x, _ = self.layers(x, causal_mask(valid))
        return self.norm(x)

    def logits(self, hidden: Float[Array, "b n d"]) -> Float[Array, "b n v"]:
        """Hidden states -> scores over the vocabulary, with the tied embedding."""
        return jnp.einsum("bnd,vd->bnv", hidden, self.embedding.astype(self.dtype))
