"""LLaVA on Vicuna and on MPT: the architectures of RoboLLaVA folders."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from vla_jax.models.backbones import llava, llava_mpt

# Every tiny model of the golden set has four heads in both towers; shapes do not tell.
HEADS = 4


def vicuna(_: Any, params: Mapping[str, np.ndarray]) -> tuple[str, dict[str, Any]]:
    """Architecture of a tiny RoboLLaVA on Vicuna, read off its tensors.

    The llava package had loaded it in float16.
    """
    top = "backbone.model."
    layer = top + "layers.0."
    vocab, width = params[top + "embed_tokens.weight"].shape
    head = width // HEADS
    text = {
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": len(params[layer + "mlp.gate_proj.weight"]),
        "num_hidden_layers": _depth(params, top + "layers."),
        "num_attention_heads": HEADS,
        "num_key_value_heads": len(params[layer + "self_attn.k_proj.weight"]) // head,
        "rms_norm_eps": 1e-6,
        "rope_dtype": "float16",
    }
    results = {"text_config": text, **_rest(params, top)}
    return "llava", llava.Llava.arch(results)


def mpt(_: Any, params: Mapping[str, np.ndarray]) -> tuple[str, dict[str, Any]]:
    """The same on MPT."""
    top = "backbone.transformer."
    vocab, width = params[top + "wte.weight"].shape
    results = {
        "vocab_size": vocab,
        "d_model": width,
        "n_layers": _depth(params, top + "blocks."),
        "n_heads": HEADS,
        **_rest(params, top),
    }
    return "llava_mpt", llava_mpt.LlavaMPT.arch(results)


def _depth(params: Mapping[str, np.ndarray], prefix: str) -> int:
    """Layers whose names begin so."""
    return 1 + max(int(k[len(prefix) :].split(".")[0]) for k in params if k.startswith(prefix))


def _rest(params: Mapping[str, np.ndarray], top: str) -> dict[str, Any]:
    """Tower and projector."""
    tower = top + "vision_tower.vision_tower.vision_model."
    patch = params[tower + "embeddings.patch_embedding.weight"]
    side = round((len(params[tower + "embeddings.position_embedding.weight"]) - 1) ** 0.5)
    linear = sum(k.startswith(top + "mm_projector.") and k.endswith("weight") for k in params)
    return {
        "mm_projector_type": "linear" if linear == 1 else f"mlp{linear}x_gelu",
        "vision_config": {
            "hidden_size": patch.shape[0],
            "num_hidden_layers": _depth(params, tower + "encoder.layers."),
            "num_attention_heads": HEADS,
            "intermediate_size": len(params[tower + "encoder.layers.0.mlp.fc1.bias"]),
            "patch_size": patch.shape[2],
            "image_size": side * patch.shape[2],
        },
    }
