"""Configs: their fields with defaults and legal values, and the strict step to them.

`schema` holds the fields, `resolve` makes a `Config` of a raw config, `checks` asks what goes
together, `migrate` reads configs that earlier versions stored.
"""

from vla_jax.config.data import (
    AugmentConfig,
    AugmentParity,
    CotrainConfig,
    DataConfig,
    DataParity,
    DatasetConfig,
    FiltersConfig,
    LanguageConfig,
)
from vla_jax.config.expert import ExpertConfig
from vla_jax.config.fast import FastConfig, FastParity
from vla_jax.config.files import load_config, load_config_file, read_json, unknown_keys
from vla_jax.config.migrate import FORMAT, upgrade
from vla_jax.config.model import (
    BackboneConfig,
    HeadConfig,
    ModelConfig,
    SentenceConfig,
    StructureConfig,
    StructureParity,
)
from vla_jax.config.option import ConfigError
from vla_jax.config.resolve import resolve, to_dict
from vla_jax.config.schema import Config, describe
from vla_jax.config.training import LoraConfig, MeshConfig, OptimConfig, TrainConfig

__all__ = [
    "FORMAT",
    "AugmentConfig",
    "AugmentParity",
    "BackboneConfig",
    "Config",
    "ConfigError",
    "CotrainConfig",
    "DataConfig",
    "DataParity",
    "DatasetConfig",
    "ExpertConfig",
    "FastConfig",
    "FastParity",
    "FiltersConfig",
    "HeadConfig",
    "LanguageConfig",
    "LoraConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimConfig",
    "SentenceConfig",
    "StructureConfig",
    "StructureParity",
    "TrainConfig",
    "describe",
    "load_config",
    "load_config_file",
    "read_json",
    "resolve",
    "to_dict",
    "unknown_keys",
    "upgrade",
]
