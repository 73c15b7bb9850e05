"""UForm-Gen2, policy head, LSTM, W = 8, F = 10 on CALVIN: RoboVLMs' uform_calvin.

python launch/train.py --config=configs/uform_ph.py:DATA --workdir=runs/uform_ph \
    --config.model.backbone.hf_dir=UFORM

DATA: CALVIN in RLDS, as for configs/kosmos_ph.py. UFORM: the files of
unum-cloud/uform-gen2-qwen-500m (or of the first generation, whose text decoder is Llama).
Hardware: 1.2 B parameters, full fine-tune. Not run.
"""

from typing import Any

from vla_jax.configs import kosmos_ph


def get_config(data: str = "data/calvin_abcd/1.0.0") -> Any:
    """The argument after the colon is the dataset's folder."""
    c = kosmos_ph.get_config(data)
    c.model.backbone.name = "uform"
    # No action token: the features are the largest values over all tokens of a step.
    c.model.structure.update({"window": 8, "cameras": ("primary",), "readout": "all"})
    c.model.head.down_sample = "pooling"
    c.augment.shift = {"primary": 10}
    return c
