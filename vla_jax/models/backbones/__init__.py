"""The backbones: one file each, one line here."""

from vla_jax.models.backbones import flamingo, kosmos2, qwen2_5_vl, qwen2_vl, qwen3_vl, qwen_vl
from vla_jax.models.backbones.qwen_family import Qwen2VL

# name -> (file, its Linen module)
BACKBONES = {
    "flamingo": (flamingo, flamingo.Flamingo),
    "kosmos2": (kosmos2, kosmos2.Kosmos2),
    "qwen_vl": (qwen_vl, qwen_vl.QwenVL),
    "qwen2_vl": (qwen2_vl, Qwen2VL),
    "qwen2_5_vl": (qwen2_5_vl, Qwen2VL),
    "qwen3_vl": (qwen3_vl, Qwen2VL),
}
