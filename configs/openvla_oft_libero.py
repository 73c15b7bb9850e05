"""OpenVLA-OFT on LIBERO's four suites: two cameras, the state, chunks of 8, L1, LoRA.

python launch/convert.py import-openvla OFT runs/oft --config=configs/openvla_oft_libero.py
python launch/serve.py --checkpoint=runs/oft --dataset=libero_spatial_no_noops

OFT: folder of moojink/openvla-7b-oft-finetuned-libero-*. To train your own from openvla-7b, import
it by configs/openvla_libero.py to runs/openvla_7b; head and state token start at random:

python launch/train.py --config=configs/openvla_oft_libero.py:DATA --workdir=runs/openvla_oft \
    --init=runs/openvla_7b

The published recipe: rate 5e-4, a tenth of it after 100k of 150k steps, batch 8 on each of 8 GPUs.
Hardware: 7.5 B parameters in bfloat16, 0.28 B that train: by `launch/plan.py --topology=h100:8` at
least 4.1 GiB a GPU and 0.21 s a step at its peak. Not trained here.
"""

from typing import Any

from vla_jax.configs import openvla_libero


def get_config(data: str = "data/libero") -> Any:
    """The argument after the colon is the folder that holds the suites."""
    c = openvla_libero.get_config(data)
    c.data.units = "oft_quantile"
    c.model.structure.update({"kind": "parallel", "chunk": 8, "proprio": 8})
    c.model.structure.cameras = ("primary", "wrist")
    c.model.head.update({"kind": "l1", "hidden": 4096, "layers": 2})
    c.optim.update({"schedule": "drop", "drop_at": 100000, "min_scale": 0.1})
    c.train.update({"steps": 150000, "batch_size": 64, "save_every": 10000, "eval_every": 10000})
    return c
