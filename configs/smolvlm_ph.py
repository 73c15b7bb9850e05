"""SmolVLM2-500M, policy head, LSTM, W = 16, F = 10, two cameras on CALVIN.

python launch/train.py --config=configs/smolvlm_ph.py:DATA --workdir=runs/smolvlm_ph \
    --config.model.backbone.hf_dir=SMOLVLM

DATA as in configs/kosmos_ph.py. SMOLVLM: the files of HuggingFaceTB/SmolVLM2-500M-Video-Instruct.
Hardware: 0.5 B parameters, full fine-tune; 64 tokens a camera at 512 pixels. Memory not measured.
The original has no such model: there is no score to compare with.
"""

from typing import Any

from vla_jax.configs import kosmos_ph
from vla_jax.models.backbones.smolvlm import ASKED


def get_config(data: str = "data/calvin_abcd/1.0.0") -> Any:
    """The argument after the colon is the dataset's folder."""
    c = kosmos_ph.get_config(data)
    c.model.backbone.name = "smolvlm"
    c.data.cotrain.prompt = ASKED
    return c
