"""Our checkpoints -> foreign ones, one parameter in memory at a time."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vla_jax.config import Config, read_json, resolve
from vla_jax.convert import card, lora, maps, output
from vla_jax.convert.formats import torch_write
from vla_jax.convert.formats.safetensors import SUFFIX, Writer
from vla_jax.convert.hf import files as hf_files
from vla_jax.convert.importing import POLICY, SETTINGS, STATISTICS
from vla_jax.convert.store import Stored
from vla_jax.convert.tensors import Lazy, promote
from vla_jax.models import vla

Done = Callable[[int], Any]  # takes the bytes just written


def to_hf(
    stored: Stored,
    out: str | Path,
    source: str | Path | None = None,
    limit: int = 5 * 10**9,
    dtype: np.dtype | None = None,
    adapter: bool = False,
    overwrite: bool = False,
    done: Done = lambda count: None,
) -> maps.Outgoing:
    """A folder that `transformers` loads, with the rest of the policy beside it.

    Args:
        stored: the checkpoint.
        out: the new folder.
        source: Hugging Face folder to take tokenizer and processor files from; None takes the one
            the config remembers, if it is still there, else writes them from the checkpoint.
        limit: bytes a safetensors file at most.
        dtype: write everything in this type; None keeps each parameter's.
        adapter: write LoRA factors as a PEFT adapter, in the folder `adapter`, instead of adding
            them to the weights.
        overwrite: replace `out`.
        done: see `Done`.

    Returns:
        The VLM as it was written.

    Raises:
        WeightError: the checkpoint and the weight map differ.
        OutputError: `out` is taken.
    """
    config: Config = resolve(stored.meta["config"])
    model = vla.build(config.model)
    # Names to pass over matter on the way in only.
    rows, _ = maps.hugging_face(config.model)
    leaves, factors, settings = without_lora(stored, adapter)
    backbone = {path: leaf for path, leaf in leaves.items() if path.startswith("backbone/")}
    policy_leaves = {path: leaf for path, leaf in leaves.items() if path not in backbone}
    # All maps are checked before the first byte is written.
    vlm = maps.outgoing(rows, backbone, dtype)
    policy = maps.outgoing(maps.policy(config.model), policy_leaves, dtype)
    # The adapter of a fused module needs the shapes of all its kernels, with factors or without.
    kernels = {path: leaf.shape for path, leaf in backbone.items()}
    update = maps.outgoing(lora.adapter_rows(rows, factors, kernels), factors, dtype)
    remembered = source or config.model.backbone.hf_dir
    # The folder may be gone by now; the copies inside the checkpoint serve then.
    files = Path(remembered) if remembered and Path(remembered).is_dir() else None
    # An export that fails leaves nothing behind, and what was there before untouched.
    with output.whole(out, overwrite) as folder:
        _write(folder, vlm, limit, done)
        _write(folder / f"{POLICY}{SUFFIX}", policy, None, done)
        if factors:
            (folder / lora.FOLDER).mkdir()
            _write(folder / lora.FOLDER / lora.WEIGHTS, update, None, done)
            peft = lora.adapter_config(settings["lora"], update.shapes, str(remembered))
            hf_files.write_json(folder / lora.FOLDER / lora.SETTINGS, peft)
        _write_beside(folder, model, stored, files, vlm, settings)
    return vlm


def without_lora(
    stored: Stored, adapter: bool
) -> tuple[dict[str, Lazy], dict[str, Lazy], dict[str, Any]]:
    """Parameters of the plain model, factors to write apart, the config of what is written."""
    factors = {path: leaf for path, leaf in stored.leaves.items() if lora.is_factor(path)}
    settings = stored.meta["config"]
    if not factors:
        return stored.leaves, {}, settings
    if adapter:
        plain = {path: leaf for path, leaf in stored.leaves.items() if path not in factors}
        return plain, factors, settings
    scale = settings["lora"]["alpha"] / settings["lora"]["rank"]
    # Rank 0 says that the weights are plain now, so an import looks for no adapter.
    settings = {**settings, "lora": {**settings["lora"], "rank": 0}}
    return lora.merged(stored.leaves, scale), {}, settings


def _write(path: Path, outgoing: maps.Outgoing, limit: int | None, done: Done) -> None:
    with Writer(path, outgoing.shapes, outgoing.dtypes, limit) as writer:
        # Safetensors shares no bytes, so a tied tensor is written under each of its names.
        for name, value in outgoing.repeated():
            writer.write(name, value)
            done(value.nbytes)


def _write_beside(
    folder: Path,
    model: vla.VLA,
    stored: Stored,
    files: Path | None,
    vlm: maps.Outgoing,
    config: dict[str, Any],
) -> None:
    meta = stored.meta
    origin = meta.get("origin", {})
    original = origin.get("vlm_config", {})
    hf_files.place(files, origin.get("files", {}), folder)
    # The copy inside the checkpoint is for when the folder is gone.
    if files and (files / "config.json").is_file():
        original = read_json(files / "config.json")
    # One type for the folder: the widest, so that loading rounds nothing.
    widest = str(promote(list(vlm.dtypes.values())))
    described = hf_files.config_json(model.arch, original, widest)
    hf_files.write_json(folder / "config.json", described)
    if meta["tokenizer"]:
        hf_files.write_tokenizer(meta["tokenizer"], original, folder)
    hf_files.write_processor(model.image, model.vlm.image_tokens, described, folder)
    write_settings(folder, stored, config)
    card.write(folder / card.FILE, stored, card.HUGGING_FACE)


def write_settings(folder: Path, stored: Stored, config: Mapping[str, Any]) -> None:
    """The configuration, action units and statistics of a policy, to be read without its weights.

    Args:
        folder: where to.
        stored: the checkpoint.
        config: of what is written, as it is stored.
    """
    settings = {
        "format": stored.meta["format"],
        "step": stored.step,
        "config": config,
        "action_specs": stored.meta["action_specs"],
    }
    hf_files.write_json(folder / SETTINGS, settings)
    hf_files.write_json(folder / STATISTICS, stored.meta["statistics"])


def to_robovlms(
    stored: Stored,
    out: str | Path,
    bare: bool = False,
    dtype: np.dtype | None = None,
    overwrite: bool = False,
    done: Done = lambda count: None,
) -> maps.Outgoing:
    """One file in RoboVLMs' key layout, with its card beside it; LoRA factors are merged.

    Args:
        stored: the checkpoint.
        out: ends in .pt ({"state_dict": ...}, as the original loads) or .safetensors.
        bare: names without Lightning's `model.`.
        dtype: write everything in this type; None keeps each parameter's.
        overwrite: replace `out`.
        done: see `Done`.

    Raises:
        WeightError: the model has parts RoboVLMs has no names for.
        OutputError: `out` or its card (OUT.md) is taken, or `out` of another ending.
    """
    out = Path(out)
    beside = out.with_name(f"{out.name}.md")
    output.check_free(beside, overwrite)
    if out.suffix not in (SUFFIX, torch_write.SUFFIX):
        raise output.OutputError(f"{out}: must end in {torch_write.SUFFIX} or {SUFFIX}")
    config = resolve(stored.meta["config"])
    rows, _ = maps.robovlms(config.model, prefix="" if bare else "model.")
    leaves, _, _ = without_lora(stored, adapter=False)
    outgoing = maps.outgoing(rows, leaves, dtype)
    with output.whole(out, overwrite, folder=False) as file:
        if out.suffix == SUFFIX:
            _write(file, outgoing, None, done)
        else:
            torch_write.write(
                file, outgoing.shapes, outgoing.dtypes, outgoing.aliases, outgoing.tensors, done
            )
    with output.whole(beside, overwrite, folder=False) as file:
        card.write(file, stored, card.ROBOVLMS, out.name)
    return outgoing
