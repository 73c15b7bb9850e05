"""Kosmos-2, interleaved, MLP head, W = 8, F = 10, two cameras on CALVIN: history in the VLM.

python launch/train.py --config=configs/kosmos_interleaved.py:DATA \
    --workdir=runs/kosmos_interleaved --config.model.backbone.hf_dir=KOSMOS

DATA and KOSMOS as in configs/kosmos_ph.py.
Hardware: 1.67 B parameters, full fine-tune. A window is one sequence of 8 x (128 + 33) tokens, and
every control step runs all of it again, for its positions move with the window.
"""

from typing import Any

from vla_jax.configs import kosmos_ph


def get_config(data: str = "data/calvin_abcd/1.0.0") -> Any:
    """The argument after the colon is the dataset's folder."""
    c = kosmos_ph.get_config(data)
    c.model.structure.update({"kind": "interleaved", "window": 8})
    c.model.head.kind = "mlp"
    return c
