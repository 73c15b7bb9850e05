"""PaliGemma 2, policy head, LSTM: configs/paligemma_ph.py with the later VLM.

python launch/train.py --config=configs/paligemma2_ph.py:DATA --workdir=runs/paligemma2_ph \
    --config.model.backbone.hf_dir=PALIGEMMA2

DATA as in configs/kosmos_ph.py. PALIGEMMA2: the files of google/paligemma2-3b-pt-224; those of the
larger ones work as well. Attention scores are not capped, as in RoboVLMs;
--config.model.backbone.arch.attention_cap=True caps them as in Gemma 2.
Hardware: 3.1 B parameters, as configs/paligemma_ph.py. Not trained here.
"""

from typing import Any

from vla_jax.configs import paligemma_ph


def get_config(data: str = "data/calvin_abcd/1.0.0") -> Any:
    """The argument after the colon is the dataset's folder."""
    c = paligemma_ph.get_config(data)
    c.model.backbone.name = "paligemma2"
    c.model.backbone.arch.attention_cap = False
    return c
