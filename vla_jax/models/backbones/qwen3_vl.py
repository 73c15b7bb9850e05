"""Qwen3-VL: tapped layers of the tower go into the decoder's first (Qwen/Qwen3-VL-2B-Instruct)."""

from typing import Any

from vla_jax.models import weights as w
from vla_jax.models.backbones.qwen_family import QwenFamily
from vla_jax.models.image import ImageSpec

# config.json of the released model, reduced to what shapes and numbers depend on, and
# `image_size`: pixels of a side of our images, which are square; the original takes any shape.
ARCH: dict[str, Any] = {
    "model_type": "qwen3_vl",
    "image_size": 224,
    "tie_word_embeddings": True,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_config": {
        "depth": 24,
        "hidden_size": 1024,
        "num_heads": 16,
        "intermediate_size": 4096,
        "hidden_act": "gelu_pytorch_tanh",
        "out_hidden_size": 2048,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        # A table of 48 x 48 positions, interpolated to the image's grid.
        "num_position_embeddings": 2304,
        # The decoder's first three layers get what these layers give.
        "deepstack_visual_indexes": (5, 11, 17),
    },
    "text_config": {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5000000.0,
            # Rotary pairs of a head, 64 in all, for time, row and column.
            "mrope_section": (24, 20, 20),
            "mrope_interleaved": True,
        },
    },
}


class Qwen3VL(QwenFamily):
    """Qwen3-VL, whose language model is Qwen3."""

    RELEASED = ARCH
    DEFAULT_CONFIG = "qwen3_vl_ph"
    RENAMES = ()

    @property
    def image_spec(self) -> ImageSpec:
        """Squash to a square, bicubic, to [-1, 1]."""
        half = (0.5, 0.5, 0.5)
        return ImageSpec(self.config["image_size"], half, half, "bicubic")

    def weight_map(self) -> list[w.Weight]:
        """Every parameter of the Hugging Face model; targets are relative to `backbone/`."""
        return self.rows(visual="model.visual.", model="model.language_model.")
