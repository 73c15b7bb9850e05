"""PaliGemma 2: as PaliGemma, with Gemma 2 (google/paligemma2-3b-pt-224)."""

from typing import Any

from vla_jax.models.backbones import paligemma

ARCH: dict[str, Any] = {
    **paligemma.ARCH,
    # The files leave it at the first generation's value, and RoboVLMs divides by its root;
    # transformers from 4.48 on takes text_config.hidden_size, which makes images 6 % smaller.
    "hidden_size": 2048,
    "projection_dim": 2304,
    # Gemma 2's cap on attention scores. RoboVLMs runs transformers' default attention (sdpa), which
    # leaves it out; its eager attention has it.
    "attention_cap": False,
    "text_config": {
        **paligemma.ARCH["text_config"],
        "model_type": "gemma2",
        "hidden_size": 2304,
        "num_hidden_layers": 26,
        "num_key_value_heads": 4,
        "intermediate_size": 9216,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "layer_types": None,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
}


class PaliGemma2(paligemma.PaliGemma):
    """PaliGemma with other sizes; the language model's family is in the config."""

    RELEASED = ARCH
    DEFAULT_CONFIG = "paligemma2_ph"
    FOR_EXPERT = False  # every second layer is local
