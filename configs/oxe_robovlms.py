"""As configs/oxe.py, with what RoboVLMs' own loader does to Open X-Embodiment, mistakes included.

python launch/train.py --config=configs/oxe_robovlms.py:MIX:ROOT --workdir=runs/oxe_robovlms \
    --config.model.backbone.hf_dir=KOSMOS

To compare with the original's numbers, not to train anything new. vla_jax/data/oxe/quirks.py says
what is different, and why.
"""

from typing import Any

from vla_jax.configs import oxe
from vla_jax.data.oxe.quirks import QUIRKS


def get_config(argument: str = "bridge:data/oxe") -> Any:
    """MIX:ROOT, see configs/oxe.py."""
    c = oxe.get_config(argument)
    for quirk in QUIRKS:
        c.update_from_flattened_dict(quirk.parity)
    # Its windows have all their frames (organize_type = "interleave").
    c.data.parity.left_pad = False
    return c
