"""Exact statistics of a dataset's actions and proprioception, in openvla's JSON schema."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from vla_jax.data.cache import cached_json

FORMAT = 1  # of the cached statistics; part of their digest


def statistics(
    actions: Float32[np.ndarray, "n a"],
    proprio: Float32[np.ndarray, "n p"] | None,
    num_trajectories: int,
    mask: Sequence[bool] | None = None,
) -> dict[str, Any]:
    """Mean, std, min, max and exact 1 % and 99 % quantiles of every dimension.

    Args:
        actions: standardized, not normalized, over all frames that are used for training.
        proprio: the same frames' robot state, or None.
        num_trajectories: recorded beside the number of frames.
        mask: True on the dimensions that normalization scales; all but the last, which is the
            gripper, if it is not given.

    Returns:
        JSON-serializable; `action.mask` is the mask.
    """
    dim = actions.shape[1]
    # Openvla's files have the same default: the gripper stays 0 to 1.
    scaled = [True] * (dim - 1) + [False] if mask is None else list(mask)
    entry: dict[str, Any] = {"action": columns(actions) | {"mask": scaled}}
    if proprio is not None:
        entry["proprio"] = columns(proprio)
    return entry | {"num_transitions": len(actions), "num_trajectories": num_trajectories}


def cached_statistics(
    name: str,
    actions: Float32[np.ndarray, "n a"],
    proprio: Float32[np.ndarray, "n p"] | None,
    num_trajectories: int,
    mask: Sequence[bool],
    directory: Path | None,
    cache_dir: str = "",
    rebuild: bool = False,
) -> dict[str, Any]:
    """`statistics`, kept in a file beside the index: `<name>-statistics-<digest>.json`.

    The digest is of the numbers themselves, so that whatever changes them (the episodes, the spec,
    the filters, the part held out) asks for another file. `data.statistics` reads such a file.

    Args:
        name: the dataset's, by which the file keys its statistics.
        actions: as for `statistics`.
        proprio: as for `statistics`.
        num_trajectories: as for `statistics`.
        mask: as for `statistics`.
        directory: the data; see `vla_jax.data.cache.cached_folder`.
        cache_dir: where indices live.
        rebuild: measure anew even if there is such a file.
    """
    shapes = [FORMAT, name, actions.shape, None if proprio is None else proprio.shape]
    identity = json.dumps([*shapes, num_trajectories, list(mask)])
    digest = hashlib.sha256(identity.encode())
    for numbers in (actions, proprio):
        if numbers is not None:
            # The digest reads the array's memory, so that millions of frames are not copied.
            digest.update(np.ascontiguousarray(numbers).data)

    def measure() -> dict[str, Any]:
        return {name: statistics(actions, proprio, num_trajectories, mask)}

    file = f"{name}-statistics-{digest.hexdigest()[:16]}.json"
    return cached_json(directory, cache_dir, file, rebuild, measure)[name]


def columns(values: Float32[np.ndarray, "n d"]) -> dict[str, list[float]]:
    """Mean, std, extremes and quantiles of every column."""
    # Sums in float64: a float32 mean over millions of frames is off by more than a gray level of
    # the quantization the statistics are used for.
    return {
        "mean": values.mean(axis=0, dtype=np.float64).tolist(),
        "std": values.std(axis=0, dtype=np.float64).tolist(),
        "min": values.min(axis=0).tolist(),
        "max": values.max(axis=0).tolist(),
        # One column at a time, as numpy copies what it takes quantiles of.
        "q01": [float(np.quantile(column, 0.01)) for column in values.T],
        "q99": [float(np.quantile(column, 0.99)) for column in values.T],
    }
