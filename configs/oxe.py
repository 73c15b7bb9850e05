"""Kosmos-2, policy head, on a mixture of Open X-Embodiment, from the primary camera.

python launch/train.py --config=configs/oxe.py:MIX:ROOT --workdir=runs/oxe \
    --config.model.backbone.hf_dir=KOSMOS

MIX: bridge, rt_1, bridge_rt_1, rtx, rtx_franka, oxe_magic_soup, oxe_magic_soup_plus,
oxe_magic_soup_plus_minus, or any single dataset; MIX:ROOT:octo takes octo's mixtures and rules.
ROOT: holds NAME/VERSION of every dataset, as downloaded. Datasets whose actions are not a hand's
(joints, wheels) are left out and named. KOSMOS: the files of microsoft/kosmos-2-patch14-224.
Hardware: as configs/kosmos_ph.py with half the images. Not run on the whole of these data yet.
"""

import re
from typing import Any

from vla_jax.configs import kosmos_ph
from vla_jax.data.oxe.folders import mixture_entries


def get_config(argument: str = "bridge:data/oxe") -> Any:
    """MIX:ROOT or MIX:ROOT:VARIANT."""
    mixture, _, remaining = argument.partition(":")
    # ROOT may be a URL, whose own colons are followed by slashes.
    matched = re.fullmatch(r"(.*?)(?::(\w*))?", remaining)
    root, variant = matched.groups() if matched else (remaining, "")
    variant = variant or "openvla"
    if variant not in ("openvla", "octo"):
        raise ValueError(f"the variant is openvla or octo, not {variant!r} (of {argument!r})")
    c = kosmos_ph.get_config()
    c.data.datasets = mixture_entries(mixture, root or "data/oxe", variant)
    c.data.parity.variant = variant
    c.data.update({"normalization": "q99", "clip": 1.0, "val_split": "val"})
    c.model.structure.cameras = ("primary",)
    # Openvla's augmentation, which RoboVLMs took over.
    c.augment.shift = {}
    c.augment.update({"crop_scale": 0.9, "brightness": 0.2, "contrast": 0.2, "saturation": 0.2})
    c.augment.update({"hue": 0.05, "per_frame": False})
    return c
