"""Any backbone, very small, with the LSTM head on the tabletop world, from scratch.

python launch/demo.py --config=configs/tiny.py:kosmos2 --workdir=runs/kosmos2

The argument names the backbone. That everything is wired is what this shows: it trains, serves and
acts on two CPU cores; `python bench/backbones.py` runs all of them.
"""

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


# backbone -> overrides of its released architecture
ARCHS: dict[str, dict[str, Any]] = {
    "kosmos2": _kosmos2(),
    "llava": _llava(),
    "llava_mpt": _llava_mpt(),
}


def get_config(argument: str = "kosmos2") -> Any:
    """BACKBONE, or BACKBONE:DATA with the dataset's folder."""
    backbone, _, data = argument.partition(":")
    c = quickstart.get_config(data) if data else quickstart.get_config()
    c.model.backbone = {"name": backbone, "hf_dir": "", "arch": ARCHS[backbone]}
    c.optim.update({"muon": (), "rates": ()})
    return c
