"""OpenVLA fine-tuned on LIBERO's four suites: one camera, one action, seven tokens, LoRA.

python launch/convert.py import-openvla OPENVLA_7B runs/openvla_7b --config=openvla_libero
python launch/train.py --config=configs/openvla_libero.py:DATA --workdir=runs/openvla_libero \
    --init=runs/openvla_7b

DATA: as in configs/pi0_libero.py. OPENVLA_7B: folder of openvla/openvla-7b.
The published fine-tuning: LoRA of rank 32 on all linear layers, towers too, rate 5e-4, batch 16.
Hardware: 7.5 B parameters in bfloat16, 0.1 B of LoRA that train: 17 GB before activations. Not
trained here.
"""

from typing import Any

from vla_jax.configs import base, pi0_libero


def get_config(data: str = "data/libero") -> Any:
    """The argument after the colon is the folder that holds the suites."""
    c = base.get_config()
    suites = pi0_libero.SUITES
    c.data.datasets = tuple({"spec": name, "dir": f"{data}/{name}/1.0.0"} for name in suites)
    c.data.units = "openvla_quantile"
    # Trained on random crops of nine tenths of TensorFlow's resized images, it acts by the center.
    arch = {"image_filter": "lanczos3", "image_crop": 0.9}
    c.model.backbone = {"name": "prismatic", "hf_dir": "", "arch": arch}
    c.model.structure.update({"kind": "discrete", "window": 1, "chunk": 1, "text_len": 64})
    c.model.structure.cameras = ("primary",)
    c.model.action_dim = 7
    c.model.head.update({"kind": "detokenizer", "gripper": "number"})
    c.model.dropout = False
    c.augment.update({"shift": {}, "crop_scale": 0.9, "brightness": 0.2, "contrast": 0.2})
    c.augment.update({"saturation": 0.2, "hue": 0.05})
    # All linear layers but SigLIP's head, which nothing reads; patches are convolutions there.
    c.lora.update({"rank": 32, "alpha": 16.0})
    c.lora.targets = (r"^backbone/(?!vision/pool/|.*/patch/|.*/film_).*kernel$",)
    c.optim.update({"learning_rate": 5e-4, "warmup_steps": 0, "weight_decay": 0.01})
    c.optim.clip_norm = 0.0
    c.train.update({"steps": 50000, "batch_size": 16, "save_every": 5000, "eval_every": 5000})
    return c
