"""LoRA factors in foreign checkpoints: added to their kernels, or kept apart as a PEFT adapter.

In our tree `.../lora_a` [layers, in, rank] and `.../lora_b` [layers, rank, out] stand beside
`.../kernel`; the layer counts kernel + alpha / rank * lora_a lora_b. PEFT (github.com/huggingface/
peft) stores their transposes as `base_model.model.MODULE.lora_A.weight`, `.lora_B.weight`.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vla_jax.convert.tensors import Lazy
from vla_jax.models.weights import FUSED, Weight, WeightError

FOLDER, WEIGHTS, SETTINGS = "adapter", "adapter_model.safetensors", "adapter_config.json"
_FACTORS = ("lora_a", "lora_b")
# Rows of one kernel that is the matrix of a torch.nn.Linear or a transformers Conv1D.
_KINDS = ("linear", "linear_from_heads", "conv1d", "conv1d_from_heads")


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
        # A small update could vanish in the rounding of a bfloat16 kernel.
        plain[kernel] = Lazy(leaves[kernel].shape, np.dtype(np.float32), read)
    return plain


def _adder(kernel: Lazy, a: Lazy, b: Lazy, scale: float) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        # A copy, since the sum is made in place.
        total = np.array(kernel.read(), np.float32)
        down, up = a.read().astype(np.float32), b.read().astype(np.float32)
        # With or without a layer axis in front; a view, so that the sum lands in `total`.
        layers = total.reshape(-1, down.shape[-2], up.shape[-1])
        down, up = down.reshape(-1, *down.shape[-2:]), up.reshape(-1, *up.shape[-2:])
        for i in range(len(layers)):
            layers[i] += scale * (down[i] @ up[i])
        return total

    return read


@dataclass(frozen=True)
class _Blocks(Weight):
    """PEFT's B of a module that holds several kernels of ours: their B, block-diagonal.

    With A the kernels' A one below the other, B A is the module's whole update, exactly. The rows
    of B lie as the module's outputs do: B is laid out by the kernels' own row of the weight map,
    as if it were a kernel with as many inputs as there are ranks.

    Attributes:
        kernels: shape of every kernel in the module, of one layer.
        chosen: which of them have factors; the others' rows are zero.
    """

    kernels: tuple[tuple[int, ...], ...] = ()
    chosen: tuple[int, ...] = ()

    def join(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """[rank, out] of each factor -> [all outputs, sum of ranks]."""
        ends = list(itertools.accumulate(len(part) for part in parts))
        blocks = [np.zeros((ends[-1], *s[1:]), np.result_type(*parts)) for s in self.kernels]
        for i, end, part in zip(self.chosen, ends, parts, strict=True):
            blocks[i][end - len(part) : end] = part.reshape(-1, *self.kernels[i][1:])
        return _as_linear(self.kind, FUSED[self.kind][1](blocks))

    def split(self, x: np.ndarray, shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
        """Inverse of `join`.

        Raises:
            WeightError: something outside the blocks is not zero: no factors of ours multiply to
                that.
        """
        ends = list(itertools.accumulate(shape[0] for shape in shapes))
        # B is laid out like a kernel with as many inputs as there are ranks.
        sizes = [(ends[-1], *s[1:]) for s in self.kernels]
        blocks = FUSED[self.kind][0](_as_linear(self.kind, x), sizes)
        factors = [
            blocks[i][end - shape[0] : end].reshape(shape)
            for i, end, shape in zip(self.chosen, ends, shapes, strict=True)
        ]
        # Off the diagonal B couples kernels, and our factors have no place for that.
        if not np.array_equal(self.join(factors), x):
            raise WeightError(
                f"{self.source}: not block-diagonal, as after training in PEFT; merge it there"
            )
        return factors


def _as_linear(kind: str, x: np.ndarray) -> np.ndarray:
    """PEFT's B is [out, rank] also beside a Conv1D, whose own matrix is [in, out]."""
    return x.T if kind.startswith("conv1d") else x


def adapter_rows(
    rows: Iterable[Weight], factors: Iterable[str], kernels: Mapping[str, tuple[int, ...]]
) -> list[Weight]:
    """The weight map of an adapter's file.

    Args:
        rows: of the VLM's Hugging Face names.
        factors: our paths.
        kernels: our path -> shape of the VLM's parameters.

    Raises:
        WeightError: naming the kernels that are no module's matrix under their names.
    """
    # A dict keeps the tree's order for the message, a set would not.
    left = {path.rpartition("/")[0]: None for path in factors}
    adapter: list[Weight] = []
    for row in rows:
        folders = [target.removesuffix("/kernel") for target in row.targets]
        chosen = tuple(i for i, folder in enumerate(folders) if folder in left)
        if not chosen or not _is_module(row):
            continue
        for i in chosen:
            del left[folders[i]]
        folder = _only(row.target.removesuffix("/kernel"), chosen)
        module = "base_model.model." + row.source.removesuffix(".weight")
        adapter.append(
            replace(row, source=f"{module}.lora_A.weight", target=f"{folder}/lora_a", kind="linear")
        )
        # B keeps the row's kind: its outputs lie as the kernel's do.
        up = replace(row, source=f"{module}.lora_B.weight", target=f"{folder}/lora_b")
        # A fused module, such as qkv, has one B for several kernels of ours.
        if len(folders) > 1:
            shapes = tuple(tuple(kernels[target])[row.stacked :] for target in row.targets)
            adapter.append(_Blocks(**vars(up), kernels=shapes, chosen=chosen))
        else:
            adapter.append(replace(up, kind="linear"))
    if left:
        raise WeightError(
            "no linear layer of the Hugging Face model has this matrix, so no adapter can stand "
            "beside it (use --lora=merge): " + ", ".join(f"{folder}/kernel" for folder in left)
        )
    return adapter


def _only(target: str, chosen: Sequence[int]) -> str:
    """Some of a target's paths: `attn/{q,k,v}`, (0, 2) -> `attn/{q,v}`."""

    def pick(match: re.Match[str]) -> str:
        choices = match[1].split(",")
        return "{" + ",".join(choices[i] for i in chosen) + "}"

    return re.sub(r"\{(.*)\}", pick, target)


def _is_module(row: Weight) -> bool:
    """Whether a row is the matrix of a torch module; torch.nn.MultiheadAttention's is not."""
    kinds = _KINDS if len(row.targets) == 1 else FUSED
    paths = row.source.endswith(".weight") and row.target.endswith("/kernel")
    return paths and row.kind in kinds and not row.alias


def adapter_config(
    settings: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], base: str
) -> dict[str, Any]:
    """PEFT's adapter_config.json.

    Args:
        settings: our config's `lora` group.
        shapes: of the adapter's tensors, by name.
        base: name or folder of the VLM the adapter belongs to.
    """
    prefix, suffix = "base_model.model.", ".lora_A.weight"
    ranks = {
        name.removeprefix(prefix).removesuffix(suffix): shape[0]
        for name, shape in sorted(shapes.items())
        if name.endswith(suffix)
    }
    rank, alpha = settings["rank"], settings["alpha"]
    # A fused module's factors lie one below the other, so its rank is a multiple of ours.
    stacked = {module: r for module, r in ranks.items() if r != rank}
    return {
        "peft_type": "LORA",
        # PEFT's plain wrapper, which asks nothing of the model's class.
        "task_type": None,
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        # PEFT scales by alpha / rank of the module: the same for stacked factors.
        "rank_pattern": stacked,
        "alpha_pattern": {module: alpha * r / rank for module, r in stacked.items()},
        "lora_dropout": settings["dropout"],
        "target_modules": list(ranks),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
