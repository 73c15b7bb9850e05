"""CLIP's text tower: a sentence as one unit vector (openai/clip-vit-large-patch14).

Legend: b batch · t text columns · d width · s size of the vector
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vla_jax.models import weights as w
from vla_jax.models.towers.block import BlockSpec
from vla_jax.models.towers.decoder import Decoder
from vla_jax.models.towers.decoder_spec import DecoderSpec
from vla_jax.models.towers.layers import Dense

# Of a whole CLIP: the other tower, the temperature, buffers.
IGNORE = (r"^vision_model\.", r"^visual_projection\.", r"^logit_scale$", r"position_ids$")


def text_spec(text: Mapping[str, Any]) -> DecoderSpec:
    """The tower of a Hugging Face `text_config`, which names only what differs from the base."""
    return DecoderSpec(
        vocab=text.get("vocab_size", 49408),
        width=text.get("hidden_size", 512),
        layers=text.get("num_hidden_layers", 12),
        block=BlockSpec(
            heads=text.get("num_attention_heads", 8),
            hidden=text.get("intermediate_size", 2048),
            activation=text.get("hidden_act", "quick_gelu"),
            eps=text.get("layer_norm_eps", 1e-5),
        ),
        positions="learned",
        max_positions=text.get("max_position_embeddings", 77),
    )


class ClipText(nn.Module):
    """Causal tower; the vector is read at the end token, projected and normalized."""

    spec: DecoderSpec
    size: int

    def setup(self):
        # Nobody differentiates it: vectors of sentences are made before training begins.
        self.text = Decoder(self.spec, remat="none")
        self.projection = Dense((self.size,), use_bias=False)

    def __call__(self, ids: Int[Array, "b t"], valid: Bool[Array, "b t"]) -> Float[Array, "b s"]:
        """Token ids that end with the end token, padded on the right -> unit vectors."""
        hidden = self.text(self.text.embed(ids), valid)
        # Ids are padded on the right, so the end token is the last valid one.
        end = valid.sum(axis=1) - 1
        x = self.projection(jnp.take_along_axis(hidden, end[:, None, None], axis=1)[:, 0])
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def weight_map() -> list[w.Weight]:
    """Hugging Face's names of CLIPModel and CLIPTextModelWithProjection."""
    layer = "text_model.encoder.layers.{}."
    return [
        w.Weight("text_model.embeddings.token_embedding.weight", "text/embedding"),
        w.Weight("text_model.embeddings.position_embedding.weight", "text/positions"),
        *w.attention(layer + "self_attn", "text/layers/attn"),
        *w.norm(layer + "layer_norm1", "text/layers/norm1"),
        *w.pair(layer + "mlp.fc1", "text/layers/mlp/fc1"),
        *w.pair(layer + "mlp.fc2", "text/layers/mlp/fc2"),
        *w.norm(layer + "layer_norm2", "text/layers/norm2"),
        *w.norm("text_model.final_layer_norm", "text/norm"),
        w.Weight("text_projection.weight", "projection/kernel", "linear"),
    ]


def open_clip_weights() -> list[w.Weight]:
    """open_clip's names."""
    layer = "transformer.resblocks.{}."
    return [
        w.Weight("token_embedding.weight", "text/embedding"),
        w.Weight("positional_embedding", "text/positions"),
        *w.norm(layer + "ln_1", "text/layers/norm1"),
        *w.multihead(layer + "attn", "text/layers/attn"),
        *w.norm(layer + "ln_2", "text/layers/norm2"),
        *w.pair(layer + "mlp.c_fc", "text/layers/mlp/fc1"),
        *w.pair(layer + "mlp.c_proj", "text/layers/mlp/fc2"),
        *w.norm("ln_final", "text/norm"),
        # A bare parameter [in, out], not a Linear, so nothing is transposed.
        w.Weight("text_projection", "projection/kernel"),
    ]
