"""Any backbone, very small, with the LSTM head on the tabletop world, from scratch.

python launch/demo.py --config=configs/tiny.py:kosmos2 --workdir=runs/kosmos2

The argument names the backbone. That everything is wired is what this shows: it trains, serves and
acts on two CPU cores; `python bench/closed_loop.py backbones --data DATA` runs all of them.
"""

from typing import Any

from vla_jax.configs import quickstart

WIDTH, VOCAB = 32, 128


def _kosmos2() -> dict[str, Any]:
    arch = quickstart.get_config().model.backbone.arch.to_dict()
    vision = {"hidden_size": WIDTH, "intermediate_size": 48, "image_size": 32}
    text = {"embed_dim": WIDTH, "ffn_dim": 48, "layers": 1, "attention_heads": 2}
    arch["vision_config"].update(vision)
    arch["text_config"].update({**text, "vocab_size": VOCAB})
    return arch


def _qwen_vl() -> dict[str, Any]:
    visual = {"image_size": 28, "patch_size": 7, "width": WIDTH, "layers": 1, "heads": 2}
    visual |= {"mlp_ratio": 1.5, "n_queries": 4, "image_start_id": VOCAB - 2}
    text = {"vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 96}
    text |= {"num_hidden_layers": 1, "num_attention_heads": 2}
    # So short that what changes beyond it does so in every run.
    return {**text, "seq_length": 16, "visual": visual}


def _qwen(model: str) -> dict[str, Any]:
    """Qwen2-VL and later: two layers each, images of two by two tokens."""
    first = model == "qwen2_vl"
    text: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 48}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    text["rope_parameters"] = {"mrope_section": (2, 3, 3)}
    vision: dict[str, Any] = {"depth": 2, "num_heads": 2, "patch_size": 8}
    vision["embed_dim" if first else "hidden_size"] = 24
    vision["hidden_size" if first else "out_hidden_size"] = WIDTH
    vision |= {"mlp_ratio": 2} if first else {"intermediate_size": 40}
    if model == "qwen2_5_vl":
        vision |= {"window_size": 16, "fullatt_block_indexes": (1,)}
    if model == "qwen3_vl":
        text |= {"head_dim": 16, "rope_parameters": {"mrope_section": (4, 2, 2)}}
        vision |= {"num_position_embeddings": 9, "deepstack_visual_indexes": (0,)}
    marks = {"vision_start_token_id": 3, "vision_end_token_id": 4}
    return {"image_size": 32, **marks, "vision_config": vision, "text_config": text}


def _flamingo() -> dict[str, Any]:
    return {
        "media_token_id": 7,
        "perceiver_config": {"num_latents": 4, "depth": 1},
        "vision_config": {
            "width": WIDTH,
            "layers": 1,
            "heads": 2,
            "mlp_ratio": 1.5,
            "image_size": 28,
            "embed_dim": 16,
        },
        # Two layers: the features are the input of the last.
        "text_config": {
            "vocab_size": VOCAB,
            "d_model": WIDTH,
            "n_heads": 2,
            "n_layers": 2,
            "mlp_ratio": 2,
        },
    }


def _moondream() -> dict[str, Any]:
    tower = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2}
    tower |= {"intermediate_size": 48}
    return {
        "vision_config": {**tower, "image_size": 28, "projection_dim": 48},
        "text_config": {**tower, "vocab_size": VOCAB},
    }


def _uform() -> dict[str, Any]:
    return {
        "image_size": 28,
        "image_encoder_hidden_size": WIDTH,
        "image_encoder_num_layers": 1,
        "image_encoder_num_heads": 2,
        "image_encoder_embedding_dim": 8,
        "image_pooler_num_attn_heads": 2,
        "image_pooler_intermediate_size": 48,
        "image_pooler_num_latents": 4,
        "text_config": {
            "vocab_size": VOCAB,
            "hidden_size": WIDTH,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 48,
        },
    }


def _ofa() -> dict[str, Any]:
    sizes = {"layers": 1, "attention_heads": 2, "ffn_dim": 48}
    return {
        "vocab_size": VOCAB,
        "d_model": WIDTH,
        "resnet_type": "resnet18",
        "stem": 4,
        "image_size": 32,
        "image_bucket_size": 3,
        "max_position_embeddings": 64,
        "token_bucket_size": 8,
        **{f"encoder_{key}": value for key, value in sizes.items()},
        **{f"decoder_{key}": value for key, value in sizes.items()},
    }


_CLIP = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,  # of which the last is not read
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "patch_size": 16,
    "image_size": 32,
}


def _llava() -> dict[str, Any]:
    text = {"vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 48}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2}
    return {"vision_config": _CLIP, "text_config": {**text, **layers}}


def _llava_mpt() -> dict[str, Any]:
    text = {"vocab_size": VOCAB, "d_model": WIDTH, "n_layers": 1, "n_heads": 2}
    return {"vision_config": _CLIP, **text}


def _smolvlm() -> dict[str, Any]:
    tower = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2}
    tower |= {"intermediate_size": 48}
    shared = {"num_key_value_heads": 1, "head_dim": 16, "vocab_size": VOCAB}
    return {
        "scale_factor": 2,
        "vision_config": {**tower, "patch_size": 8, "image_size": 32},
        "text_config": {**tower, **shared},
    }


def _paligemma(**text: Any) -> dict[str, Any]:
    vision = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2}
    common = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    return {
        "hidden_size": WIDTH,
        "projection_dim": WIDTH,
        "vision_config": {**vision, "intermediate_size": 48, "image_size": 28},
        "text_config": {
            **common,
            "vocab_size": VOCAB,
            "hidden_size": WIDTH,
            "num_hidden_layers": 1,
            "intermediate_size": 48,
            **text,
        },
    }


def _prismatic(**more: Any) -> dict[str, Any]:
    # Two layers each: the features are the output of the first.
    tower = {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28}
    text = {"vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 48}
    return {
        "featurizer": {**tower, "hidden_size": WIDTH, "intermediate_size": 48},
        "fused_featurizer": {**tower, "hidden_size": 24, "intermediate_size": 40},
        "text_config": {**text, "num_hidden_layers": 1, "num_attention_heads": 2},
        **more,
    }


# backbone -> overrides of its released architecture
ARCHS: dict[str, dict[str, Any]] = {
    "flamingo": _flamingo(),
    "kosmos2": _kosmos2(),
    "qwen_vl": _qwen_vl(),
    "qwen2_vl": _qwen("qwen2_vl"),
    "qwen2_5_vl": _qwen("qwen2_5_vl"),
    "qwen3_vl": _qwen("qwen3_vl"),
    "moondream": _moondream(),
    "uform": _uform(),
    "ofa": _ofa(),
    "llava": _llava(),
    "llava_mpt": _llava_mpt(),
    "smolvlm": _smolvlm(),
    "prismatic": _prismatic(),
    "paligemma": _paligemma(),
    # A local layer that does not reach over a step, and one that does.
    "paligemma2": _paligemma(num_hidden_layers=2, query_pre_attn_scalar=16, sliding_window=8),
}


def get_config(argument: str = "kosmos2") -> Any:
    """BACKBONE, or BACKBONE:DATA with the dataset's folder."""
    backbone, _, data = argument.partition(":")
    c = quickstart.get_config(data) if data else quickstart.get_config()
    c.model.backbone = {"name": backbone, "hf_dir": "", "arch": ARCHS[backbone]}
    c.optim.update({"muon": (), "rates": ()})
    return c
