"""SmolVLA on your LeRobot dataset: SmolVLM2's first 16 layers, an expert that crosses every second.

python launch/convert.py import-lerobot SMOLVLA runs/smolvla_base --config=configs/smolvla.py \
    --tokenizer=SMOLVLM --statistics=STATS
python launch/train.py --config=configs/smolvla.py:SPEC:DATA --workdir=runs/smolvla \
    --init=runs/smolvla_base

SMOLVLA: LeRobot's folder. SMOLVLM: the files of HuggingFaceTB/SmolVLM2-500M-Video-Instruct. STATS:
meta/stats.json of the dataset SMOLVLA was trained on. SPEC:DATA: your dataset, see
docs/your_dataset.md; its numbers of state and action go into the two lines that say 6.
LeRobot's recipe: the VLM stays as it is, the expert trains, 30k steps at batch 64.
Hardware: 0.45 B parameters, of which 0.1 B train. Not trained here.
"""

from typing import Any

from vla_jax.configs import base


def get_config(argument: str = "my_robot:data/my_robot") -> Any:
    """SPEC:DATA, a dataset's standardization and its folder."""
    spec, _, data = argument.partition(":")
    c = base.get_config()
    c.data.datasets = ({"spec": spec, "dir": data or f"data/{spec}"},)
    c.data.units = "lerobot_zscore"
    # The base of the rotary positions is fixed in SmolVLA's code, whatever SmolVLM's config says.
    text = {"num_hidden_layers": 16, "rope_theta": 10000.0}
    c.model.backbone = {"name": "smolvlm", "hf_dir": "", "arch": {"text_config": text}}
    c.model.structure.update({"kind": "expert", "window": 1, "chunk": 50, "text_len": 48})
    c.model.structure.update({"cameras": ("primary", "wrist"), "proprio": 6})
    c.model.action_dim = 6
    c.model.head.kind = "expert_flow"
    c.model.expert.update({"width": 720, "hidden": 2048, "adaptive": False, "joint_every": 2})
    c.model.expert.update({"causal": True, "state": "prefix", "scaled_prefix": True})
    c.model.expert.update({"prompt": "smolvla", "images": "lerobot", "loss": "real"})
    c.model.head.gripper = "number"
    c.model.dropout = False
    c.augment.shift = {}
    c.optim.update({"learning_rate": 1e-4, "schedule": "half_cosine", "min_scale": 0.025})
    c.optim.update({"warmup_steps": 1000, "warmup_from": "one", "b2": 0.95, "clip_norm": 10.0})
    c.optim.update({"weight_decay": 1e-10, "frozen": (r"^backbone/",)})
    c.train.update({"steps": 30000, "batch_size": 64, "save_every": 5000, "eval_every": 5000})
    return c
