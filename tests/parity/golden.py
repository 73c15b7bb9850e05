"""Read golden folders: arrays, weights (stored, or rebuilt from name and shape), configs."""

import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file


def arrays(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / "io.npz") as z:
        return {k: z[k] for k in z.files}


def config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    return json.loads((folder / name).read_text())


def weights(folder: Path) -> dict[str, np.ndarray]:
    """Name -> float32 array, aliases included."""
    path = folder / "model_params.json"
    info = json.loads(path.read_text()) if path.is_file() else {}
    if (folder / "model.safetensors").is_file():
        params = load_file(folder / "model.safetensors")
    else:
        params = {k: _rebuild(k, **s) for k, s in info["procedural_spec"].items()}
    for alias, original in info.get("aliases", {}).items():
        if original in params:
            params[alias] = params[original]
    return params


def _rebuild(
    name: str, shape: list[int], seed: int, kind: str, gain: float = 1.0, post: str = ""
) -> np.ndarray:
    """The tensor that name, shape and seed stand for (numpy's legacy generator is bit-stable)."""
    state = np.random.RandomState((zlib.crc32(name.encode()) + 7919 * seed) & 0x7FFFFFFF)
    x = state.standard_normal(tuple(shape))
    if kind == "matrix":
        x = x * (gain / math.sqrt(math.prod(shape[1:])))
    elif kind == "norm1":
        x = 1.0 + 0.1 * x
    else:
        x = x * {"bias": 0.1, "norm0": 0.1}.get(kind, 0.5)
    x = np.asarray(x, np.float32)
    return np.abs(x) if post == "abs" else x
