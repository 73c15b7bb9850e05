"""Kosmos-2: CLIP ViT, 64 latent queries, causal decoder (microsoft/kosmos-2-patch14-224)."""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vla_jax.models import weights as w
from vla_jax.models.backbones.base import Layout, Tokens, merge_arch
from vla_jax.models.image import ImageSpec
from vla_jax.models.towers import vision_families
from vla_jax.models.towers.block import BlockSpec
from vla_jax.models.towers.decoder import Cache, Decoder, empty_cache
from vla_jax.models.towers.decoder_spec import DecoderSpec
from vla_jax.models.towers.layers import LayerNorm
from vla_jax.models.towers.resampler import LatentQueryProjection
from vla_jax.models.towers.vit import VisionTransformer

DEFAULT_CONFIG = "kosmos_ph"

# config.json of the released model, reduced to what shapes and numbers depend on.
ARCH: dict[str, Any] = {
    "model_type": "kosmos-2",
    "latent_query_num": 64,
    "vision_config": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "patch_size": 14,
        "image_size": 224,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "attention_dropout": 0.0,
    },
    "text_config": {
        "vocab_size": 65037,
        "embed_dim": 2048,
        "layers": 24,
        "attention_heads": 32,
        "ffn_dim": 8192,
        "activation_function": "gelu",
        "dropout": 0.1,
        "attention_dropout": 0.1,
        "layer_norm_eps": 1e-5,
        "pad_token_id": 1,
        "scale_embedding": True,
    },
}

# The tokenizer has both <s> and </s>: images go after the first, actions before the last.
LAYOUT = Layout(bos=1, eos=1)
PROMPT = "<grounding>An image of a robot {instruction}"
# The tokenizer's 64002 pieces less 7 special tokens less 10, as RoboVLMs counts.
ACTION_TOKEN_END = 63985


def arch(overrides: Mapping[str, Any], strict: bool = True) -> dict[str, Any]:
    """The released architecture with `overrides` applied; see `base.merge_arch`."""
    return merge_arch(ARCH, overrides, strict)


def image_spec(config: Mapping[str, Any]) -> ImageSpec:
    """OpenAI-CLIP preprocessing: squash to a square, bicubic, CLIP mean and deviation."""
    return ImageSpec(
        size=config["vision_config"]["image_size"],
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
        resample="bicubic",
    )


def width(config: Mapping[str, Any]) -> int:
    """Width of the hidden states the structure works on."""
    return config["text_config"]["embed_dim"]


def token_width(config: Mapping[str, Any]) -> int:
    """Width of the tokens that go in."""
    return width(config)


def text_spec(text: Mapping[str, Any]) -> DecoderSpec:
    """Inner norms, sinusoidal positions that count padding and start behind its row."""
    return DecoderSpec(
        vocab=text["vocab_size"],
        width=text["embed_dim"],
        layers=text["layers"],
        block=BlockSpec(
            heads=text["attention_heads"],
            hidden=text["ffn_dim"],
            activation=text["activation_function"],
            eps=text["layer_norm_eps"],
            sub_norm=True,
            dropout=text["dropout"],
            attention_dropout=text["attention_dropout"],
        ),
        positions="sinusoid",
        first_position=text["pad_token_id"] + 1,
        embed_scale=math.sqrt(text["embed_dim"]) if text["scale_embedding"] else 1.0,
        # Twice, as the original does in training.
        embed_dropout=(text["dropout"], text["dropout"]),
    )


def image_tokens(config: Mapping[str, Any]) -> int:
    """Tokens of one image."""
    return config["latent_query_num"]


def vocab_size(config: Mapping[str, Any]) -> int:
    """Ids the decoder knows."""
    return config["text_config"]["vocab_size"]


def token_end(config: Mapping[str, Any]) -> int:
    """First id above those that may stand for actions, from the top of the vocabulary."""
    return min(ACTION_TOKEN_END, vocab_size(config))


class Kosmos2(nn.Module):
    """Legend: b batch · h height = width · q image tokens · n sequence · d text width."""

    config: Any
    remat: str = "full"
    dtype: Any = jnp.float32

    def setup(self):
        vision, text = self.config["vision_config"], self.config["text_config"]
        self.vision = VisionTransformer(vision_families.clip(vision), self.remat, self.dtype)
        self.vision_norm = LayerNorm(vision["layer_norm_eps"], self.dtype)
        self.projection = LatentQueryProjection(
            self.config["latent_query_num"],
            text["embed_dim"],
            text["attention_heads"],
            text["attention_dropout"],
            self.dtype,
        )
        self.text = Decoder(text_spec(text), self.remat, self.dtype)

    def encode_images(self, images: Float[Array, "b h h 3"]) -> Float[Array, "b q d"]:
        """Preprocessed images -> image tokens."""
        x = self.vision_norm(self.vision(images)).astype(jnp.float32)
        # torch.nn.functional.normalize: norm clamped at 1e-12; safe gradient at zero.
        norm = jnp.sqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), 1e-24))
        return self.projection((x / norm).astype(self.dtype))

    def embed_text(self, ids: Int[Array, "b n"]) -> Float[Array, "b n d"]:
        """Token ids -> embeddings; no gradient reaches padding's, as torch's padding_idx has it."""
        x = self.text.embed(ids)
        padding = (ids == self.config["text_config"]["pad_token_id"])[..., None]
        return jnp.where(padding, jax.lax.stop_gradient(x), x)

    def __call__(self, tokens: Tokens) -> Float[Array, "b n d"]:
        """Spliced embeddings -> last hidden states (after the final norm)."""
        return self.text(tokens.embeds, tokens.valid)

    def empty_cache(self, batch: int, slots: int) -> Cache:
        """Before the first token of a sequence of at most `slots`."""
        text = self.config["text_config"]
        return empty_cache(text_spec(text), batch, slots, self.dtype)

    def extend(self, tokens: Tokens, cache: Cache) -> tuple[Float[Array, "b n d"], Cache]:
        """`__call__` for tokens that follow those in the cache, and the cache with them."""
        result = self.text.run(tokens.embeds, tokens.valid, cache=cache)
        return result.hidden, result.cache

    def logits(self, hidden: Float[Array, "b n d"]) -> Float[Array, "b n v"]:
        """Hidden states -> vocabulary scores."""
        return self.text.logits(hidden)


def weight_map(config: Mapping[str, Any]) -> list[w.Weight]:
    """Every parameter of the Hugging Face model; targets are relative to `backbone/`."""
    vision, text = "vision_model.model.", "text_model.model."
    t_layer = text + "layers.{}."
    return [
        *vision_families.hugging_face_weights(
            vision_families.clip(config["vision_config"]), vision, "vision/"
        ),
        *w.norm(vision + "post_layernorm", "vision_norm"),
        w.Weight("image_to_text_projection.latent_query", "projection/queries"),
        *w.pair("image_to_text_projection.dense", "projection/dense"),
        *w.attention("image_to_text_projection.x_attn", "projection/attn"),
        w.Weight(text + "embed_tokens.weight", "text/embedding"),
        w.Weight("text_model.lm_head.weight", "text/embedding", alias=True),
        *w.attention(t_layer + "self_attn", "text/layers/attn"),
        *w.norm(t_layer + "self_attn.inner_attn_ln", "text/layers/attn/norm"),
        *w.norm(t_layer + "self_attn_layer_norm", "text/layers/norm1"),
        *w.pair(t_layer + "ffn.fc1", "text/layers/mlp/fc1"),
        *w.norm(t_layer + "ffn.ffn_layernorm", "text/layers/mlp/norm"),
        *w.pair(t_layer + "ffn.fc2", "text/layers/mlp/fc2"),
        *w.norm(t_layer + "final_layer_norm", "text/layers/norm2"),
        *w.norm(text + "layer_norm", "text/norm"),
    ]


# Buffers older dumps contain; they carry nothing.
IGNORE = (r"embeddings\.position_ids$", r"embed_positions\.weights$")
