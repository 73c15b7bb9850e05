"""pi0.5 on a Franka as openpi's `pi05_droid`: joint velocities, state in the prompt, H = 15.

python launch/convert.py import-openpi PI05_DROID runs/pi05_droid --config=configs/pi05_droid.py \
    --tokenizer=PALIGEMMA
python launch/train.py --config=configs/pi05_droid.py:SPEC:DATA --workdir=runs/my_droid \
    --init=runs/pi05_droid

PI05_DROID: openpi's checkpoint. SPEC:DATA: your dataset of 7 joint velocities and a gripper, with
7 joint positions and the gripper as its state, see docs/your_dataset.md; fine-tuning is openpi's
`pi05_droid_finetune`: batch 32, 20k steps. PALIGEMMA as in configs/pi0_libero.py.
Hardware: as configs/pi05_libero.py. Not trained here.
"""

from typing import Any

from vla_jax.configs import pi05_libero


def get_config(argument: str = "droid:data/droid/1.0.0") -> Any:
    """SPEC:DATA, a dataset's standardization and its folder."""
    spec, _, data = argument.partition(":")
    c = pi05_libero.get_config()
    c.data.datasets = ({"spec": spec, "dir": data or f"data/{spec}/1.0.0"},)
    c.model.action_dim = 8
    c.model.structure.update({"chunk": 15, "proprio": 8, "text_len": 200})
    c.model.expert.prompt = "pi05"
    c.optim.update({"learning_rate": 2.5e-5, "schedule": "half_cosine", "warmup_steps": 1000})
    c.optim.ema_decay = 0.99
    c.train.update({"steps": 20000, "batch_size": 32})
    return c
