"""Where a policy's numbers come from: hashes for score files, ranges for checks before a run."""

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from vla_jax.data.units.normalize import ActionSpec
from vla_jax.inference.execution import Execution
from vla_jax.train import checksum

_DIGITS = 16  # of a hash: enough to tell any two checkpoints apart, short enough to read


def describe(
    checkpoint: str,
    spec: ActionSpec,
    statistics: Mapping[str, Any],
    untrained: bool,
    execution: Execution,
) -> dict[str, Any]:
    """What a policy server says of itself beside the model and its cameras.

    Args:
        checkpoint: hash of the files its weights are from, as `hash_folders` gives.
        spec: units of the actions.
        statistics: of its dataset, as the checkpoint holds them; {} if it has none.
        untrained: the weights are random, not the checkpoint's.
        execution: what of a chunk is executed.

    Returns:
        JSON values: checkpoint, statistics (hashes), untrained, horizon and decay of the execution,
        action (normalization, clip, low and high of the arm in robot units, the gripper's memory,
        gripper_open: the share of training frames with an open gripper, None when unknown or
        without one).
    """
    mean = statistics.get("action", {}).get("mean")
    return {
        "checkpoint": checkpoint,
        "statistics": hash_json(statistics),
        "untrained": untrained,
        "horizon": execution.horizon,
        "decay": execution.decay,
        "action": {
            "normalization": spec.normalization,
            "clip": spec.clip,
            "low": list(spec.low),
            "high": list(spec.high),
            "gripper_repeat": spec.gripper_repeat,
            "gripper_patience": spec.gripper_patience,
            # The mean of commands 0 and 1 is the share of ones.
            "gripper_open": None if mean is None or spec.gripper is None else float(mean[-1]),
        },
    }


def hash_folders(*folders: Path) -> str:
    """SHA-256 over names, sizes and contents of all files below, wherever the folders lie."""
    files = [
        (path.relative_to(folder.parent).as_posix(), path)
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file()
    ]
    # The order of rglob depends on the file system.
    files.sort()
    with ThreadPoolExecutor() as pool:  # hashlib lets go of the lock
        contents = pool.map(checksum.file_digest, [path for _, path in files])
        listing = [
            f"{name} {path.stat().st_size} {content}"
            for (name, path), content in zip(files, contents, strict=True)
        ]
    return hashlib.sha256("\n".join(listing).encode()).hexdigest()[:_DIGITS]


def hash_json(value: Any) -> str:
    """SHA-256 of plain values, whatever the order of their keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]
