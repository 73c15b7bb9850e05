"""Your own dataset on a pretrained VLM with LoRA: Kosmos-2, policy head, LSTM.

python launch/convert.py import-hf KOSMOS runs/kosmos2
python launch/train.py --config=configs/finetune.py:SPEC:DIR --init=runs/kosmos2 --workdir=runs/mine

SPEC: as launch/inspect_data.py --write-spec prints it, FILE.py:NAME, or a name of the registry.
DIR: the dataset's folder. KOSMOS: the files of microsoft/kosmos-2-patch14-224; another VLM or
another checkpoint: --config.model.backbone.name=paligemma, with --init of one. Actions, cameras and
the gripper are the dataset's. Not run on a whole dataset yet.
"""

from typing import Any

from vla_jax.config import ConfigError
from vla_jax.configs import base


def dataset(argument: str) -> dict[str, Any]:
    """The entry of `data.datasets` that SPEC:DIR names.

    Args:
        argument: FILE.py:NAME:DIR, or NAME:DIR with a name of the registry; DIR may be a URL.

    Raises:
        ConfigError: there is no folder in it.
    """
    parts = argument.split(":")
    words = 2 if parts[0].endswith(".py") else 1  # of the spec
    spec, folder = ":".join(parts[:words]), ":".join(parts[words:])
    if not folder:
        raise ConfigError(
            f"name the spec and the dataset's folder, CONFIG:FILE.py:NAME:DIR; {argument!r} has no "
            "folder"
        )
    return {"spec": spec, "dir": folder, "weight": 1.0}


def get_config(argument: str = "my_robot.py:my_robot:data/my_robot") -> Any:
    """SPEC:DIR."""
    c = base.get_config()
    c.data.datasets = (dataset(argument),)
    # 1 % and 99 % quantiles to -1 and 1: suits joints as well as motions, in whatever units.
    c.data.update({"normalization": "q99", "clip": 1.0})
    # The VLM stays as it is but for the factors; the head and the action token train whole.
    c.lora.update({"rank": 16, "alpha": 32.0})
    c.model.structure.update({"window": 8, "text_len": 48})
    c.augment.shift = {"primary": 10, "secondary": 10, "wrist": 4}
    c.optim.update({"learning_rate": 2e-4, "schedule": "cosine", "warmup_steps": 500})
    c.train.update({"steps": 20000, "batch_size": 32, "save_every": 2000, "eval_every": 2000})
    return c
