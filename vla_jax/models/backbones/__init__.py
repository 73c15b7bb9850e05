"""The backbones: one file each, one line here."""

from vla_jax.models.backbones import (
    flamingo,
    kosmos2,
    llava,
    llava_mpt,
    moondream,
    ofa,
    paligemma,
    paligemma2,
    qwen2_5_vl,
    qwen2_vl,
    qwen3_vl,
    qwen_vl,
    uform,
)
from vla_jax.models.backbones.qwen_family import Qwen2VL

# name -> (file, what makes its Linen module)
BACKBONES = {
    "flamingo": (flamingo, flamingo.Flamingo),
    "kosmos2": (kosmos2, kosmos2.Kosmos2),
    "llava": (llava, llava.build),
    "llava_mpt": (llava_mpt, llava_mpt.build),
    "moondream": (moondream, moondream.Moondream),
    "ofa": (ofa, ofa.OFA),
    "paligemma": (paligemma, paligemma.PaliGemma),
    "paligemma2": (paligemma2, paligemma.PaliGemma),
    "qwen_vl": (qwen_vl, qwen_vl.QwenVL),
    "qwen2_vl": (qwen2_vl, Qwen2VL),
    "qwen2_5_vl": (qwen2_5_vl, Qwen2VL),
    "qwen3_vl": (qwen3_vl, Qwen2VL),
    "uform": (uform, uform.UForm),
}
