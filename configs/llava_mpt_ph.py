"""LLaVA on MPT-7B, policy head, LSTM, W = 8, F = 10, one camera on CALVIN: RoboVLMs' LLaVA.

python launch/train.py --config=configs/llava_mpt_ph.py:DATA --workdir=runs/llava_mpt_ph \
    --config.model.backbone.hf_dir=LLAVA_MPT

DATA as in configs/kosmos_ph.py. LLAVA_MPT: liuhaotian/LLaVA-Lightning-MPT-7B-preview as
safetensors, its image tower (openai/clip-vit-large-patch14) under
`transformer.vision_tower.vision_tower.` among them. An image is 256 tokens (224 pixels).
Hardware: 7.0 B parameters, of which the image tower (0.3 B) and the token table stay as they are.
Not measured.
"""

from typing import Any

from vla_jax.configs import llava_ph


def get_config(data: str = "data/calvin_abcd/1.0.0") -> Any:
    """The argument after the colon is the dataset's folder."""
    c = llava_ph.get_config(data)
    c.model.backbone.name = "llava_mpt"
    return c
