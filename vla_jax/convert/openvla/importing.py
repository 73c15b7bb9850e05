"""OpenVLA's and OpenVLA-OFT's folders -> ours.

A folder is a Hugging Face folder whose config asks for code beside it, which is neither needed nor
run: sizes are read off config.json and the tensors. OFT's further files stand beside it, see
`source`. Units are those of dataset_statistics.json, or of `norm_stats` in config.json.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vla_jax.config import Config, ConfigError, ModelConfig, read_json, resolve, to_dict
from vla_jax.convert import maps
from vla_jax.convert.hf import source as hf
from vla_jax.convert.importing import Import, complete, tokenizer_json
from vla_jax.convert.openvla import names
from vla_jax.convert.openvla.source import Opened, open_folder
from vla_jax.data.find_spec import find_spec
from vla_jax.data.units.foreign_statistics import read_statistics
from vla_jax.data.units.normalize import ActionSpec
from vla_jax.data.units.policy_units import PolicyUnits
from vla_jax.data.units.scaling import Scaling
from vla_jax.models.backbones.base import count_layers

STATISTICS = "dataset_statistics.json"


def from_openvla(
    folder: str | Path,
    raw: Mapping[str, Any],
    base: str | Path | None = None,
    dtype: np.dtype | None = None,
) -> Import:
    """A folder of OpenVLA or OpenVLA-OFT.

    Args:
        folder: see `source`.
        raw: our raw config, such as configs/openvla_oft_libero.py.
        base: folder of the VLM, where `folder` has only an adapter to it.
        dtype: of all parameters; None keeps each one's.

    Raises:
        WeightError: the whole key report, or why the files cannot be read.
        ConfigError: the config is not of this model, or the statistics do not fit it.
    """
    root = Path(folder).expanduser()
    config = resolve(raw)
    if config.model.backbone.name != "prismatic":
        raise ConfigError(f"model.backbone.name: OpenVLA is 'prismatic', not {raw['model']!r}")
    opened = open_folder(root, config.model, Path(base).expanduser() if base else None)
    config = dataclasses.replace(config, model=_with_sizes(config.model, opened))
    arch = hf.read_arch(opened.vlm, config.model, opened.tensors.shapes)
    _, config, shapes = complete(config, arch, opened.vlm)
    rows, ignore = names.rows(config.model)
    part = maps.incoming(rows, shapes, opened.tensors, ignore, dtype)
    statistics = _statistics(root, opened.vlm)
    entries = {name: _entry(name, entry, config) for name, entry in statistics.items()}
    meta = {
        "config": to_dict(config),
        "statistics": {},
        "action_specs": {name: spec.to_json() for name, (spec, _) in entries.items()},
        "units": {name: units.to_json() for name, (_, units) in entries.items()},
        "tokenizer": tokenizer_json(opened.vlm, config),
        "origin": {
            "kind": "openvla",
            **hf.origin(opened.vlm),
            "parts": opened.parts,
            "wrapped": list(opened.wrapped),
            "factors": opened.factors,
            "norm_stats": _stored_statistics(root),
        },
    }
    return Import(config, part.leaves, meta, (), part.changed, part.unused)


def _with_sizes(model: ModelConfig, opened: Opened) -> ModelConfig:
    """The model with the head's sizes and the image statistics that the folder has."""
    shapes, arch, head = opened.tensors.shapes, dict(model.backbone.arch), model.head
    processor = opened.vlm / "preprocessor_config.json"
    described = read_json(processor) if processor.is_file() else {}
    # What the config says itself comes before the folder's.
    arch = {key: described[key] for key in ("means", "stds") if key in described} | arch
    # torch keeps a linear map as [out, in], so the first size is the hidden layer's.
    first = shapes.get(f"{names.HEAD}/model.fc1.weight")
    if head.kind == "l1" and first:
        blocks = count_layers(shapes, f"{names.HEAD}/model.mlp_resnet_blocks.")
        options: Any = head  # of its kind's class
        head = dataclasses.replace(options, hidden=first[0], layers=blocks)
    backbone = dataclasses.replace(model.backbone, arch=arch)
    return dataclasses.replace(model, backbone=backbone, head=head)


def _stored_statistics(root: Path) -> dict[str, Any]:
    path = root / STATISTICS
    return read_json(path) if path.is_file() else {}


def _statistics(root: Path, vlm: Path) -> dict[str, Any]:
    """Dataset -> entry; {} where nothing says any."""
    if (root / STATISTICS).is_file():
        return read_statistics(root / STATISTICS)
    path = vlm / "config.json"
    return read_statistics(path) if read_json(path).get("norm_stats") else {}


def _entry(name: str, entry: Mapping[str, Any], config: Config) -> tuple[ActionSpec, PolicyUnits]:
    """What a policy needs of a dataset: the size of its actions, and their units."""
    dim, state = config.model.action_dim, entry.get("proprio")
    sizes = {len(values) for values in entry["action"].values()}
    if sizes != {dim}:
        raise ConfigError(f"statistics: {name!r}: actions of {sizes} numbers, the model has {dim}")
    try:
        spec = find_spec(name)
    except KeyError:
        # Its gripper then stays as it is recorded, 1 = open and 0 = closed.
        spec = None
    commands = spec.gripper_env if spec else None
    rule = config.data.units
    # A model that takes no state needs no statistics of it.
    statistics = {"actions": entry["action"], "state": state or entry["action"]}
    try:
        units = PolicyUnits.from_statistics(statistics, rule, gripper=commands)
    except (KeyError, ValueError) as error:
        raise ConfigError(f"data.units: statistics of {name!r}: {error}") from error
    if state is None:
        if config.model.structure.proprio:
            raise ConfigError(f"statistics: {name!r}: none of the state, which the model takes")
        units = dataclasses.replace(units, state=Scaling(rule, (), ()))
    ends = (-1.0,) * (dim - 1), (1.0,) * (dim - 1)
    # The units restore the actions; the spec only says how many numbers they have.
    plain = ActionSpec(
        dim, "none", 1.0, *ends, gripper_env=(0.0, 1.0), hz=spec.hz if spec else None
    )
    return plain, units
