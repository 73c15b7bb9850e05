"""LLaVA-1.5 (Vicuna-7B), policy head, LSTM, W = 8, F = 10, one camera on CALVIN.

python launch/train.py --config=configs/llava_ph.py:DATA --workdir=runs/llava_ph \
    --config.model.backbone.hf_dir=LLAVA

DATA as in configs/kosmos_ph.py. LLAVA: the files of llava-hf/llava-1.5-7b-hf, or safetensors and
config.json of liuhaotian/llava-v1.5-7b. An image is 576 tokens (336 pixels).
Hardware: 7.1 B parameters, of which the image tower (0.3 B) and the token table stay as they are,
as in RoboVLMs. Not measured.
Published by the original: nothing with Vicuna, which its code cannot run.
"""

from typing import Any

from vla_jax.configs import kosmos_ph


def get_config(data: str = "data/calvin_abcd/1.0.0") -> Any:
    """The argument after the colon is the dataset's folder."""
    c = kosmos_ph.get_config(data)
    c.model.backbone.name = "llava"
    c.model.structure.update({"window": 8, "cameras": ("primary",)})
    c.augment.shift = {"primary": 10}
    c.optim.frozen = ("^backbone/vision", "^backbone/text/embedding$")
    return c
