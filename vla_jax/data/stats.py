"""Exact statistics of a dataset's actions and proprioception, in openvla's JSON schema."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32


def statistics(
    actions: Float32[np.ndarray, "n a"],
    proprio: Float32[np.ndarray, "n p"] | None,
    num_trajectories: int,
    mask: Sequence[bool] | None = None,
) -> dict[str, Any]:
    """Mean, std, min, max and exact 1 % and 99 % quantiles of every dimension.

    Args:
        actions: standardised, not normalised, over all frames that are used for training.
        proprio: the same frames' robot state, or None.
        num_trajectories: recorded beside the number of frames.
        mask: True on the dimensions that normalisation scales; all but the last, which is the
            gripper, if it is not given.

    Returns:
        JSON-serialisable; `action.mask` is the mask.
    """
    dim = actions.shape[1]
    scaled = [True] * (dim - 1) + [False] if mask is None else list(mask)
    found: dict[str, Any] = {"action": _columns(actions) | {"mask": scaled}}
    if proprio is not None:
        found["proprio"] = _columns(proprio)
    return found | {"num_transitions": len(actions), "num_trajectories": num_trajectories}


def _columns(values: Float32[np.ndarray, "n d"]) -> dict[str, list[float]]:
    # Sums in float64: a float32 mean over millions of frames is off by more than a grey level of
    # the quantisation the statistics are used for.
    return {
        "mean": values.mean(axis=0, dtype=np.float64).tolist(),
        "std": values.std(axis=0, dtype=np.float64).tolist(),
        "min": values.min(axis=0).tolist(),
        "max": values.max(axis=0).tolist(),
        "q01": [float(np.quantile(column, 0.01)) for column in values.T],
        "q99": [float(np.quantile(column, 0.99)) for column in values.T],
    }


def save(path: Path, found: Mapping[str, Any]) -> None:
    """Writes {dataset: statistics} as JSON, beside first and then renamed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(found, indent=1), encoding="utf-8")
    os.replace(temporary, path)


def load(path: Path) -> dict[str, Any]:
    """Inverse of `save`; also reads openvla's dataset_statistics.json."""
    return json.loads(path.read_text(encoding="utf-8"))
