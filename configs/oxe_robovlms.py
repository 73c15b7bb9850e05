"""As configs/oxe.py, with what RoboVLMs' own loader does to Open X-Embodiment, mistakes included.

python launch/train.py --config=configs/oxe_robovlms.py:MIX:ROOT --workdir=runs/oxe_robovlms \
    --config.model.backbone.hf_dir=KOSMOS

To compare with the original's numbers, not to train anything new.
"""

from typing import Any

from configs import oxe


def get_config(argument: str = "bridge:data/oxe") -> Any:
    """MIX:ROOT, see configs/oxe.py."""
    c = oxe.get_config(argument)
    c.data.update({"clip": 0.65, "stats_split": "all", "gripper": "exact"})
    c.data.constant_to_zero = True
    c.augment.draws = "shared"
    return c
