"""Kosmos-2, policy head, LSTM, W = 16, F = 10, two cameras on CALVIN: RoboVLMs' best model.

python launch/train.py --config=configs/kosmos_ph.py:DATA --workdir=runs/kosmos_ph \
    --config.model.backbone.hf_dir=KOSMOS

DATA: CALVIN in RLDS (features rgb_static, rgb_gripper, rel_actions or action, robot_obs,
language_instruction). KOSMOS: the files of microsoft/kosmos-2-patch14-224.
Hardware: 1.7 B parameters, full fine-tune. Compiled ahead of time (not run): 64 frames a chip take
9.4 GiB on each of 8 H100.
Published by the original: ABCD->D 4.49, ABC->D 4.25 average length. Not reproduced here yet.
"""

from typing import Any

from vla_jax.configs import base


def get_config(data: str = "data/calvin_abcd/1.0.0") -> Any:
    """The argument after the colon is the dataset's folder."""
    c = base.get_config()
    c.data.datasets = ({"spec": "calvin", "dir": data, "weight": 1.0},)
    # Relative actions are in [-1, 1]; the original clips them to +-0.65 and stretches.
    c.data.update({"normalization": "none", "clip": 0.65})
    c.augment.shift = {"primary": 10, "wrist": 4}
    c.augment.per_frame = True
    # The original trains without gradient clipping: its config key never reaches the trainer.
    c.optim.clip_norm = 0.0
    return c
