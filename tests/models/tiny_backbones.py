"""A very small architecture of every backbone: overrides of its released one."""

from typing import Any

from configs import quickstart

WIDTH, VOCAB = 32, 128


def _kosmos2() -> dict[str, Any]:
    arch = quickstart.get_config().model.backbone.arch.to_dict()
    vision = {"hidden_size": WIDTH, "intermediate_size": 48, "image_size": 32}
    text = {"embed_dim": WIDTH, "ffn_dim": 48, "layers": 1, "attention_heads": 2}
    arch["vision_config"].update(vision)
    arch["text_config"].update({**text, "vocab_size": VOCAB})
    return arch


# backbone -> overrides
ARCHS: dict[str, dict[str, Any]] = {
    "kosmos2": _kosmos2(),
}
