"""LeRobot's SmolVLA -> ours.

A folder has `model.safetensors`, mostly `config.json`, and since LeRobot 0.4 the statistics beside
its processors. Sizes are read off the tensors but for the heads, which our config says; the
tokenizer is SmolVLM's own, and units that the folder lacks are those of the dataset's stats.json.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vla_jax.config import Config, ConfigError, read_json, resolve, to_dict
from vla_jax.convert import maps
from vla_jax.convert.formats.safetensors import SUFFIX, Safetensors
from vla_jax.convert.importing import Import, shapes_of
from vla_jax.convert.lerobot import names, processors
from vla_jax.data.language.tokenizer import Tokenizer
from vla_jax.data.units.normalize import ActionSpec
from vla_jax.data.units.policy_units import PolicyUnits
from vla_jax.inference.policy import with_complete_arch
from vla_jax.models import vla
from vla_jax.models.backbones.base import count_layers
from vla_jax.models.weights import WeightError

MODEL, CONFIG = f"model{SUFFIX}", "config.json"


def from_lerobot(
    folder: str | Path,
    raw: Mapping[str, Any],
    tokenizer: str | Path | None = None,
    statistics: str | Path | None = None,
    dtype: np.dtype | None = None,
) -> Import:
    """A folder of LeRobot's SmolVLA.

    Args:
        folder: with model.safetensors.
        raw: our raw config, such as configs/smolvla.py.
        tokenizer: folder with SmolVLM's tokenizer; None = none, to be trained and not served.
        statistics: meta/stats.json of the dataset the policy was trained on; None = the folder's
            own, or no units.
        dtype: of all parameters; None keeps each one's.

    Raises:
        WeightError: the whole key report, or why the file cannot be read.
        ConfigError: the config or the statistics are not of this model.
    """
    root = Path(folder).expanduser()
    if not (root / MODEL).is_file():
        raise WeightError(f"{root}: no {MODEL}")
    source = Safetensors(root / MODEL)
    config = _with_layers(resolve(raw), source.shapes)
    model: Any = vla.build(config.model)
    config = with_complete_arch(config, model.arch)
    part = maps.incoming(names.rows(model), shapes_of(model), source, (), dtype)
    name, dim = config.data.datasets[0].spec, config.model.action_dim
    # The units restore the actions; the spec only says how many numbers they have.
    spec = ActionSpec(dim, "none", 1.0, (-1.0,) * (dim - 1), (1.0,) * (dim - 1), (0.0, 1.0))
    recorded = read_json(statistics) if statistics else processors.statistics(root) or None
    where = statistics or root
    meta = {
        "config": to_dict(config),
        "statistics": {},
        "action_specs": {name: spec.to_json()},
        "units": {name: _units(config, recorded, where).to_json()} if recorded is not None else {},
        "tokenizer": Tokenizer.from_dir(tokenizer, plain=True).to_json() if tokenizer else "",
        "origin": {"kind": "lerobot", "config": _settings(root)},
    }
    return Import(config, part.leaves, meta, (), part.changed, part.unused)


def _with_layers(config: Config, shapes: Mapping[str, tuple[int, ...]]) -> Config:
    """The config with as many layers as the file has, of the VLM and of the expert."""
    vlm, expert = names.VLM_LAYERS, names.EXPERT_LAYERS
    try:
        text, expert_layers = (count_layers(shapes, prefix) for prefix in (vlm, expert))
    except ValueError as error:
        raise WeightError(f"not SmolVLA's: no {vlm}* and {expert}*") from error
    arch = dict(config.model.backbone.arch)
    # SmolVLA keeps only the first layers of its VLM, whose config.json names all of them.
    arch["text_config"] = {**arch.get("text_config", {}), "num_hidden_layers": text}
    model = dataclasses.replace(
        config.model,
        backbone=dataclasses.replace(config.model.backbone, arch=arch),
        # 0 stands for as many layers as the VLM has, as it does in our own configs.
        expert=dataclasses.replace(
            config.model.expert, layers=expert_layers if expert_layers != text else 0
        ),
    )
    return dataclasses.replace(config, model=model)


def _settings(root: Path) -> dict[str, Any]:
    """LeRobot's own config, of which an export keeps what our config does not say."""
    return read_json(root / CONFIG) if (root / CONFIG).is_file() else {}


def _units(config: Config, raw: Mapping[str, Any], path: str | Path) -> PolicyUnits:
    statistics = {ours: raw.get(foreign, {}) for ours, foreign in processors.FEATURES.items()}
    try:
        units = PolicyUnits.from_statistics(statistics, config.data.units, config.data.relative)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error
    return dataclasses.replace(units, dim=config.model.action_dim)
