"""openpi's checkpoints -> ours: pi0, pi0.5 and pi0-FAST, of the JAX trainer or the torch port.

A folder has `params/` (Orbax; the average where the run kept one) or `model.safetensors`, and
mostly `assets/ASSET/norm_stats.json`; LeRobot's have `config.json` and the statistics beside their
processors. It has no sizes and no tokenizer: sizes are read off the
tensors as far as they tell, the tokenizer is PaliGemma's own. The FAST tokenizer of pi0-FAST is
named by `model.fast.dir`.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vla_jax.config import Config, ConfigError, read_json, resolve, to_dict
from vla_jax.convert import answers, maps
from vla_jax.convert.formats.safetensors import SUFFIX, Safetensors
from vla_jax.convert.importing import Import, shapes_of
from vla_jax.convert.lerobot import processors
from vla_jax.convert.openpi import names
from vla_jax.convert.openpi.lora import Merged
from vla_jax.convert.openpi.source import OrbaxParams, Unstacked
from vla_jax.convert.tensors import Renamed, Source, Without
from vla_jax.data.language.tokenizer import Tokenizer
from vla_jax.data.units.normalize import ActionSpec
from vla_jax.data.units.policy_units import PolicyUnits
from vla_jax.inference.policy import with_complete_arch
from vla_jax.models import vla
from vla_jax.models.weights import WeightError

STATISTICS, CONFIG = "norm_stats.json", "config.json"


def from_openpi(
    folder: str | Path,
    raw: Mapping[str, Any],
    tokenizer: str | Path | None = None,
    asset: str = "",
    dtype: np.dtype | None = None,
) -> Import:
    """A checkpoint of openpi, or a folder of LeRobot's pi0 and pi0.5 with the same names.

    Args:
        folder: with `params/` or `model.safetensors`.
        raw: our raw config, such as configs/pi05_libero.py.
        tokenizer: folder with PaliGemma's tokenizer; None = none, to be trained and not served.
        asset: name of the folder below `assets/` whose statistics are taken; "" = the only one.
        dtype: of all parameters; None keeps each one's.

    Raises:
        WeightError: the whole key report, or why the files cannot be read.
        ConfigError: the config is not of this model, or the statistics are not to be found.
    """
    root = Path(folder).expanduser()
    config = resolve(raw)
    if (name := config.model.backbone.name) != "paligemma":
        raise ConfigError(
            f"model.backbone.name: {name!r}, and the models of openpi are paligemma: "
            "--config=configs/pi05_libero.py, pi0_libero.py, pi0fast_libero.py or one like them"
        )
    source, rows_of, ignore, sizes = _open(root, config)
    config = _with_sizes(config, sizes)
    model = vla.build(config.model)
    config = with_complete_arch(config, model.arch)
    words = Tokenizer.from_dir(tokenizer, plain=True) if tokenizer else None
    # Without either tokenizer the weights can be trained on, which brings both.
    if words and config.model.fast.dir and vla.written(config.model):
        code = answers.with_code(model, words, {}).fast.code
        fast = dataclasses.replace(config.model.fast, code=code)
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, fast=fast))
    rows = rows_of(model.config, model.arch)
    part = maps.incoming(rows, shapes_of(model), source, ignore, dtype)
    statistics = _statistics(root, asset)
    settings = read_json(root / CONFIG) if (root / CONFIG).is_file() else {}
    name = config.data.datasets[0].spec
    meta = {
        "config": to_dict(config),
        "statistics": {},
        "action_specs": {name: _spec(config.model.action_dim).to_json()},
        "units": {name: units(config, statistics).to_json()} if statistics else {},
        "tokenizer": words.to_json() if words else "",
        "origin": {
            "kind": "openpi",
            "asset": asset,
            "norm_stats": statistics,
            # LeRobot's own, of which an export keeps what our config does not say.
            "config": settings if "type" in settings else {},
        },
    }
    return Import(config, part.leaves, meta, (), part.changed, part.unused)


def units(config: Config, statistics: Mapping[str, Any]) -> PolicyUnits:
    """The robot's units, of a norm_stats.json.

    Args:
        config: `data.units` is the rule, `data.relative` and `data.robot` the rest.
        statistics: of "state" and "actions".

    Raises:
        ConfigError: the config names no rule, or the statistics lack what it needs.
    """
    data = config.data
    try:
        robot_units = PolicyUnits.from_statistics(statistics, data.units, data.relative, data.robot)
    except ValueError as error:
        raise ConfigError(f"data.units: {error}") from error
    return dataclasses.replace(robot_units, dim=config.model.action_dim)


def _spec(dim: int) -> ActionSpec:
    """What a checkpoint says of its robot beside the units: no more than the size of an action."""
    ends = (-1.0,) * (dim - 1), (1.0,) * (dim - 1)
    return ActionSpec(dim, "none", 1.0, *ends, gripper_env=(0.0, 1.0))


def arch_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """PaliGemma's architecture, read off the shapes of its JAX parameters."""
    image, text = "PaliGemma/img/", "PaliGemma/llm/layers/"
    block = image + "Transformer/encoderblock/"
    # Flax keeps a convolution's kernel as [height, width, in, out].
    side, _, _, wide = shapes[image + "embedding/kernel"]
    layers, _, heads, _ = shapes[block + "MultiHeadDotProductAttention_0/query/kernel"]
    patches = shapes[image + "pos_embedding"][1]
    vocab, width = shapes["PaliGemma/llm/embedder/input_embedding"]
    depth, hidden, _ = shapes[text + "mlp/linear"]
    _, text_heads, head, _ = shapes[text + "attn/attn_vec_einsum/w"]
    # Without this tensor there is one fused qkv: as many key heads as heads.
    shared = shapes.get(text + "attn/kv_einsum/w")
    return {
        "hidden_size": width,
        "projection_dim": width,
        "vision_config": {
            "hidden_size": wide,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "intermediate_size": shapes[block + "MlpBlock_0/Dense_0/bias"][1],
            "patch_size": side,
            # Images are square, so the number of patches is a square number.
            "image_size": side * round(patches**0.5),
        },
        "text_config": {
            "vocab_size": vocab,
            "hidden_size": width,
            "num_hidden_layers": depth,
            "num_attention_heads": text_heads,
            "num_key_value_heads": shared[2] if shared else text_heads,
            "head_dim": head,
            "intermediate_size": hidden,
        },
    }


def expert_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The expert's settings, read off the same shapes; {} of pi0-FAST, which has none."""
    if "action_in_proj/kernel" not in shapes:
        return {}
    # The actions of all robots are padded to one width, the input of this map.
    padded, width = shapes["action_in_proj/kernel"]
    adaptive = "time_mlp_in/kernel" in shapes
    return {
        "width": width,
        "hidden": shapes["PaliGemma/llm/layers/mlp_1/linear"][1],
        "adaptive": adaptive,
        "state": "expert" if "state_proj/kernel" in shapes else "none",
        "padded": padded,
    }


def _open(root: Path, config: Config) -> tuple[Source, Any, tuple[str, ...], dict[str, Any]]:
    """The tensors, what maps them, names to pass over, and the sizes they tell."""
    if (root / f"model{SUFFIX}").is_file():
        source = _torch(Safetensors(root / f"model{SUFFIX}"))
        return source, names.torch_rows, names.TORCH_IGNORE, {}
    if not (root / "params").is_dir():
        raise WeightError(f"{root}: neither params/ nor model{SUFFIX}")
    merged = Merged(OrbaxParams(root / "params"))
    try:
        sizes = {"arch": arch_of(merged.shapes), "expert": expert_of(merged.shapes)}
    except (KeyError, IndexError, ValueError) as error:
        raise WeightError(f"{root}: not openpi's parameters: no {error}") from error
    # Merging comes first, as factors are stacked like their weights.
    return Unstacked(merged), names.jax_rows, (), sizes


def _torch(source: Source) -> Source:
    """The torch port's tensors under openpi's names."""
    # LeRobot's files have a word before every name.
    source = Renamed(source, [(r"model\.", "")])
    if names.TORCH_WORDS not in source.shapes:
        return source
    # Of LeRobot's two tables, which it does not tie, this one is read; the head keeps what it was
    # before training.
    source = Without(source, names.TORCH_TABLE)
    return Renamed(source, [(re.escape(names.TORCH_WORDS), names.TORCH_TABLE)])


def _with_sizes(config: Config, sizes: Mapping[str, Any]) -> Config:
    """The config with the checkpoint's sizes; what it is besides is the config's affair."""
    if not sizes:
        return config
    model, expert = config.model, sizes["expert"]
    if bool(expert) != (model.structure.kind == "expert"):
        stored = "pi0 or pi0.5, with an expert" if expert else "pi0-FAST, without an expert"
        raise ConfigError(
            f"this checkpoint is of another model: it is {stored}, model.structure.kind is "
            f"{model.structure.kind!r}"
        )
    # These two make it another model; the sizes below only scale it.
    differs = [
        f"model.expert.{name}: {getattr(model.expert, name)!r}, the checkpoint has {expert[name]!r}"
        for name in ("adaptive", "state")
        if expert and getattr(model.expert, name) != expert[name]
    ]
    if differs:
        raise ConfigError("this checkpoint is of another model:\n  " + "\n  ".join(differs))
    arch = {**model.backbone.arch, **sizes["arch"]}
    model = dataclasses.replace(
        model,
        backbone=dataclasses.replace(model.backbone, arch=arch),
        expert=dataclasses.replace(model.expert, **expert),
    )
    return dataclasses.replace(config, model=model)


def _statistics(root: Path, asset: str) -> dict[str, Any]:
    """`norm_stats` of one asset, or LeRobot's in their form; {} where the checkpoint has none."""
    by_asset = {path.parent.name: path for path in sorted(root.glob(f"assets/**/{STATISTICS}"))}
    if asset and asset not in by_asset:
        raise ConfigError(f"{root}: no statistics of {asset!r}; there are {sorted(by_asset)}")
    if len(by_asset) > 1 and not asset:
        raise ConfigError(f"{root}: statistics of {sorted(by_asset)}: choose one with --asset")
    if not by_asset:
        beside = processors.statistics(root)
        return {
            ours: {name: np.ravel(values).tolist() for name, values in beside[feature].items()}
            for ours, feature in processors.FEATURES.items()
            if feature in beside
        }
    raw = read_json(by_asset[asset] if asset else next(iter(by_asset.values())))
    # openpi wraps the statistics in this key; a bare file is taken as well.
    return raw.get("norm_stats", raw)
