"""Qwen2-VL-2B, policy head, LSTM, W = 16, F = 10, two cameras on CALVIN.

python launch/train.py --config=configs/qwen2_vl_ph.py:DATA --workdir=runs/qwen2_vl_ph \
    --config.model.backbone.hf_dir=QWEN

DATA as in configs/kosmos_ph.py. QWEN: the files of Qwen/Qwen2-VL-2B-Instruct, or of the 7B model.
Hardware: 2.2 B parameters, full fine-tune; 66 tokens a camera at 224 pixels. Memory not measured.
The original has no such model: there is no score to compare with.
"""

from typing import Any

from vla_jax.configs import kosmos_ph
from vla_jax.models.backbones.qwen_family import ASKED


def get_config(data: str = "data/calvin_abcd/1.0.0") -> Any:
    """The argument after the colon is the dataset's folder."""
    c = kosmos_ph.get_config(data)
    c.model.backbone.name = "qwen2_vl"
    c.data.cotrain.prompt = ASKED
    return c
