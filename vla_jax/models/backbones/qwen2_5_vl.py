"""Qwen2.5-VL: windows of attention in the tower (Qwen/Qwen2.5-VL-3B-Instruct)."""

from typing import Any

from vla_jax.models.backbones.qwen_family import QwenFamily

# config.json of the released model, reduced to what shapes and numbers depend on, and
# `image_size`: pixels of a side of our images, which are square; the original takes any shape.
ARCH: dict[str, Any] = {
    "model_type": "qwen2_5_vl",
    "image_size": 224,
    "tie_word_embeddings": True,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "num_heads": 16,
        "intermediate_size": 3420,
        "hidden_act": "silu",
        "out_hidden_size": 2048,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        # Pixels of a window's side, which are 4 tokens.
        "window_size": 112,
        # All other layers attend within windows.
        "fullatt_block_indexes": (7, 15, 23, 31),
    },
    "text_config": {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "sliding_window": 32768,
        "max_window_layers": 70,
        "layer_types": None,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1000000.0,
            # Rotary pairs of a head, 64 in all, for time, row and column.
            "mrope_section": (16, 24, 24),
        },
    },
}


class Qwen25VL(QwenFamily):
    """Qwen2.5-VL, which is Qwen2-VL with another image tower."""

    RELEASED = ARCH
    DEFAULT_CONFIG = "qwen2_5_vl_ph"
