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


def _ofa() -> dict[str, Any]:
    sizes = {"layers": 1, "attention_heads": 2, "ffn_dim": 48}
    return {
        "vocab_size": VOCAB,
        "d_model": WIDTH,
        "resnet_type": "resnet18",
        "image_size": 32,
        "image_bucket_size": 3,
        "max_position_embeddings": 64,
        "token_bucket_size": 8,
        **{f"encoder_{key}": value for key, value in sizes.items()},
        **{f"decoder_{key}": value for key, value in sizes.items()},
    }


# backbone -> overrides of its released architecture
ARCHS: dict[str, dict[str, Any]] = {
    "kosmos2": _kosmos2(),
    "ofa": _ofa(),
}


def get_config(argument: str = "kosmos2") -> Any:
    """BACKBONE, or BACKBONE:DATA with the dataset's folder."""
    backbone, _, data = argument.partition(":")
    c = quickstart.get_config(data) if data else quickstart.get_config()
    c.model.backbone = {"name": backbone, "hf_dir": "", "arch": ARCHS[backbone]}
    c.optim.update({"muon": (), "rates": ()})
    return c
