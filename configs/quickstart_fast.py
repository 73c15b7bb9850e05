"""A tiny pi0-FAST on the tabletop world, from scratch: PaliGemma writes the chunk as FAST tokens.

python launch/fit_fast.py --config=configs/quickstart_fast.py --out=runs/quickstart/fast --vocab=256
python launch/train.py --config=configs/quickstart_fast.py --workdir=runs/quickstart_fast \
    --config.model.fast.dir=runs/quickstart/fast

Needs the demonstrations of launch/record_demos.py, as configs/quickstart.py does. Two CPU cores;
82 % of 130 unseen scenes.
"""

from typing import Any

from vla_jax.configs import quickstart_expert


def get_config(data: str = "runs/quickstart/data/tabletop/1.0.0") -> Any:
    """The argument after the colon is the dataset's folder."""
    c = quickstart_expert.get_config(data)
    # Words, then the FAST tokens.
    c.model.backbone.arch["text_config"]["vocab_size"] = 384
    c.model.structure.kind = "discrete"
    c.model.head.kind = "fast"
    c.model.fast.update({"prompt": "pi0", "length": 32, "images": "backbone"})
    matrices = r"^backbone/.*kernel$"
    c.optim.update({"muon": (matrices,), "rates": ((matrices, 4.0),)})
    c.train.steps = 2500
    return c
