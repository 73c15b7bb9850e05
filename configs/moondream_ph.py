"""Moondream2, policy head, LSTM, W = 8, F = 10 on CALVIN: RoboVLMs' moondream_calvin.

python launch/train.py --config=configs/moondream_ph.py:DATA --workdir=runs/moondream_ph \
    --config.model.backbone.hf_dir=MOONDREAM

DATA: CALVIN in RLDS, as for configs/kosmos_ph.py. MOONDREAM: the files of vikhyatk/moondream2 at
one of the revisions of 2024 (5f520ae: one stream of features; 22565c0: two) or later.
Hardware: 2.1 B parameters, full fine-tune. Not run. A camera of 512 pixels or more may be seen in
tiles, which costs up to five times the vision tower; resize such images when writing the data.
"""

from typing import Any

from vla_jax.configs import kosmos_ph


def get_config(data: str = "data/calvin_abcd/1.0.0") -> Any:
    """The argument after the colon is the dataset's folder."""
    c = kosmos_ph.get_config(data)
    c.model.backbone.name = "moondream"
    c.model.structure.update({"window": 8, "cameras": ("primary",)})
    # 729 tokens an image: a Perceiver makes 64 of them.
    c.model.structure.resampler = 64
    c.augment.shift = {"primary": 10}
    return c
