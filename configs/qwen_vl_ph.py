"""Qwen-VL, policy head, LSTM, W = 8, F = 10, one camera on CALVIN: RoboVLMs' setting for it.

python launch/train.py --config=configs/qwen_vl_ph.py:DATA --workdir=runs/qwen_vl_ph \
    --config.model.backbone.hf_dir=QWEN_VL

DATA as in configs/kosmos_ph.py. QWEN_VL: the files of Qwen/Qwen-VL.
Hardware: 9.7 B parameters; the 1.9 B of the vision tower stay frozen, the others take 124 GB with
gradient and moments over all chips, before activations. Not run.
The original publishes no score for it.
"""

from typing import Any

from vla_jax.configs import kosmos_ph


def get_config(data: str = "data/calvin_abcd/1.0.0") -> Any:
    """The argument after the colon is the dataset's folder."""
    c = kosmos_ph.get_config(data)
    c.model.backbone.name = "qwen_vl"
    # An image is 258 tokens, four times Kosmos-2's.
    c.model.structure.update({"window": 8, "cameras": ("primary",)})
    c.augment.shift = {"primary": 10}
    c.optim.frozen = ("^backbone/vision",)
    # The original: one window a GPU, four of them a step; here for eight GPUs.
    c.train.update({"batch_size": 32, "accumulate": 4})
    return c
