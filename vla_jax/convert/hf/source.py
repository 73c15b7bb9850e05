"""A Hugging Face model folder as a source of weights, without torch."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vla_jax.config import ModelConfig, read_json
from vla_jax.convert import maps
from vla_jax.convert.formats.safetensors import INDEX, SUFFIX, Safetensors
from vla_jax.convert.formats.torch_read import TorchFile
from vla_jax.convert.hf.files import carried
from vla_jax.convert.tensors import Joined, Renamed, Source
from vla_jax.data.language.tokenizer import Tokenizer
from vla_jax.models.backbones import BACKBONES
from vla_jax.models.backbones.base import Backbone, merge_arch
from vla_jax.models.weights import WeightError

_TORCH = "pytorch_model.bin"


def read_arch(
    folder: str | Path | None, config: ModelConfig, shapes: maps.Shapes | None = None
) -> dict[str, Any]:
    """The backbone's architecture: the folder's config.json, then the config's overrides.

    Before both comes what the weights' shapes tell, of backbones whose config.json leaves it out.

    Args:
        folder: None = there is no config.json.
        config: the model.
        shapes: of the weights, by their name in the weight map; None = those of the folder.
    """
    backbone = BACKBONES[config.backbone.name]
    sizes: dict[str, Any] = {}
    if backbone.SIZES_FROM_WEIGHTS:
        if shapes is None and folder:
            shapes = open_source(folder, config).shapes
        sizes = backbone.from_shapes(shapes or {})
    if not (folder or sizes):
        return backbone.arch(config.backbone.arch)
    described = read_json(Path(folder) / "config.json") if folder else {}
    if sizes:
        base = merge_arch(backbone.arch(sizes), described, strict=False)
    else:
        # Not strict, as a config.json has many keys that say nothing here; overrides are checked
        # below.
        base = backbone.arch(described, strict=False)
    return override(base, config.backbone.arch, backbone)


def origin(folder: str | Path) -> dict[str, Any]:
    """What a checkpoint keeps of the folder its VLM came from."""
    return {"vlm_config": read_json(Path(folder) / "config.json"), "files": carried(folder)}


def override(
    base: dict[str, Any], overrides: Mapping[str, Any], backbone: type[Backbone]
) -> dict[str, Any]:
    """`base` with a config's overrides, whose keys must be the backbone's."""
    return backbone.arch(merge_arch(base, overrides, strict=True))


def tokenizer(folder: str | Path, config: ModelConfig) -> Tokenizer:
    """The tokenizer of a Hugging Face folder with the tokens the backbone adds to it.

    Raises:
        FileNotFoundError: there is none.
        ImportError: it has to be converted and transformers is not installed.
    """
    backbone = BACKBONES[config.backbone.name]
    # A backbone that names the ends of its texts wants nothing added by the tokenizer.
    return Tokenizer.from_dir(folder, backbone.ADDED_TOKENS, plain=any(backbone.ENDS))


def vocab_size(config: ModelConfig) -> int:
    """How many ids a backbone's embedding of words has rows for."""
    backbone = BACKBONES[config.backbone.name]
    # parent=None keeps flax from attaching the module to one that is being built.
    return backbone(backbone.arch(config.backbone.arch), parent=None).vocab_size


def open_source(folder: str | Path, config: ModelConfig) -> Source:
    """The tensors of a Hugging Face folder under the names of the backbone's weight map.

    Raises:
        WeightError: no weights there, or damaged ones.
    """
    backbone = BACKBONES[config.backbone.name]
    paths = [Path(folder) / name for name in backbone.PARTS]
    parts: list[Source] = [
        Safetensors(path) if path.suffix == SUFFIX else TorchFile(path)
        for path in paths
        if path.is_file()
    ]
    # PARTS can be a whole release, or stand beside the ordinary files.
    if not parts or any(Path(folder).glob("model*" + SUFFIX)):
        # Where there is neither, the second says what it has looked for.
        parts += _torch_files(Path(folder)) or [Safetensors(folder)]
    renamed = [Renamed(part, backbone.RENAMES) for part in parts]
    return renamed[0] if len(renamed) == 1 else Joined(renamed)


def _torch_files(folder: Path) -> list[TorchFile]:
    """The files of a folder that torch.save wrote, as older releases have them.

    [] where there are safetensors.
    """
    if any(folder.glob("model*" + SUFFIX)) or any(folder.glob("model*" + INDEX)):
        return []
    index = folder / f"{_TORCH}.index.json"
    if index.is_file():
        weights = read_json(index).get("weight_map")
        if not isinstance(weights, dict):
            raise WeightError(f"{index}: not an index of shards")
        names = sorted({str(name) for name in weights.values()})
        # A path in a stranger's index could otherwise name any file of this machine.
        outside = [name for name in names if Path(name).name != name]
        if outside:
            raise WeightError(f"{index}: names files outside its folder: {outside[:3]}")
        return [TorchFile(folder / name) for name in names]
    return [TorchFile(folder / _TORCH)] if (folder / _TORCH).is_file() else []


def load(
    folder: str | Path,
    config: ModelConfig,
    shapes: maps.Shapes,
    place: Callable[[str, np.ndarray], Any],
) -> dict[str, Any]:
    """Fill the backbone from a Hugging Face folder.

    Args:
        folder: config.json and safetensors.
        config: the model.
        shapes: our path -> shape of every parameter of the VLA.
        place: (our path, array) -> what to keep.

    Returns:
        Flat tree of the backbone's parameters. Action token and head are not in a VLM.

    Raises:
        WeightError: with the whole key report; nothing is placed then.
    """
    backbone = dataclasses.replace(config.backbone, arch=read_arch(folder, config))
    # The weight map needs all sizes, and the config may say only what differs.
    rows, ignore = maps.hugging_face(dataclasses.replace(config, backbone=backbone))
    files = open_source(folder, config)
    ours = {path: shape for path, shape in shapes.items() if path.startswith("backbone/")}
    leaves = maps.incoming(rows, ours, files, ignore).leaves
    return {path: place(path, leaf.read()) for path, leaf in leaves.items()}
