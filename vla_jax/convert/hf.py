"""Read a Hugging Face model folder: config.json and safetensors, sharded or not, without torch."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from vla_jax.config import ModelConfig
from vla_jax.convert import maps
from vla_jax.models.backbones import BACKBONES
from vla_jax.models.weights import WeightError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Safetensors:
    """The tensors of a folder, by name; nothing is read before it is asked for.

    Attributes:
        shapes: name -> shape of every tensor.
    """

    def __init__(self, folder: str | Path):
        """Open the folder's files.

        Raises:
            WeightError: naming every file that is missing, truncated or not safetensors, and
                every tensor the index promises and its file lacks.
        """
        folder = Path(folder)
        promised: dict[str, str] = {}
        if (folder / INDEX).is_file():
            promised = json.loads((folder / INDEX).read_text())["weight_map"]
            files = sorted(set(promised.values()))
        elif (folder / SINGLE).is_file():
            files = [SINGLE]
        else:
            raise WeightError(f"{folder}: holds neither {SINGLE} nor {INDEX}")
        self._handles: dict[str, Any] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        problems = []
        for name in files:
            try:
                handle = safe_open(folder / name, framework="numpy")
            except (FileNotFoundError, SafetensorError, OSError) as error:
                problems.append(f"{folder / name}: {error}")
                continue
            for key in handle.keys():  # noqa: SIM118 - not a dict
                self._handles[key] = handle
                self.shapes[key] = tuple(handle.get_slice(key).get_shape())
        if not problems:
            problems = [
                f"{key}: listed in {INDEX}, absent from its file"
                for key in promised
                if key not in self.shapes
            ]
        if problems:
            raise WeightError("\n".join(problems))

    def read(self, name: str) -> np.ndarray:
        """One tensor; bfloat16 comes as ml_dtypes.bfloat16."""
        return self._handles[name].get_tensor(name)


def read_arch(folder: str | Path, config: ModelConfig) -> dict[str, Any]:
    """The backbone's architecture: the folder's config.json, then the config's overrides."""
    file, _ = BACKBONES[config.backbone.name]
    base = file.arch(json.loads((Path(folder) / "config.json").read_text()), strict=False)
    return _override(base, config.backbone.arch, file)


def _override(base: dict[str, Any], overrides: Mapping[str, Any], file: Any) -> dict[str, Any]:
    file.arch(overrides)  # refuses unknown keys
    merged = dict(base)
    for key, value in overrides.items():
        merged[key] = {**base[key], **value} if isinstance(value, Mapping) else value
    return merged


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
    files = Safetensors(folder)
    ours = {path: shape for path, shape in shapes.items() if path.startswith("backbone/")}
    return maps.load(rows, ours, files.shapes, files.read, place, ignore)
