"""A tiny Kosmos-2 with the LSTM head on the tabletop world, from scratch.

python launch/train.py --config=configs/quickstart.py --workdir=runs/quickstart

Needs the demonstrations of launch/record_demos.py; `make demo` does all of it.
"""

from typing import Any

from vla_jax.configs import base

# Few large patches: with flat colors and a still camera, where a block is can be read off the
# pixels by one linear map, which is quick to learn and quick to compute.
VISION = {
    "hidden_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 192,
    "patch_size": 16,
    "image_size": 32,
}


def get_config(data: str = "runs/quickstart/data/tabletop/1.0.0") -> Any:
    """The argument after the colon is the dataset's folder."""
    c = base.get_config()
    m = c.model
    m.backbone.arch = {
        "latent_query_num": 2,
        "vision_config": dict(VISION),
        "text_config": {
            "vocab_size": 128,
            "embed_dim": 64,
            "layers": 2,
            "attention_heads": 4,
            "ffn_dim": 128,
        },
    }
    # Two steps of history: whether the button is on its way down or up shows in no single frame.
    m.structure.update({"window": 2, "chunk": 4, "text_len": 18})
    m.head.update({"hidden": 128, "layers": 1})
    m.update({"dtype": "float32", "remat": "none", "dropout": False})
    c.data.datasets = ({"spec": "calvin", "dir": data, "weight": 1.0},)
    # Actions are in [-1, 1] as recorded.
    c.data.update({"normalization": "none", "threads": 1})
    c.optim.update({"learning_rate": 2e-3, "schedule": "half_cosine", "warmup_steps": 100})
    c.optim.update({"gripper_weight": 0.1, "b2": 0.99})
    # From scratch Muon needs about half of AdamW's samples; the head's wide output layers gain
    # little from it and would cost most.
    matrices = r"^backbone/.*kernel$|^head/layer0/.*kernel$"
    c.optim.update({"muon": (matrices,), "rates": ((matrices, 4.0),)})
    c.train.update({"steps": 2500, "batch_size": 64, "eval_every": 0, "save_every": 1000})
    return c
