"""The backbones: one file each, one line here."""

from importlib import import_module
from typing import Any

# name, and the file's -> what makes its Linen module
_MAKERS = {
    "flamingo": "Flamingo",
    "kosmos2": "Kosmos2",
    "llava": "build",
    "llava_mpt": "build",
    "moondream": "Moondream",
    "ofa": "OFA",
    "paligemma": "PaliGemma",
    "paligemma2": "PaliGemma",
    "qwen_vl": "QwenVL",
    "qwen2_vl": "Qwen2VL",
    "qwen2_5_vl": "Qwen2VL",
    "qwen3_vl": "Qwen2VL",
    "smolvlm": "SmolVLM",
    "uform": "UForm",
}
_FILES = {name: import_module(f"{__name__}.{name}") for name in _MAKERS}
# name -> (file, what makes its Linen module)
BACKBONES: dict[str, tuple[Any, Any]] = {
    name: (file, getattr(file, _MAKERS[name])) for name, file in _FILES.items()
}
