"""Qwen3-VL-2B, policy head, LSTM, W = 16, F = 10, two cameras on CALVIN.

python launch/train.py --config=configs/qwen3_vl_ph.py:DATA --workdir=runs/qwen3_vl_ph \
    --config.model.backbone.hf_dir=QWEN

DATA as in configs/kosmos_ph.py. QWEN: the files of Qwen/Qwen3-VL-2B-Instruct, or of the 4B or 8B
model.
Hardware: 2.1 B parameters, full fine-tune; 51 tokens a camera at 224 pixels. Memory not measured.
The original has no such model: there is no score to compare with.
"""

from typing import Any

from vla_jax.configs import qwen2_vl_ph


def get_config(data: str = "data/calvin_abcd/1.0.0") -> Any:
    """The argument after the colon is the dataset's folder."""
    c = qwen2_vl_ph.get_config(data)
    c.model.backbone.name = "qwen3_vl"
    return c
