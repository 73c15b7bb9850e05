"""What stands beside the weights in a Hugging Face folder: config, tokenizer, processor, card."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vla_jax.config import Config
from vla_jax.data.text import Tokenizer
from vla_jax.models import vla
from vla_jax.models.image import ImageSpec

# Files of the source folder that are the VLM's own and do not change with its weights.
_COPIED = (
    "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "*.model", "*.tiktoken", "chat_template*", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json", "generation_config.json", "*.py", "LICENSE*",
)  # fmt: skip
# PIL's number of each filter, as image processors store it.
_RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}


def copy_files(source: Path, folder: Path) -> list[str]:
    """Tokenizer, processor and code files of the source folder; returns their names."""
    names = []
    for path in sorted({p for pattern in _COPIED for p in source.glob(pattern)}):
        if path.is_file():
            shutil.copyfile(path, folder / path.name)
            names.append(path.name)
    return names


def config_json(arch: Mapping[str, Any], original: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The VLM's config.json.

    Args:
        arch: the architecture the weights have.
        original: config.json the model came with, {} if it is not known: transformers has defaults
            for what `arch` does not say.
        dtype: of the weights.
    """
    merged = _merge(original, arch)
    # "dtype" since transformers 5; both read the older name.
    merged.pop("dtype", None)
    return {**merged, "torch_dtype": dtype}


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        nested = isinstance(value, Mapping)
        merged[key] = _merge(base.get(key) or {}, value) if nested else value
    return merged


def write_tokenizer(tokenizer: str, folder: Path) -> None:
    """Tokenizer files that `AutoTokenizer` loads, from the tokenizer inside a checkpoint."""
    own = Tokenizer.from_json(tokenizer)
    backend = json.loads(own.to_json())
    padding = (backend.get("padding") or {}).get("pad_token")
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    known = {entry["content"] for entry in backend.get("added_tokens", ())}
    usual = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": padding}
    settings.update({key: token for key, token in usual.items() if token in known})
    backend["padding"] = backend["truncation"] = None
    write_json(folder / "tokenizer.json", backend)
    write_json(folder / "tokenizer_config.json", settings)


def write_processor(image: ImageSpec, folder: Path) -> None:
    """preprocessor_config.json of CLIP's processor with this model's numbers."""
    side = {"height": image.size, "width": image.size}
    settings = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": side,
        "resample": _RESAMPLE[image.resample],
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(image.mean),
        "image_std": list(image.std),
        "do_convert_rgb": True,
    }
    write_json(folder / "preprocessor_config.json", settings)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Indented JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def card(
    config: Config, meta: Mapping[str, Any], step: int, parameters: int, model: vla.VLA
) -> str:
    """README.md of the folder: what the model is, what it takes and gives, how to use it."""
    m, s = config.model, config.model.structure
    rows = {
        "backbone": m.backbone.name,
        "structure": s.kind,
        "head": f"{m.head.kind} ({m.head.layers} x {m.head.hidden})",
        "parameters": f"{parameters:,}",
        "trained for": f"{step} steps" if step else "no step here: imported weights",
        "cameras": ", ".join(s.cameras),
        "history": f"{s.window} steps",
        "actions": f"chunks of {s.chunk}, {m.action_dim} dimensions, gripper last",
        "image size": str(model.image.size),
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    units = "\n".join(
        f"| {name} | {spec['normalization']} | {spec['clip']} | {spec['hz']} | "
        f"{spec['gripper_env'][0]:g} / {spec['gripper_env'][1]:g} |"
        for name, spec in meta["action_specs"].items()
    )
    units = units or "| none: the head is untrained | | | | |"
    return f"""---
library_name: vla_jax
pipeline_tag: robotics
tags: [robotics, vla, {m.backbone.name}]
---

# {m.backbone.name} / {s.kind} / {m.head.kind}

A vision-language-action policy, written by vla_jax.

| | |
|---|---|
{table}

Action units:

| dataset | scaling | clip | Hz | gripper closed / open |
|---|---|---|---|---|
{units}

| file | what |
|---|---|
| `config.json`, `model*.safetensors`, tokenizer and processor files | the VLM, for `transformers` |
| `policy_head.safetensors` | all else the policy has, under RoboVLMs' names |
| `vla_config.json` | the whole configuration and the action units |
| `dataset_statistics.json` | statistics of the training data's actions, openvla's schema |

As a policy:

```bash
python launch/convert.py import-hf THIS_FOLDER RUN
python launch/serve.py --checkpoint=RUN
```

The fine-tuned VLM alone:

```python
from transformers import AutoModelForImageTextToText

vlm = AutoModelForImageTextToText.from_pretrained("THIS_FOLDER")
```
"""
