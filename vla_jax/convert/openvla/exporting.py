"""Our OpenVLA and OpenVLA-OFT -> the folders that their own code loads."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vla_jax.config import ConfigError, resolve
from vla_jax.convert import card, maps, output
from vla_jax.convert.exporting import without_lora
from vla_jax.convert.formats import torch_write
from vla_jax.convert.formats.safetensors import Writer
from vla_jax.convert.hf import files as hf_files
from vla_jax.convert.openvla import names
from vla_jax.convert.openvla.importing import STATISTICS
from vla_jax.convert.store import Stored
from vla_jax.convert.tensors import Lazy, promote
from vla_jax.data.units.policy_units import PolicyUnits
from vla_jax.data.units.scaling import RULES
from vla_jax.models import vla, weights
from vla_jax.models.backbones.prismatic import ARCH, TOWERS, Prismatic

Done = Callable[[int], Any]  # takes the bytes just written
# Of the architecture what their config.json has no keys for.
_OURS = (*TOWERS, "means", "stds", "film", "image_filter", "image_crop")
_CLASS = {"architectures": ["OpenVLAForActionPrediction"], "n_action_bins": 256}


def to_openvla(
    stored: Stored,
    out: str | Path,
    limit: int = 5 * 10**9,
    dtype: np.dtype | None = None,
    overwrite: bool = False,
    done: Done = lambda count: None,
) -> maps.Outgoing:
    """A folder as OFT's training leaves it, LoRA merged: the VLM, and a .pt file for each part.

    Where the towers have FiLM, they stand in a .pt file with it and in the VLM without. Factors of
    LoRA that came beside them are zeros now, since their product is in the weights.

    Args:
        stored: the checkpoint.
        out: the new folder.
        limit: bytes a safetensors file at most.
        dtype: write everything in this type; None keeps each parameter's.
        overwrite: replace `out`.
        done: see `Done`.

    Returns:
        The VLM as it was written.

    Raises:
        ConfigError: the model is no OpenVLA.
        WeightError: the checkpoint and the weight map differ.
        OutputError: `out` is taken.
    """
    config = resolve(stored.meta["config"])
    model = vla.build(config.model)
    kind = model.config.structure.kind
    if model.config.backbone.name != "prismatic" or kind not in ("discrete", "parallel"):
        raise ConfigError(
            f"this is no OpenVLA: prismatic with structure discrete or parallel, not "
            f"{model.config.backbone.name} with {kind}"
        )
    complete = dataclasses.replace(model.config.backbone, arch=dict(model.arch))
    rows, _ = names.rows(dataclasses.replace(model.config, backbone=complete))
    leaves, _, _ = without_lora(stored, adapter=False)
    # Checks the whole before the first byte is written.
    maps.outgoing(rows, leaves, dtype)
    plain = Prismatic(Prismatic.arch({**model.arch, "film": False}))
    main = _outgoing(weights.prefixed(plain.weight_map(), "", "backbone/"), leaves, dtype)
    origin = stored.meta.get("origin", {})
    with output.whole(out, overwrite) as folder:
        with Writer(folder, main.shapes, main.dtypes, limit) as writer:
            for name, value in main.tensors():
                writer.write(name, value)
                done(value.nbytes)
        for part, mark in (
            (names.HEAD, "/"),
            (names.STATE, "/"),
            (names.VISION, f".{names.VISION}"),
        ):
            chosen = [row for row in rows if row.source.startswith(part + mark)]
            if chosen:
                _write_part(folder, part, chosen, leaves, dtype, stored.step, origin)
        _write_beside(folder, model, stored, str(promote(list(main.dtypes.values()))))
        card.write(folder / card.FILE, stored, card.OPENVLA)
    return main


def _outgoing(
    rows: list[weights.Weight], leaves: Mapping[str, Lazy], dtype: np.dtype | None
) -> maps.Outgoing:
    """Some of the rows, of the parameters they name."""
    return maps.outgoing(rows, {path: leaves[path] for row in rows for path in row.targets}, dtype)


def _write_part(
    folder: Path,
    part: str,
    rows: list[weights.Weight],
    leaves: Mapping[str, Lazy],
    dtype: np.dtype | None,
    step: int,
    origin: Mapping[str, Any],
) -> None:
    """One .pt file: a bare state dict, names as the file had them that the part came from."""
    wrapped = "module." if part in origin.get("wrapped", ()) else ""
    # Behind the part's name stands a slash or, of the towers, a dot.
    cut = len(part) + 1
    rows = [dataclasses.replace(row, source=wrapped + row.source[cut:]) for row in rows]
    outgoing = _outgoing(rows, leaves, dtype)
    factors = origin.get("factors", {}) if part == names.VISION else {}
    # PEFT keeps a module with factors under another name.
    inner = {
        f"{wrapped}{module}.{end}": f"{wrapped}{module}.base_layer.{end}"
        for module in factors
        for end in ("weight", "bias")
    }
    shapes = {inner.get(name, name): shape for name, shape in outgoing.shapes.items()}
    dtypes = {inner.get(name, name): kind for name, kind in outgoing.dtypes.items()}
    zeros: dict[str, tuple[int, ...]] = {}
    for module, rank in factors.items():
        outputs, inputs = outgoing.shapes[f"{wrapped}{module}.weight"]
        zeros[f"{wrapped}{module}.lora_A.default.weight"] = (rank, inputs)
        zeros[f"{wrapped}{module}.lora_B.default.weight"] = (outputs, rank)
        for letter in "AB":
            name = f"{wrapped}{module}.lora_{letter}.default.weight"
            dtypes[name] = outgoing.dtypes[f"{wrapped}{module}.weight"]

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for name, value in outgoing.tensors():
            yield inner.get(name, name), value
        for name, shape in zeros.items():
            yield name, np.zeros(shape, dtypes[name])

    # A checkpoint that was trained on has a number of its own.
    named = {} if step else origin.get("parts", {})
    path = folder / named.get(part, f"{part}--{step}_checkpoint.pt")
    torch_write.write(path, shapes | zeros, dtypes, {}, tensors, wrapper="")


def _write_beside(folder: Path, model: Any, stored: Stored, dtype: str) -> None:
    """Config, statistics, tokenizer and processor."""
    origin, meta = stored.meta.get("origin", {}), stored.meta
    original = origin.get("vlm_config", {})
    remembered = model.config.backbone.hf_dir
    files = Path(remembered) if remembered and Path(remembered).is_dir() else None
    hf_files.place(files, origin.get("files", {}), folder)
    stored_entries = origin.get("norm_stats") or original.get("norm_stats", {})
    entries = stored_entries
    if meta["statistics"] or not stored_entries:  # trained here, in units of its own
        entries = stored_entries | _statistics(meta)
    arch = {key: value for key, value in model.arch.items() if key not in _OURS}
    described = _CLASS | hf_files.config_json(arch, original, dtype)
    if meta["statistics"]:
        described["norm_stats"] = entries
    described.setdefault("norm_stats", entries)
    hf_files.write_json(folder / "config.json", described)
    # OFT reads this file alone, and takes config.json's where it is missing.
    if origin.get("norm_stats") or entries != original.get("norm_stats"):
        hf_files.write_json(folder / STATISTICS, entries)
    if meta["tokenizer"]:
        hf_files.write_tokenizer(meta["tokenizer"], described, folder)
    if not (folder / "preprocessor_config.json").is_file():
        hf_files.write_json(folder / "preprocessor_config.json", _processor(model.arch))


def _processor(arch: Mapping[str, Any]) -> dict[str, Any]:
    """What Prismatic's image processor is made of."""
    size = arch[TOWERS[0]]["image_size"]
    return {
        "image_processor_type": "PrismaticImageProcessor",
        "processor_class": "PrismaticProcessor",
        "use_fused_vision_backbone": ARCH["use_fused_vision_backbone"],
        "image_resize_strategy": arch["image_resize_strategy"],
        # One entry for each of the two towers that see the same picture.
        "input_sizes": [[3, size, size]] * 2,
        "interpolations": ["bicubic"] * 2,
        "means": [list(mean) for mean in arch["means"]],
        "stds": [list(std) for std in arch["stds"]],
    }


def _statistics(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Dataset -> entry in OpenVLA's schema, with the numbers that the policy was scaled by."""
    entries = {name: dict(entry) for name, entry in meta["statistics"].items()}
    for name, raw in meta.get("units", {}).items():
        units, entry = PolicyUnits.from_json(raw), entries.setdefault(name, {})
        entry.pop("chunks", None)
        for key, scaling in (("action", units.actions), ("proprio", units.state)):
            if scaling.first:
                ends = zip(RULES[scaling.rule].names, (scaling.first, scaling.second), strict=True)
                lists = {statistic: list(values) for statistic, values in ends}
                mask = {"mask": list(scaling.mask)} if scaling.mask else {}
                entry[key] = {**entry.get(key, {}), **lists, **mask}
    return entries
