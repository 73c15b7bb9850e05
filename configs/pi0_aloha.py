"""pi0 on ALOHA as openpi's `pi0_aloha`: two arms, three cameras, relative joints, H = 50.

python launch/convert.py import-openpi PI0_BASE runs/pi0_base --config=configs/pi0_aloha.py \
    --tokenizer=PALIGEMMA --asset=trossen
python launch/train.py --config=configs/pi0_aloha.py:SPEC:DATA --workdir=runs/my_aloha \
    --init=runs/pi0_base

SPEC:DATA: your dataset, see docs/your_dataset.md, whose camera "primary" is cam_high, "wrist" the
left wrist's and "secondary" the right one's. PI0_BASE, PALIGEMMA as in configs/pi0_libero.py.
Hardware: as configs/pi0_libero.py. Not trained here.
"""

from typing import Any

from vla_jax.configs import pi0_libero


def get_config(argument: str = "aloha_static_dataset:data/aloha/1.0.0") -> Any:
    """SPEC:DATA, a dataset's standardization and its folder."""
    spec, _, data = argument.partition(":")
    c = pi0_libero.get_config()
    c.data.datasets = ({"spec": spec, "dir": data or f"data/{spec}/1.0.0"},)
    c.data.update({"relative": (6, -1, 6, -1), "robot": "aloha"})
    c.model.action_dim = 14
    c.model.structure.update({"cameras": ("primary", "wrist", "secondary"), "proprio": 14})
    c.train.steps = 20000
    return c
