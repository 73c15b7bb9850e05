"""LoRA factors in foreign checkpoints: added to their kernels, or kept apart as a PEFT adapter.

In our tree `.../lora_a` [layers, in, rank] and `.../lora_b` [layers, rank, out] stand beside
`.../kernel`; the layer counts kernel + alpha / rank * lora_a lora_b. PEFT (github.com/huggingface/
peft) stores their transposes as `base_model.model.MODULE.lora_A.weight`, `.lora_B.weight`.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from vla_jax.convert.tensors import Lazy, Source
from vla_jax.models.weights import Weight, WeightError

FOLDER, WEIGHTS, SETTINGS = "adapter", "adapter_model.safetensors", "adapter_config.json"
_FACTORS = ("lora_a", "lora_b")
_THEIRS = {"lora_a": "lora_A", "lora_b": "lora_B"}
# The maps whose matrix PEFT's factors multiply to: torch's [out, in], one matrix a layer.
_KINDS = ("linear", "linear_from_heads")


def is_factor(path: str) -> bool:
    """Whether a parameter of ours is a LoRA factor."""
    return path.rpartition("/")[2] in _FACTORS


def merged(leaves: Mapping[str, Lazy], scale: float) -> dict[str, Lazy]:
    """The plain model's parameters: kernels with their updates added, in float32.

    Args:
        leaves: our path -> parameter, factors among them.
        scale: alpha / rank.
    """
    plain = {path: leaf for path, leaf in leaves.items() if not is_factor(path)}
    for path in [path for path in leaves if path.endswith("/lora_a")]:
        folder = path.removesuffix("lora_a")
        kernel = folder + "kernel"
        read = _adder(leaves[kernel], leaves[path], leaves[folder + "lora_b"], scale)
        plain[kernel] = Lazy(leaves[kernel].shape, np.dtype(np.float32), read)
    return plain


def _adder(kernel: Lazy, a: Lazy, b: Lazy, scale: float) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        total = np.array(kernel.read(), np.float32)
        down, up = a.read().astype(np.float32), b.read().astype(np.float32)
        # With or without a layer axis in front; a view, so that the sum lands in `total`.
        layers = total.reshape(-1, down.shape[-2], up.shape[-1])
        down, up = down.reshape(-1, *down.shape[-2:]), up.reshape(-1, *up.shape[-2:])
        for i in range(len(layers)):
            layers[i] += scale * (down[i] @ up[i])
        return total

    return read


def adapter_rows(rows: Iterable[Weight], factors: Iterable[str]) -> list[Weight]:
    """The weight map of an adapter's file.

    Args:
        rows: of the VLM's Hugging Face names.
        factors: our paths.

    Raises:
        WeightError: naming the kernels that are no matrix of their own under their names.
    """
    modules = _modules(rows)
    found, problems = [], []
    for path in factors:
        folder, _, name = path.rpartition("/")
        if folder in modules:
            source = f"base_model.model.{modules[folder]}.{_THEIRS[name]}.weight"
            found.append(Weight(source, path, "linear"))
        elif name == "lora_a":
            problems.append(f"{folder}/kernel")
    if problems:
        raise WeightError(
            "no matrix of its own in the Hugging Face model, so no adapter can stand beside it "
            "(use --lora=merge): " + ", ".join(problems)
        )
    return found


def _modules(rows: Iterable[Weight]) -> dict[str, str]:
    """Our folder of a linear layer -> their module."""
    return {
        row.target.removesuffix("/kernel"): row.source.removesuffix(".weight")
        for row in rows
        if row.kind in _KINDS and row.target.endswith("/kernel") and not row.alias
    }


def adapter_shapes(
    rows: Iterable[Weight], kernels: Mapping[str, tuple[int, ...]], source: Source
) -> dict[str, tuple[int, ...]]:
    """Our paths and shapes of the factors in an adapter's file.

    Args:
        rows: of the VLM's Hugging Face names.
        kernels: our path -> shape of the VLM's parameters.
        source: the adapter's tensors.
    """
    found = {}
    for folder, module in _modules(rows).items():
        stacked = "{}" in module
        for ours, theirs in _THEIRS.items():
            name = f"base_model.model.{module.format(0)}.{theirs}.weight"
            if name in source.shapes:
                lead = kernels[f"{folder}/kernel"][:1] if stacked else ()
                found[f"{folder}/{ours}"] = (*lead, *reversed(source.shapes[name]))
    return found


def adapter_config(settings: Mapping[str, Any], names: Iterable[str], base: str) -> dict[str, Any]:
    """PEFT's adapter_config.json.

    Args:
        settings: our config's `lora` group.
        names: of the adapter's tensors.
        base: name or folder of the VLM the adapter belongs to.
    """
    prefix, suffix = "base_model.model.", ".lora_A.weight"
    targets = [n.removeprefix(prefix).removesuffix(suffix) for n in names if n.endswith(suffix)]
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "r": settings["rank"],
        "lora_alpha": settings["alpha"],
        "lora_dropout": settings["dropout"],
        "target_modules": sorted(targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
