"""RoboVLMs' checkpoints under bare names, and the model their config describes.

Source of the names: the released code (robovlms/train/base_trainer.py, model/backbone).
"""

import re
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vla_jax.convert.formats.safetensors import SUFFIX, Safetensors
from vla_jax.convert.formats.torch_read import TorchFile
from vla_jax.convert.robovlms import config as robovlms_config
from vla_jax.convert.robovlms import keys as robovlms_keys
from vla_jax.convert.tensors import Source, same_bytes
from vla_jax.models.weights import WeightError

# Their class -> our head, its layers by default.
HEADS = robovlms_config.HEADS
# Auxiliary training loss (use_clip_norm): no part of the policy.
IGNORE = (r"^clip_norm_head\.",)

_WRAPPERS = ("_forward_module.", "module.")  # DeepSpeed, data parallel
# PEFT names its adapter in a model's state dict, and leaves it out of the adapter's own file.
_LORA = re.compile(r"^(.*)\.lora_(A|B)(?:\.[^.]+)?\.weight$")


def open_source(path: str | Path, lora_alpha: float | int | None = None) -> "Canonical":
    """A checkpoint under bare names (`backbone.…`, `act_head.…`, `action_token`).

    Args:
        path: .pt, .safetensors, or a folder of safetensors.
        lora_alpha: scale of the LoRA matrices times their rank, where the file has any.

    Raises:
        WeightError: it is none of these, or damaged.
    """
    path = Path(path)
    if path.is_dir() and (path / "latest").is_file():
        raise WeightError(
            f"{path}: a DeepSpeed folder, whose weights lie in pieces; join them with the "
            "zero_to_fp32.py in it and give the file it writes"
        )
    if path.is_dir() or path.suffix == SUFFIX:
        return Canonical(Safetensors(path), lora_alpha)
    return Canonical(TorchFile(path), lora_alpha)


class Canonical:
    """A RoboVLMs state dict whose names had their wrappers removed; see `tensors.Source`.

    Wrappers: `model.` (Lightning), `module.`, `_forward_module.`. The original registers some
    models twice (Flamingo's language model, LoRA models): of names that mean one tensor, the first
    is kept, and `unequal` compares the others. LoRA matrices are merged into their weights as
    these are read.

    Attributes:
        prefix: "model." if the names had it.
    """

    def __init__(self, source: Source, lora_alpha: float | int | None = None):
        """Sorts the names; reads nothing.

        Raises:
            WeightError: LoRA matrices of which a part, or the scale, is missing.
        """
        self._source = source
        bare = {name: _unwrapped(name) for name in source.shapes}
        # `model.` alone may belong to a backbone, so the start is compared with what follows it.
        lightning = any(
            name.startswith(("model.backbone.", "model.act_head.", "model.action_token"))
            for name in bare.values()
        )
        self.prefix = "model." if lightning else ""
        self._twins: list[tuple[str, str]] = []
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, np.dtype] = {}
        self._raw: dict[str, str] = {}
        self._lora: dict[str, dict[str, str]] = {}
        for raw, name in bare.items():
            self._add(raw, _canonical(name.removeprefix(self.prefix)))
        problems = [
            f"{name}: of its LoRA matrices only {sorted(parts)}"
            for name, parts in self._lora.items()
            if set(parts) != {"A", "B"} or name not in self.shapes
        ]
        if self._lora and lora_alpha is None:
            problems.append("LoRA matrices, but no train_setup.lora_alpha in the config")
        if problems:
            raise WeightError("\n".join(problems))
        self._alpha = lora_alpha or 0.0

    def _add(self, raw: str, name: str) -> None:
        if name in self._raw:
            self._twins.append((raw, self._raw[name]))
            return
        self._raw[name] = raw
        lora = _LORA.match(name)
        if lora:
            self._lora.setdefault(f"{lora[1]}.weight", {})[lora[2]] = name
        else:
            self.shapes[name], self.dtypes[name] = (
                self._source.shapes[raw],
                self._source.dtypes[raw],
            )

    def unequal(self) -> tuple[str, ...]:
        """Names that repeat another tensor and differ from it; reads those that share no bytes."""
        source = self._source
        return tuple(
            f"{name} (of {original})"
            for name, original in self._twins
            if source.place(name) != source.place(original)
            and not (
                source.shapes[name] == source.shapes[original]
                and same_bytes(source.read(name), source.read(original))
            )
        )

    def read(self, name: str) -> np.ndarray:
        """One tensor; with LoRA the merged one, W + alpha / rank * B A, added up in float64."""
        value = self._source.read(self._raw[name])
        if name not in self._lora:
            return value
        a, b = (self._source.read(self._raw[self._lora[name][part]]) for part in "AB")
        # So that the sum is rounded once, to the file's own type.
        delta = b.astype(np.float64) @ a.astype(np.float64) * (self._alpha / a.shape[0])
        return (value.astype(np.float64) + delta).astype(value.dtype)

    def place(self, name: str) -> Hashable:
        """See `tensors.Source`."""
        return self._source.place(self._raw[name])


def _unwrapped(name: str) -> str:
    # Wrappers may lie in one another, in any order.
    while name.startswith(_WRAPPERS):
        for wrapper in _WRAPPERS:
            name = name.removeprefix(wrapper)
    return name


def _canonical(name: str) -> str:
    # Flamingo's and LoRA's models are registered under a second name, see the class.
    for twice in ("model.base_model.model.", "model."):
        if name.startswith(twice):
            name = "backbone." + name.removeprefix(twice)
    return name.replace(".base_layer.", ".")


def to_config(original: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """One of their JSON configs -> our raw config, as far as a trained policy goes.

    The model and the units of its actions; what matters in training only is not looked at, see
    `robovlms_config.to_raw` for all.

    Args:
        original: theirs.
        base: ours with its defaults (`configs/base.py`), from which all else is taken.

    Raises:
        ConfigError: listing every key that is missing or asks for what is not there.
    """
    raw, problems = robovlms_config.start(original, base)
    if original["robovlm_name"] == robovlms_config.FLAMINGO:  # its checkpoints hold all of CLIP
        raw["model"]["backbone"]["arch"].setdefault("clip_text_config", {"layers": 12})
    # Only these keys change what the trained policy computes.
    groups = ("act_head.", "fwd_head", "regular_action", "use_mu_law", "tcp_rel")
    problems += [x for x in robovlms_keys.refusals(original) if x.startswith(groups)]
    return robovlms_config.finish(raw, problems)
