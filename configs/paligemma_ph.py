"""PaliGemma, policy head, LSTM, W = 8, F = 10, one camera on CALVIN: RoboVLMs' setting for it.

python launch/train.py --config=configs/paligemma_ph.py:DATA --workdir=runs/paligemma_ph \
    --config.model.backbone.hf_dir=PALIGEMMA

DATA as in configs/kosmos_ph.py. PALIGEMMA: the files of google/paligemma-3b-pt-224.
Attention is causal, as RoboVLMs trains; --config.model.backbone.arch.mask=prefix is how PaliGemma
was pretrained: images and instruction see all of each other.
Hardware: 3.0 B parameters, full fine-tune: 47 GB of parameters, gradients and Adam's moments, to be
spread over the chips. Not trained here.
"""

from typing import Any

from vla_jax.configs import kosmos_ph


def get_config(data: str = "data/calvin_abcd/1.0.0") -> Any:
    """The argument after the colon is the dataset's folder."""
    c = kosmos_ph.get_config(data)
    c.model.backbone.name = "paligemma"
    c.model.backbone.arch.mask = "causal"
    c.model.structure.update({"window": 8, "cameras": ("primary",)})
    c.augment.shift = {"primary": 10}
    return c
