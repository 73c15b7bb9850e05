"""Your own dataset, a tiny Kosmos-2 with the LSTM head, from scratch: is all wired?

python launch/train.py --config=configs/first_run.py:SPEC:DIR --workdir=runs/first_run

SPEC: as launch/inspect_data.py --write-spec prints it, FILE.py:NAME, or a name of the registry.
DIR: the dataset's folder. Actions, cameras and the gripper are the dataset's; it learns little in
these few minutes. To learn in earnest go on with configs/finetune.py.
"""

from typing import Any

from vla_jax.configs import finetune, quickstart


def get_config(argument: str = "my_robot.py:my_robot:data/my_robot") -> Any:
    """SPEC:DIR."""
    c = quickstart.get_config()
    c.data.datasets = (finetune.dataset(argument),)
    # 1 % and 99 % quantiles to -1 and 1: suits joints as well as motions, in whatever units.
    c.data.normalization = "q99"
    c.model.structure.text_len = 48
    c.train.update({"steps": 100, "batch_size": 16, "eval_batches": 10, "save_every": 100})
    return c
