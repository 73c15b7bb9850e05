"""Kosmos-2, one step, MLP head, F = 10, two cameras on CALVIN: the baseline without history.

python launch/train.py --config=configs/kosmos_one_step.py:DATA --workdir=runs/kosmos_one_step \
    --config.model.backbone.hf_dir=KOSMOS

DATA and KOSMOS as in configs/kosmos_ph.py.
Hardware: 1.67 B parameters, full fine-tune; a window is one frame a camera, so a chip takes the
batch that kosmos_ph.py's takes times sixteen.
"""

from typing import Any

from vla_jax.configs import kosmos_ph


def get_config(data: str = "data/calvin_abcd/1.0.0") -> Any:
    """The argument after the colon is the dataset's folder."""
    c = kosmos_ph.get_config(data)
    c.model.structure.update({"kind": "one_step", "window": 1})
    c.model.head.kind = "mlp"
    return c
