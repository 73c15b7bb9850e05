"""RoboVLMs' checkpoints and config files in our terms.

Source of names and keys: the released code (robovlms/train/base_trainer.py, model/backbone) and the
configs of configs/calvin_finetune and configs/oxe_training.
"""

import copy
import re
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vla_jax.config import ConfigError
from vla_jax.convert.safetensors_io import SUFFIX, Safetensors
from vla_jax.convert.tensors import Source, same_bytes
from vla_jax.convert.torch_read import TorchFile
from vla_jax.models.weights import WeightError

# Their class -> our backbone.
BACKBONES = {
    "RoboKosMos": "kosmos2",
    "RoboPaligemma": "paligemma",
    "RoboLLaVA": "llava",
    "RoboQwen": "qwen_vl",
    "RoboMoonDream": "moondream",
    "RoboUform": "uform",
    "RoboFlamingo": "flamingo",
}
# Their class -> our head, its number of layers.
HEADS = {
    "LSTMDecoder": ("lstm", 4),
    "FCDecoder": ("mlp", 2),
    "GPTDecoder": ("gpt2", 8),
    "DiscreteDecoder": ("detokenizer", 1),
}
# Auxiliary training loss (use_clip_norm): no part of the policy.
IGNORE = (r"^clip_norm_head\.",)

# Their data_mix -> our dataset names, as far as they were evaluated on.
_MIXES = {
    "bridge": ("bridge_orig",),
    "rt_1": ("fractal20220817_data",),
    "oxe_magic_soup": ("fractal20220817_data", "bridge_orig"),
}
_WRAPPERS = ("_forward_module.", "module.")  # DeepSpeed, data parallel
_LORA = re.compile(r"^(.*)\.lora_(A|B)\.[^.]+\.weight$")


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
            f"{name} (of {kept})"
            for name, kept in self._twins
            if source.place(name) != source.place(kept)
            and not (
                source.shapes[name] == source.shapes[kept]
                and same_bytes(source.read(name), source.read(kept))
            )
        )

    def read(self, name: str) -> np.ndarray:
        """One tensor; with LoRA the merged one, W + alpha / rank * B A, added up in float64."""
        value = self._source.read(self._raw[name])
        if name not in self._lora:
            return value
        a, b = (self._source.read(self._raw[self._lora[name][part]]) for part in "AB")
        delta = b.astype(np.float64) @ a.astype(np.float64) * (self._alpha / a.shape[0])
        return (value.astype(np.float64) + delta).astype(value.dtype)

    def place(self, name: str) -> Hashable:
        """See `tensors.Source`."""
        return self._source.place(self._raw[name])


def _unwrapped(name: str) -> str:
    while name.startswith(_WRAPPERS):
        for wrapper in _WRAPPERS:
            name = name.removeprefix(wrapper)
    return name


def _canonical(name: str) -> str:
    for twice in ("model.base_model.model.", "model."):
        if name.startswith(twice):
            name = "backbone." + name.removeprefix(twice)
    return name.replace(".base_layer.", ".")


def to_config(original: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """One of their JSON configs -> our raw config.

    Args:
        original: theirs.
        base: ours with its defaults (`configs/base.py`), from which all else is taken.

    Raises:
        ConfigError: listing every key that is missing or asks for what is not there.
    """
    raw, problems = copy.deepcopy(dict(base)), []
    needed = ("robovlm_name", "act_head", "window_size", "fwd_pred_next_n", "train_dataset")
    missing = [key for key in needed if not original.get(key)]
    if missing:
        raise ConfigError(f"not a config of RoboVLMs' policies: {missing} missing or empty")
    head, window = original["act_head"], original["window_size"]
    model, structure = raw["model"], raw["model"]["structure"]

    def put(group: dict[str, Any], key: str, value: Any, default: Any, theirs: str) -> None:
        if key in group:
            group[key] = value
        elif value != default:
            problems.append(f"{theirs}: {value!r} has no counterpart in this version")

    def pick(table: Mapping[str, Any], key: str, theirs: str) -> Any:
        if key not in table:
            problems.append(f"{theirs}: {key!r} is none of {sorted(table)}")
            return next(iter(table.values()))
        return table[key]

    for key in ("parent", "use_state", "use_mu_law", "regular_action", "fwd_head"):
        if original.get(key):
            problems.append(f"{key}: {original[key]!r} has no counterpart")
    model["backbone"]["name"] = pick(BACKBONES, original["robovlm_name"], "robovlm_name")
    kind, layers = pick(HEADS, head["type"], "act_head.type")
    model["head"].update(kind=kind, layers=head.get("num_layers", layers))
    model["head"]["hidden"] = head.get("hidden_size", 1024)
    model["action_dim"] = head.get("action_dim", 7)
    put(
        model["head"],
        "down_sample",
        head.get("down_sample", "none"),
        "none",
        "act_head.down_sample",
    )
    for key, ours in (("n_bin", "bins"), ("min_action", "low"), ("max_action", "high")):
        if kind == "detokenizer" and key in head:
            value = head[key] if ours == "bins" else float(head[key])
            put(model["head"], ours, value, None, f"act_head.{key}")
    space = head.get("action_space", "continuous")
    histories = {"post": "policy_head", "pre": "interleaved", "video": "video"}
    structure["kind"] = (
        "discrete"
        if space == "discrete"
        else "one_step"
        if kind == "mlp" and window == 1
        else pick(histories, head.get("history_type", "post"), "act_head.history_type")
    )
    structure.update(
        window=window,
        chunk=original["fwd_pred_next_n"],
        latent=head.get("latent", 1),
        cameras=("primary", "wrist") if original.get("use_hand_rgb") else ("primary",),
    )
    source = head.get("token_source", "all") if space == "down_sample" else "action"
    put(structure, "readout", source, "action", "act_head.token_source")
    resampler = 64 if original.get("use_vision_resampler") else 0
    put(structure, "resampler", resampler, 0, "use_vision_resampler")
    raw["data"].update(_data(original, problems))
    if problems:
        raise ConfigError(
            f"{len(problems)} problem(s) in their config:\n  " + "\n  ".join(problems)
        )
    return raw


def _data(original: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    low, high = original.get("norm_min", -1), original.get("norm_max", 1)
    if original.get("norm_action") and low != -high:
        problems.append(f"norm_min, norm_max: {low} and {high} are not symmetric")
    found: dict[str, Any] = {"clip": float(high) if original.get("norm_action") else 1.0}
    data = original["train_dataset"]
    for part in data if isinstance(data, list) else [data]:
        if part.get("type") == "DiskCalvinDataset":
            names, found["normalization"] = ("calvin",), "none"
        elif part.get("data_mix") in _MIXES:
            names, found["normalization"] = _MIXES[part["data_mix"]], "q99"
        else:
            continue
        folder = part.get("data_dir", part.get("data_root_dir", ""))
        found["datasets"] = tuple({"spec": n, "dir": folder, "weight": 1.0} for n in names)
        return found
    problems.append(f"train_dataset: neither DiskCalvinDataset nor a data_mix of {sorted(_MIXES)}")
    return found
