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


# backbone -> overrides of its released architecture
ARCHS: dict[str, dict[str, Any]] = {
    "flamingo": _flamingo(),
    "kosmos2": _kosmos2(),
}


def get_config(argument: str = "kosmos2") -> Any:
    """BACKBONE, or BACKBONE:DATA with the dataset's folder."""
    backbone, _, data = argument.partition(":")
    c = quickstart.get_config(data) if data else quickstart.get_config()
    c.model.backbone = {"name": backbone, "hf_dir": "", "arch": ARCHS[backbone]}
    c.optim.update({"muon": (), "rates": ()})
    return c
