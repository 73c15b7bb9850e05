"""LeRobot's processors: what stands before and behind its policy, as it keeps them in a folder.

Two pipelines are JSON files of steps; the statistics lie beside them, in one file for each step
that scales. Source: lerobot 0.6.1 `processor/`.
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
# Our rule -> LeRobot's of the same statistics. openpi adds an epsilon to every width, LeRobot none,
# so that it is added to the statistics that are written.
MODES = {
    "lerobot_zscore": "MEAN_STD",
    "lerobot_quantile": "QUANTILES",
    "openpi_zscore": "MEAN_STD",
    "openpi_quantile": "QUANTILES",
}
Steps = dict[str, dict[str, Any]]  # registry name -> settings, in their order
SCALES, RELATIVE = "normalizer_processor", "relative_actions_processor"
_RESTORES, _ABSOLUTE = "unnormalizer_processor", "absolute_actions_processor"
_BEFORE, _BEHIND = "policy_preprocessor", "policy_postprocessor"


def statistics(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """Those that a policy's folder has beside its processors: feature -> name -> numbers; or {}."""
    path = folder / f"{_BEFORE}.json"
    if not path.is_file():
        return {}
    files = [
        step["state_file"]
        for step in read_json(path).get("steps", [])
        if step.get("registry_name") == SCALES and "state_file" in step
    ]
    features: dict[str, dict[str, np.ndarray]] = {}
    for file in files:
        source = Safetensors(folder / file)
        for name in source.shapes:
            feature, _, statistic = name.rpartition(".")
            features.setdefault(feature, {})[statistic] = source.read(name)
    return features


def reason(units: PolicyUnits | None, relative: bool) -> str:
    """Why LeRobot has no processors like these units; "" = it has.

    Args:
        units: the checkpoint's.
        relative: whether the policy's processors can count actions from the state.
    """
    if units is None:
        return "the checkpoint has no units"
    rules = units.state.rule, units.actions.rule
    if set(rules) - set(MODES) or units.state.mask or units.actions.mask:
        return f"LeRobot does not scale as {' and '.join(sorted(set(rules)))} does"
    unknown = {"a robot's own joints": units.robot, "a gripper from 0 to 1": units.gripper}
    if not relative:
        unknown |= {"relative actions": units.relative}
    return ", ".join(f"LeRobot's policy has no {name}" for name, has in unknown.items() if has)


def mapping(units: PolicyUnits | None) -> dict[str, str]:
    """`normalization_mapping` of LeRobot's config.

    Args:
        units: that LeRobot has; see `reason`.
    """
    modes = {"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"}
    if units:
        modes |= {"STATE": MODES[units.state.rule], "ACTION": MODES[units.actions.rule]}
    return modes


def words(vlm: str, length: int, padding: str) -> dict[str, Any]:
    """Settings of the step that tokenizes.

    Args:
        vlm: name or folder of the tokenizer.
        length: text columns.
        padding: to "longest" or "max_length".
    """
    return {
        "max_length": length, "task_key": "task", "padding_side": "right", "padding": padding,
        "truncation": True, "tokenizer_name": vlm,
    }  # fmt: skip


def device(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the step that moves a batch to the policy's device."""
    # LeRobot's commands put the policy's device in its place.
    return {"device": config["device"] or "cpu", "float_dtype": None}


def write(folder: Path, config: Mapping[str, Any], units: PolicyUnits, before: Steps) -> None:
    """Write both pipelines of a policy.

    Args:
        folder: the policy's.
        config: LeRobot's, complete.
        units: that LeRobot has; see `reason`.
        before: the steps before the policy; `SCALES` gets its settings here.
    """
    features = {**config["input_features"], **config["output_features"]}
    # The epsilon of LeRobot's own policies.
    scaling = {"eps": 1e-8, "norm_map": config["normalization_mapping"]}
    behind: Steps = {_RESTORES: {**scaling, "features": config["output_features"]}}
    if RELATIVE in before:
        behind[_ABSOLUTE] = {"enabled": before[RELATIVE]["enabled"]}
    # Robots are commanded from the host.
    behind["device_processor"] = {"device": "cpu", "float_dtype": None}
    before = {**before, SCALES: {**scaling, "features": features}}
    for name, steps in ((_BEFORE, before), (_BEHIND, behind)):
        rows = []
        for i, (kind, settings) in enumerate(steps.items()):
            rows.append({"registry_name": kind, "config": settings})
            if kind in (SCALES, _RESTORES):
                rows[-1]["state_file"] = f"{name}_step_{i}_{kind}{SUFFIX}"
                _write_statistics(folder / rows[-1]["state_file"], units)
        write_json(folder / f"{name}.json", {"name": name, "steps": rows})


def _write_statistics(path: Path, units: PolicyUnits) -> None:
    arrays: dict[str, np.ndarray] = {}
    for group, scaling in (("state", units.state), ("actions", units.actions)):
        rule = RULES[scaling.rule]
        # LeRobot's own epsilon is its processor's, and only where a width is 0.
        epsilon = rule.back if not rule.only_zero else 0.0
        second = np.asarray(scaling.second, np.float64) + epsilon
        for name, values in zip(rule.names, (scaling.first, second), strict=True):
            arrays[f"{FEATURES[group]}.{name}"] = np.asarray(values, np.float32)
    shapes = {name: array.shape for name, array in arrays.items()}
    dtypes = {name: array.dtype for name, array in arrays.items()}
    with Writer(path, shapes, dtypes, None) as writer:
        for name, array in arrays.items():
            writer.write(name, array)
