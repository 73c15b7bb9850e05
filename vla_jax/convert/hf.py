"""A Hugging Face model folder as a source of weights, without torch."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vla_jax.config import ModelConfig
from vla_jax.convert import maps
from vla_jax.convert.safetensors_io import Safetensors
from vla_jax.convert.tensors import Renamed, Source
from vla_jax.models.backbones import BACKBONES
from vla_jax.models.backbones.base import merge_arch


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
    file, _ = BACKBONES[config.backbone.name]
    found = json.loads((Path(folder) / "config.json").read_text()) if folder else {}
    if hasattr(file, "from_shapes"):
        if shapes is None:
            shapes = open_source(folder, config).shapes if folder else {}
        base = merge_arch(file.arch(file.from_shapes(shapes)), found, strict=False)
    else:
        base = file.arch(found, strict=False)
    return override(base, config.backbone.arch, file)


def override(base: dict[str, Any], overrides: Mapping[str, Any], file: Any) -> dict[str, Any]:
    """`base` with a config's overrides, whose keys must be the backbone's."""
    file.arch(overrides)  # refuses unknown keys
    merged = dict(base)
    for key, value in overrides.items():
        merged[key] = {**base[key], **value} if isinstance(value, Mapping) else value
    return merged


def open_source(folder: str | Path, config: ModelConfig) -> Source:
    """The tensors of a Hugging Face folder under the names of the backbone's weight map.

    Raises:
        WeightError: no safetensors there, or damaged ones.
    """
    file, _ = BACKBONES[config.backbone.name]
    return Renamed(Safetensors(folder), getattr(file, "RENAMES", ()))


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
    rows, ignore = maps.hugging_face(config)
    files = open_source(folder, config)
    ours = {path: shape for path, shape in shapes.items() if path.startswith("backbone/")}
    leaves = maps.incoming(rows, ours, files, ignore).leaves
    return {path: place(path, leaf.read()) for path, leaf in leaves.items()}
