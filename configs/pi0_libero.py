"""pi0 fine-tuned on LIBERO's four suites as openpi's `pi0_libero`: two cameras, H = 50.

python launch/convert.py import-openpi PI0_BASE runs/pi0_base --config=configs/pi0_libero.py \
    --tokenizer=PALIGEMMA
python launch/train.py --config=configs/pi0_libero.py:DATA --workdir=runs/pi0_libero \
    --init=runs/pi0_base

DATA: holds libero_spatial_no_noops, _object_, _goal_ and _10_, each with its version folder.
PI0_BASE: openpi's checkpoint (params/ or model.safetensors). PALIGEMMA: paligemma_tokenizer.model.
openpi's third camera is always masked here, and a masked camera changes nothing: it is left out.
Hardware: 3.2 B parameters, full fine-tune with an average: 65 GB before activations, to be spread
over the chips. Not trained here; its augmentation also turns images by 5 degrees, ours does not.
"""

from typing import Any

from vla_jax.configs import base

SUITES = tuple(f"libero_{name}_no_noops" for name in ("spatial", "object", "goal", "10"))


def get_config(data: str = "data/libero") -> Any:
    """The argument after the colon is the folder that holds the suites."""
    c = base.get_config()
    c.data.datasets = tuple({"spec": name, "dir": f"{data}/{name}/1.0.0"} for name in SUITES)
    # The actions are already relative: openpi subtracts the state once more, for old checkpoints.
    c.data.update({"units": "openpi_zscore", "relative": (6, -1)})
    c.model.backbone.update({"name": "paligemma"})
    c.model.structure.update(
        {"kind": "expert", "window": 1, "chunk": 50, "cameras": ("primary", "wrist")}
    )
    c.model.structure.update({"text_len": 48, "proprio": 8})
    c.model.head.kind = "expert_flow"
    c.model.expert.update({"adaptive": False, "state": "expert", "prompt": "pi0"})
    c.model.head.gripper = "number"
    c.model.dropout = False
    c.augment.shift = {}
    c.augment.update({"brightness": 0.3, "contrast": 0.4, "saturation": 0.5})
    c.optim.update({"learning_rate": 2.5e-5, "schedule": "half_cosine", "min_scale": 0.1})
    c.optim.update({"warmup_steps": 1000, "warmup_from": "one", "b2": 0.95})
    c.optim.update({"weight_decay": 1e-10, "ema_decay": 0.99, "ema_warmup": False})
    c.train.update({"steps": 30000, "batch_size": 32, "save_every": 1000, "eval_every": 5000})
    c.seed = 42
    return c
