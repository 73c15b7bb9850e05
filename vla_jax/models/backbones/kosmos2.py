"""Kosmos-2: CLIP ViT, 64 latent queries, causal decoder (microsoft/kosmos-2-patch14-224)."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vla_jax.models import sharding
from vla_jax.models import weights as w
from vla_jax.models.backbones.base import Backbone, Layout
from vla_jax.models.image import ImageSpec
from vla_jax.models.towers import vision_families
from vla_jax.models.towers.block import BlockSpec, recomputed
from vla_jax.models.towers.decoder import Decoder
from vla_jax.models.towers.decoder_spec import DecoderSpec
from vla_jax.models.towers.layers import LayerNorm
from vla_jax.models.towers.order import together
from vla_jax.models.towers.resampler import LatentQueryProjection
from vla_jax.models.towers.vit import VisionTransformer

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


class Kosmos2(Backbone):
    """Legend: b batch · h height = width · q image tokens · n sequence · d text width."""

    RELEASED = ARCH
    DEFAULT_CONFIG = "kosmos_ph"
    # The tokenizer has both <s> and </s>: images go after the first, actions before the last.
    LAYOUT = Layout(bos=1, eos=1)
    PROMPT = "<grounding>An image of a robot {instruction}"
    # The tokenizer's 64002 pieces less 7 special tokens less 10, as RoboVLMs counts.
    ACTION_TOKEN_END = 63985
    # Buffers older dumps contain; they carry nothing.
    IGNORE = (r"embeddings\.position_ids$", r"embed_positions\.weights$")

    @property
    def image_spec(self) -> ImageSpec:
        """OpenAI-CLIP preprocessing: squash to a square, bicubic, CLIP mean and deviation."""
        return ImageSpec.clip(self.config["vision_config"]["image_size"])

    @property
    def width(self) -> int:
        """Width of the hidden states the structure works on."""
        return self.config["text_config"]["embed_dim"]

    @property
    def text_spec(self) -> DecoderSpec:
        """Inner norms, sinusoidal positions that count padding and start behind its row."""
        text = self.config["text_config"]
        return DecoderSpec(
            vocab=text["vocab_size"],
            width=text["embed_dim"],
            layers=text["layers"],
            block=BlockSpec(
                heads=text["attention_heads"],
                hidden=text["ffn_dim"],
                activation=text["activation_function"],
                eps=text["layer_norm_eps"],
                # The decoder is Magneto's, with norms inside attention and MLP as well.
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

    @property
    def image_tokens(self) -> int:
        """Tokens of one image."""
        return self.config["latent_query_num"]

    @property
    def padding_id(self) -> int:
        """Id whose embedding no gradient reaches."""
        return self.config["text_config"]["pad_token_id"]

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
        self.text = Decoder(self.text_spec, self.remat, self.dtype)

    def encode_images(self, images: Float[Array, "b h h 3"]) -> Float[Array, "b q d"]:
        """Preprocessed images -> image tokens."""
        x = self.vision(images).tokens
        if self.is_initializing():
            return self._project(x)
        # A module applied on its own sees none of its parent's parameters and keys.
        apart, params = self.clone(parent=None), self.variables["params"]
        params = {name: params[name] for name in ("vision_norm", "projection")}
        keys = {"dropout": self.make_rng("dropout")} if self.has_rng("dropout") else {}

        def project(params: Any, x: Array, keys: Any) -> Any:
            return apart.apply({"params": params}, x, rngs=keys, method="_project")

        def gathered(path: Any, leaf: Array) -> Array:
            return sharding.whole(leaf.astype(self.dtype)) if path[-1].key == "kernel" else leaf

        params, x = together((params, x))
        params = jax.tree_util.tree_map_with_path(gathered, params)
        # Recomputed like the layers: its keys and values are of text width for all image tokens.
        return recomputed(project, self.remat, in_scan=False)(params, x, keys)

    def _project(self, x: Float[Array, "b n c"]) -> Float[Array, "b q d"]:
        x = self.vision_norm(x).astype(jnp.float32)
        # torch.nn.functional.normalize: norm clamped at 1e-12; safe gradient at zero.
        norm = jnp.sqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), 1e-24))
        return self.projection((x / norm).astype(self.dtype))

    def weight_map(self) -> list[w.Weight]:
        """Every parameter of the Hugging Face model; targets are relative to `backbone/`."""
        vision, text = "vision_model.model.", "text_model.model."
        t_layer = text + "layers.{}."
        return [
            *vision_families.hugging_face_weights(
                vision_families.clip(self.config["vision_config"]), vision, "vision/"
            ),
            *w.norm(vision + "post_layernorm", "vision_norm"),
            w.Weight("image_to_text_projection.latent_query", "projection/queries"),
            *w.pair("image_to_text_projection.dense", "projection/dense"),
            *w.attention("image_to_text_projection.x_attn", "projection/attn"),
            w.Weight(text + "embed_tokens.weight", "text/embedding"),
            # The output scores are tied to the embeddings, which the files write twice.
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
