"""UForm-Gen: a vision transformer, a pooler of latents, Llama or Qwen2 (unum-cloud/uform-gen*).

The first generation projects the image tokens to the text's width and pools then, the second pools
at the tower's width and projects the latents.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jaxtyping import Array, Float

from vla_jax.models import weights as w
from vla_jax.models.backbones.base import Backbone, Layout, count_layers
from vla_jax.models.image import ImageSpec
from vla_jax.models.towers import vision_families
from vla_jax.models.towers.decoder import Decoder
from vla_jax.models.towers.decoder_spec import DecoderSpec
from vla_jax.models.towers.layers import Dense
from vla_jax.models.towers.resampler import LatentDecoder, latent_decoder_weights
from vla_jax.models.towers.text_families import LANGUAGES
from vla_jax.models.towers.vit import VisionSpec, VisionTransformer

# config.json of uform-gen2-qwen-500m, reduced to what shapes and numbers depend on, and what only
# the weights say: `from_shapes`. It names the text decoder; `text_config` is that model's.
ARCH: dict[str, Any] = {
    "model_type": "vlm",
    "image_size": 336,
    "image_encoder_hidden_size": 1280,
    "image_encoder_patch_size": 14,
    "image_encoder_num_layers": 32,
    "image_encoder_num_heads": 16,
    # Width of a vector of the whole image, which no VLM reads; 0 = the weights lack it.
    "image_encoder_embedding_dim": 512,
    "image_encoder_class_token": True,
    "image_pooler_num_attn_heads": 16,
    "image_pooler_intermediate_size": 3200,
    "image_pooler_num_latents": 256,
    "image_pooler_project_first": False,
    "text_config": {
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "intermediate_size": 2816,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "attention_dropout": 0.0,
    },
}
# What the text decoder of the first generation (Sheared-LLaMA-1.3B) has otherwise.
_LLAMA = {
    "model_type": "llama",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
_HEAD_WIDTHS = {"qwen2": 64, "llama": 128}


_ENCODER, _POOLER, _TEXT = "image_encoder.", "image_pooler.", "text_decoder."
_EMBEDDING = _ENCODER + "embedding_projection.weight"
_CLASS = _ENCODER + "cls_token"


def _text(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {**ARCH["text_config"], **facts}


class UForm(Backbone):
    """Legend: b batch · h height = width · q image tokens · n sequence · d text width.

    v vocabulary.
    """

    RELEASED = ARCH
    DEFAULT_CONFIG = "uform_ph"
    SIZES_FROM_WEIGHTS = True
    # Qwen's tokenizer has no start token, and the prompt ends with a word.
    LAYOUT = Layout(bos=0, eos=0)
    # RoboVLMs asks whether there is an end token, not whether the prompt has one: its action tokens
    # stand before the last word.
    ORIGINAL_LAYOUT = Layout(bos=0, eos=1)
    # The token for an image stays in the text: the image stands before it.
    PROMPT = "<image> {instruction}"
    # The tokenizer's 151643 pieces, less four special tokens and 10, as RoboVLMs counts.
    ACTION_TOKEN_END = 151629
    # Buffers older dumps contain.
    IGNORE = (r"\.inv_freq$", r"\.position_ids$")

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """The sizes that the weights tell, with text heads as wide as in the released models."""
        # Some versions lack these and are UForm all the same.
        optional = {_EMBEDDING, _CLASS, _TEXT + "lm_head.weight"}
        needed = {
            row.source.format(0) for row in cls({**ARCH, "text_config": _text(_LLAMA)}).weight_map()
        }
        if needed - optional - set(shapes):
            return {}
        hidden, _, patch, _ = shapes[_ENCODER + "patch_embed.weight"]
        _, latents, inner = shapes[_POOLER + "image_latents"]
        projected = shapes[_POOLER + "projection.weight"]
        layer = _TEXT + "model.layers.0."
        vocab, width = shapes[_TEXT + "model.embed_tokens.weight"]
        # Of the two text decoders only Qwen2 has biases on its queries.
        biased = layer + "self_attn.q_proj.bias" in shapes
        text = _text({} if biased else _LLAMA)
        # Shapes do not tell heads apart, so their width is that of the released models.
        head = _HEAD_WIDTHS[text["model_type"]]
        text |= {
            "vocab_size": vocab,
            "hidden_size": width,
            "num_hidden_layers": count_layers(shapes, _TEXT + "model.layers."),
            "num_attention_heads": max(width // head, 1),
            "num_key_value_heads": max(shapes[layer + "self_attn.k_proj.weight"][0] // head, 1),
            "intermediate_size": shapes[layer + "mlp.up_proj.weight"][0],
        }
        return {
            "image_size": round(shapes[_ENCODER + "pos_embed"][1] ** 0.5) * patch,
            "image_encoder_hidden_size": hidden,
            "image_encoder_patch_size": patch,
            "image_encoder_num_layers": count_layers(shapes, _ENCODER + "blocks."),
            "image_encoder_embedding_dim": shapes[_EMBEDDING][0] if _EMBEDDING in shapes else 0,
            "image_encoder_class_token": _CLASS in shapes,
            "image_pooler_intermediate_size": shapes[_POOLER + "pooler.linear1.bias"][0],
            "image_pooler_num_latents": latents,
            # Equal widths fit both generations; then the second is assumed.
            "image_pooler_project_first": projected == (inner, hidden) and inner != hidden,
            "text_config": text,
        }

    @property
    def image_spec(self) -> ImageSpec:
        """Padded to a square, bilinear, CLIP's mean; first generation: the center, ImageNet's."""
        if self.config["image_pooler_project_first"]:
            return ImageSpec(
                size=self.config["image_size"],
                mean=(0.485, 0.456, 0.406),
                std=(0.229, 0.224, 0.225),
                fit="crop",
                # The shorter side has 256 pixels before the crop; a larger crop needs a larger one.
                shortest=max(256, self.config["image_size"]),
                crop_rounding="half_even",
            )
        return ImageSpec.clip(self.config["image_size"], resample="bilinear", fit="pad")

    @property
    def vision_spec(self) -> VisionSpec:
        """Sizes of the image tower."""
        return replace(
            vision_families.uform(self.config), class_token=self.config["image_encoder_class_token"]
        )

    @property
    def text_spec(self) -> DecoderSpec:
        """Sizes of the text decoder."""
        text = self.config["text_config"]
        return LANGUAGES[text["model_type"]].spec(text)

    @property
    def image_tokens(self) -> int:
        """Tokens of one image."""
        return self.config["image_pooler_num_latents"]

    def setup(self):
        c, text = self.config, self.config["text_config"]
        self.vision = VisionTransformer(self.vision_spec, self.remat, self.dtype)
        self.vision_embedding = Dense((c["image_encoder_embedding_dim"],), use_bias=False)
        self.image_pooler = LatentDecoder(
            c["image_pooler_num_latents"],
            text["hidden_size"],
            c["image_pooler_num_attn_heads"],
            c["image_pooler_intermediate_size"],
            project_first=c["image_pooler_project_first"],
            dtype=self.dtype,
        )
        self.text = Decoder(self.text_spec, self.remat, self.dtype)

    def encode_images(self, images: Float[Array, "b h h 3"]) -> Float[Array, "b q d"]:
        """Preprocessed images -> image tokens."""
        x = self.vision(images).tokens
        if self.is_initializing() and self.config["image_encoder_embedding_dim"]:
            self.vision_embedding(x)  # only so that weights come out as they went in
        return self.image_pooler(x)

    def weight_map(self) -> list[w.Weight]:
        """Every parameter of the released models; targets are relative to `backbone/`."""
        text = self.config["text_config"]
        decoder = LANGUAGES[text["model_type"]].weights(self.text_spec)
        absent = set() if self.config["image_encoder_class_token"] else {_CLASS}
        rows = [
            *vision_families.uform_weights(_ENCODER, "vision/"),
            *w.prefixed(latent_decoder_weights(), _POOLER, "image_pooler/"),
            *w.prefixed(decoder, _TEXT, "text/"),
        ]
        if self.config["image_encoder_embedding_dim"]:
            rows.append(w.Weight(_EMBEDDING, "vision_embedding/kernel", "linear"))
        return [row for row in rows if row.source not in absent]
