"""Qwen2-VL: ViT with rotary positions, Qwen2 decoder (Qwen/Qwen2-VL-2B-Instruct)."""

from typing import Any

from vla_jax.models.backbones.qwen_family import QwenFamily

# config.json of the released model, reduced to what shapes and numbers depend on, and
# `image_size`: pixels of a side of our images, which are square; the original takes any shape.
ARCH: dict[str, Any] = {
    "model_type": "qwen2_vl",
    "image_size": 224,
    "tie_word_embeddings": True,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_config": {
        "depth": 32,
        # The tower's width; hidden_size below is that of the merger's output.
        "embed_dim": 1280,
        "num_heads": 16,
        "mlp_ratio": 4,
        "hidden_size": 1536,
        "hidden_act": "quick_gelu",
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
    "text_config": {
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "sliding_window": 32768,
        "max_window_layers": 28,
        "layer_types": None,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1000000.0,
            # Rotary pairs of a head, 64 in all, for time, row and column.
            "mrope_section": (16, 24, 24),
        },
    },
}


class Qwen2VL(QwenFamily):
    """Qwen2-VL, the first of the three models of `QwenFamily`."""

    RELEASED = ARCH
    DEFAULT_CONFIG = "qwen2_vl_ph"
