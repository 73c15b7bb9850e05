"""The backbones: one file each, one line here."""

from vla_jax.models.backbones.base import Backbone
from vla_jax.models.backbones.flamingo import Flamingo
from vla_jax.models.backbones.kosmos2 import Kosmos2
from vla_jax.models.backbones.llava import Llava
from vla_jax.models.backbones.llava_mpt import LlavaMPT
from vla_jax.models.backbones.moondream import Moondream
from vla_jax.models.backbones.ofa import OFA
from vla_jax.models.backbones.paligemma import PaliGemma
from vla_jax.models.backbones.paligemma2 import PaliGemma2
from vla_jax.models.backbones.prismatic import Prismatic
from vla_jax.models.backbones.qwen2_5_vl import Qwen25VL
from vla_jax.models.backbones.qwen2_vl import Qwen2VL
from vla_jax.models.backbones.qwen3_vl import Qwen3VL
from vla_jax.models.backbones.qwen_vl import QwenVL
from vla_jax.models.backbones.smolvlm import SmolVLM
from vla_jax.models.backbones.uform import UForm

BACKBONES: dict[str, type[Backbone]] = {
    "flamingo": Flamingo,
    "kosmos2": Kosmos2,
    "llava": Llava,
    "llava_mpt": LlavaMPT,
    "moondream": Moondream,
    "ofa": OFA,
    "paligemma": PaliGemma,
    "paligemma2": PaliGemma2,
    "prismatic": Prismatic,
    "qwen_vl": QwenVL,
    "qwen2_vl": Qwen2VL,
    "qwen2_5_vl": Qwen25VL,
    "qwen3_vl": Qwen3VL,
    "smolvlm": SmolVLM,
    "uform": UForm,
}
