"""OFA-base, policy head, LSTM, W = 16, F = 10, two cameras on CALVIN.

python launch/train.py --config=configs/ofa_ph.py:DATA --workdir=runs/ofa_ph \
    --config.model.backbone.hf_dir=OFA

DATA: as for kosmos_ph.py. OFA: the files of OFA-Sys/OFA-base, or of another size; then set
--config.model.backbone.arch.image_size too (tiny, medium: 256; large, huge: 480).
Hardware: 0.2 B parameters, full fine-tune; not measured. A camera is 576 tokens at 384 pixels, 196
at 224, which the model takes as well.
Published by the original: nothing, RoboVLMs has no OFA. Not trained here yet.
"""

from typing import Any

from vla_jax.configs import kosmos_ph


def get_config(data: str = "data/calvin_abcd/1.0.0") -> Any:
    """The argument after the colon is the dataset's folder."""
    c = kosmos_ph.get_config(data)
    c.model.backbone.name = "ofa"
    c.model.backbone.arch.image_size = 384
    return c
