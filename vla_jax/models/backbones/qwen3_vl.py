"""Qwen3-VL: tapped layers of the tower go into the decoder's first (Qwen/Qwen3-VL-2B-Instruct)."""

from collections.abc import Mapping
from typing import Any

from vla_jax.models import weights as w
from vla_jax.models.backbones import qwen_family as family
from vla_jax.models.backbones.qwen_family import (  # noqa: F401
    ENDS,
    IGNORE,
    LAYOUT,
    PROMPT,
    QUESTION,
    Qwen2VL,
    image_tokens,
    token_end,
    token_width,
    vocab_size,
    width,
)
from vla_jax.models.image import ImageSpec

DEFAULT_CONFIG = "qwen3_vl_ph"

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
        "num_position_embeddings": 2304,
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
            "mrope_section": (24, 20, 20),
            "mrope_interleaved": True,
        },
    },
}


def arch(overrides: Mapping[str, Any], strict: bool = True) -> dict[str, Any]:
    """The released architecture with `overrides` applied; see `qwen_family.merged_arch`."""
    return family.merged_arch(ARCH, overrides, strict)


def image_spec(config: Mapping[str, Any]) -> ImageSpec:
    """Squash to a square, bicubic, to [-1, 1]."""
    return ImageSpec(
        size=config["image_size"],
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        resample="bicubic",
    )


def weight_map(config: Mapping[str, Any]) -> list[w.Weight]:
    """Every parameter of the Hugging Face model; targets are relative to `backbone/`."""
    return family.weights(config, visual="model.visual.", model="model.language_model.")
