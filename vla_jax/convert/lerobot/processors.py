"""LeRobot's processors: what stands before and behind its policy, as it keeps them in a folder.

Two pipelines are JSON files of steps; the statistics lie beside them, in one file for each step
that scales. Source: lerobot 0.6.1 `processor/`, `policies/smolvla/processor_smolvla.py`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vla_jax.config import read_json
from vla_jax.convert.formats.safetensors import SUFFIX, Safetensors, Writer
from vla_jax.convert.hf.files import write_json
from vla_jax.data.units.policy_units import PolicyUnits
from vla_jax.data.units.scaling import RULES

# Of the units -> of LeRobot's datasets and policies.
FEATURES = {"state": "observation.state", "actions": "action"}
# Our rule -> LeRobot's, where the two are the same to the last bit.
MODES = {"lerobot_zscore": "MEAN_STD", "lerobot_quantile": "QUANTILES"}
_BEFORE, _BEHIND = "policy_preprocessor", "policy_postprocessor"
_SCALES, _RESTORES = "normalizer_processor", "unnormalizer_processor"


def statistics(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """Those that a policy's folder has beside its processors: feature -> name -> numbers; or {}."""
    path = folder / f"{_BEFORE}.json"
    if not path.is_file():
        return {}
    files = [
        step["state_file"]
        for step in read_json(path).get("steps", [])
        if step.get("registry_name") == _SCALES and "state_file" in step
    ]
    found: dict[str, dict[str, np.ndarray]] = {}
    for file in files:
        source = Safetensors(folder / file)
        for name in source.shapes:
            feature, _, statistic = name.rpartition(".")
            found.setdefault(feature, {})[statistic] = source.read(name)
    return found


def reason(units: PolicyUnits | None) -> str:
    """Why LeRobot has no processors like these units; "" = it has."""
    if units is None:
        return "the checkpoint has no units"
    rules = units.state.rule, units.actions.rule
    if set(rules) - set(MODES) or units.state.mask or units.actions.mask:
        return f"LeRobot does not scale as {' and '.join(sorted(set(rules)))} does"
    others = {"relative actions": units.relative, "a robot's own joints": units.robot}
    others |= {"a gripper from 0 to 1": units.gripper}
    return ", ".join(f"LeRobot's SmolVLA has no {name}" for name, has in others.items() if has)


def mapping(units: PolicyUnits | None) -> dict[str, str]:
    """`normalization_mapping` of LeRobot's config."""
    found = {"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"}
    if units and not reason(units):
        found |= {"STATE": MODES[units.state.rule], "ACTION": MODES[units.actions.rule]}
    return found


def write(folder: Path, config: Mapping[str, Any], units: PolicyUnits) -> None:
    """Write both pipelines of a SmolVLA.

    Args:
        folder: the policy's.
        config: LeRobot's, complete.
        units: that LeRobot has; see `reason`.
    """
    features = {**config["input_features"], **config["output_features"]}
    scaling = {"eps": 1e-8, "norm_map": config["normalization_mapping"]}
    # LeRobot's commands put the policy's device in its place.
    device = {"device": config["device"] or "cpu", "float_dtype": None}
    words = {
        "max_length": config["tokenizer_max_length"], "task_key": "task", "padding_side": "right",
        "padding": config["pad_language_to"], "truncation": True,
        "tokenizer_name": config["vlm_model_name"],
    }  # fmt: skip
    before = {
        "rename_observations_processor": {"rename_map": {}}, "to_batch_processor": {},
        "smolvla_new_line_processor": {}, "tokenizer_processor": words, "device_processor": device,
        _SCALES: {**scaling, "features": features},
    }  # fmt: skip
    behind = {
        _RESTORES: {**scaling, "features": config["output_features"]},
        "device_processor": {"device": "cpu", "float_dtype": None},
    }
    for name, steps in ((_BEFORE, before), (_BEHIND, behind)):
        rows = []
        for i, (kind, settings) in enumerate(steps.items()):
            rows.append({"registry_name": kind, "config": settings})
            if kind in (_SCALES, _RESTORES):
                rows[-1]["state_file"] = f"{name}_step_{i}_{kind}{SUFFIX}"
                _write_statistics(folder / rows[-1]["state_file"], units)
        write_json(folder / f"{name}.json", {"name": name, "steps": rows})


def _write_statistics(path: Path, units: PolicyUnits) -> None:
    arrays = {
        f"{FEATURES[what]}.{name}": np.asarray(values, np.float32)
        for what, scaling in (("state", units.state), ("actions", units.actions))
        for name, values in zip(
            RULES[scaling.rule].names, (scaling.first, scaling.second), strict=True
        )
    }
    shapes = {name: array.shape for name, array in arrays.items()}
    dtypes = {name: array.dtype for name, array in arrays.items()}
    with Writer(path, shapes, dtypes, None) as writer:
        for name, array in arrays.items():
            writer.write(name, array)
