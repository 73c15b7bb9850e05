"""Frozen configuration dataclasses and the one strict step from a config file to them.

Config files (`configs/*.py`) build an `ml_collections.ConfigDict`; `resolve` turns it into a
`Config` once, at the edge. Nothing below `launch/` sees a ConfigDict. Defaults live in
`configs/base.py` and nowhere else; here are names, types and legal values.
"""

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vla_jax.config.checks import cross_checks


class ConfigError(ValueError):
    """A config that cannot be used; the message lists every problem."""


def choice(*options: str) -> Any:
    """A string field restricted to `options`."""
    return field(metadata={"choices": options})


@dataclass(frozen=True)
class BackboneConfig:
    """The pretrained VLM: which one, from where, and overrides of its HF config.json."""

    name: str
    hf_dir: str
    arch: dict[str, Any]


@dataclass(frozen=True)
class StructureConfig:
    """How history and action meet the VLM."""

    kind: str
    window: int
    chunk: int
    latent: int
    cameras: tuple[str, ...]
    text_len: int
    resampler: int
    proprio: int
    slide: int
    act_insert: str = choice("per_row", "padded_column")
    readout: str = choice("action", "text", "vision", "all")


@dataclass(frozen=True)
class HeadConfig:
    """How features become actions."""

    kind: str
    hidden: int
    layers: int
    heads: int
    sampling_steps: int
    noise_levels: int
    bins: int
    token_end: int
    low: float
    high: float
    vocabulary: str = choice("actions", "all")
    down_sample: str = choice("none", "pooling", "resampler")


@dataclass(frozen=True)
class SentenceConfig:
    """Auxiliary target: a text encoder's vector of the instruction."""

    dir: str
    dim: int
    weight: float


@dataclass(frozen=True)
class ModelConfig:
    """Backbone x structure x head, and how they are computed."""

    backbone: BackboneConfig
    structure: StructureConfig
    head: HeadConfig
    sentence: SentenceConfig
    action_dim: int
    dropout: bool
    dtype: str = choice("float32", "bfloat16")
    remat: str = choice("full", "dots", "none")


@dataclass(frozen=True)
class DatasetConfig:
    """One dataset of the mixture."""

    spec: str
    dir: str
    weight: float


@dataclass(frozen=True)
class CotrainConfig:
    """Texts about images that are trained on beside the actions."""

    path: str
    images: str
    rows: int
    text_len: int
    prompt: str


@dataclass(frozen=True)
class FiltersConfig:
    """Which trajectories and windows are used."""

    language: tuple[str, ...]
    not_language: tuple[str, ...]
    episodes: str
    few_shot: int
    few_shot_seed: int
    noop: float


@dataclass(frozen=True)
class LanguageConfig:
    """What a sample is told."""

    paraphrases: str
    paraphrase: float
    dropout: float


@dataclass(frozen=True)
class DataConfig:
    """The mixture and how trajectories become samples."""

    datasets: tuple[DatasetConfig, ...]
    cotrain: CotrainConfig
    filters: FiltersConfig
    language: LanguageConfig
    left_pad: bool
    random_goal: bool
    padded_rows: bool
    train_split: str
    val_split: str
    val_fraction: float
    clip: float
    cache_dir: str
    threads: int
    prefetch: int
    block: int
    pool: int
    statistics: str
    constant_to_zero: bool
    variant: str = choice("default", "openvla", "octo")
    gripper: str = choice("declared", "recorded", "exact")
    stats_split: str = choice("train", "all")
    dct: str = choice("fast", "accurate")
    normalization: str = choice("q99", "bounds", "normal", "none")
    index: str = choice("auto", "rebuild", "verify")
    reader: str = choice("index", "stream")
    windows: str = choice("sliding", "segment")
    on_error: str = choice("error", "skip")


@dataclass(frozen=True)
class AugmentConfig:
    """Random changes of the images, drawn on the device from the sample number."""

    shift: dict[str, int]
    crop_scale: float
    brightness: float
    contrast: float
    saturation: float
    hue: float
    dropout: float
    per_frame: bool
    jitter_per_frame: bool
    share_cameras: bool
    draws: str = choice("independent", "shared")
    resize: str = choice("backbone", "lanczos3")


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank updates beside frozen kernels."""

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule."""

    learning_rate: float
    min_scale: float
    warmup_steps: int
    warmup_epochs: float
    weight_decay: float
    b1: float
    b2: float
    eps: float
    clip_norm: float
    gripper_weight: float
    caption_weight: float
    ema_decay: float
    frozen: tuple[str, ...]
    trained: tuple[tuple[str, int], ...]
    rates: tuple[tuple[str, float], ...]
    decays: tuple[tuple[str, float], ...]
    muon: tuple[str, ...]
    schedule: str = choice("constant", "cosine", "half_cosine")


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; -1 means all that are left."""

    data: int
    fsdp: int
    tensor: int


@dataclass(frozen=True)
class TrainConfig:
    """Length of the run and what it writes."""

    steps: int
    epochs: float
    batch_size: int
    accumulate: int
    log_every: int
    eval_every: int
    check_epochs: float
    eval_batches: int
    save_every: int
    keep: int
    tensorboard: bool
    wandb: str


@dataclass(frozen=True)
class Config:
    """All of a run."""

    seed: int
    model: ModelConfig
    data: DataConfig
    augment: AugmentConfig
    lora: LoraConfig
    optim: OptimConfig
    mesh: MeshConfig
    train: TrainConfig


def resolve(raw: Any) -> Config:
    """ConfigDict or plain nested dict -> `Config`.

    Raises:
        ConfigError: listing every unknown key (with the nearest legal one), missing key, wrong
            type and illegal value at once.
    """
    raw = raw.to_dict() if hasattr(raw, "to_dict") else raw
    problems: list[str] = []
    config = _build(Config, raw, "", problems)
    if not problems:
        problems += cross_checks(config)
    if problems:
        raise ConfigError(f"{len(problems)} problem(s) in the config:\n  " + "\n  ".join(problems))
    return config


def read_json(path: str | Path, where: str = "", expected: str = "an object") -> dict[str, Any]:
    """A JSON file with an object in it.

    Args:
        path: to read.
        where: what the message begins with, such as the key that names the file.
        expected: the form, for the message.

    Raises:
        ConfigError: it is missing or something else.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{where}{path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}{path}: not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{where}{path}: expected {expected}, found {type(found).__name__}")
    return found


def to_dict(config: Any) -> dict[str, Any]:
    """Inverse of `resolve`: JSON-serialisable nested dict."""
    return dataclasses.asdict(config)


def _build(cls: type, raw: Any, path: str, problems: list[str]) -> Any:
    if not isinstance(raw, Mapping):
        problems.append(f"{path or 'config'}: expected a group of keys, not {raw!r}")
        return None
    before = len(problems)
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    where = path + "." if path else ""
    for key in raw:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"legal keys: {sorted(fields)}"
            problems.append(f"{where}{key}: unknown key; {hint}")
    values = {}
    for name, spec in fields.items():
        if name not in raw:
            problems.append(f"{where}{name}: missing")
            continue
        value = _convert(hints[name], raw[name], where + name, problems)
        options = spec.metadata.get("choices")
        if options and value not in options:
            problems.append(f"{where}{name}: {value!r} is none of {list(options)}")
        values[name] = value
    return cls(**values) if len(problems) == before else None


def _convert(hint: Any, value: Any, path: str, problems: list[str]) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, path, problems)  # type: ignore[arg-type]
    origin = typing.get_origin(hint)
    if origin is tuple:
        hints = typing.get_args(hint)
        if isinstance(value, str) or not isinstance(value, (list, tuple)):
            problems.append(f"{path}: expected a list, not {value!r}")
            return ()
        if hints[-1] is Ellipsis:
            hints = hints[:1] * len(value)
        elif len(value) != len(hints):
            problems.append(f"{path}: expected {[h.__name__ for h in hints]}, not {value!r}")
            return ()
        return tuple(
            _convert(inner, v, f"{path}[{i}]", problems)
            for i, (inner, v) in enumerate(zip(hints, value, strict=True))
        )
    if origin is dict:
        if not isinstance(value, Mapping):
            problems.append(f"{path}: expected a dict, not {value!r}")
            return {}
        return {str(k): v for k, v in value.items()}
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        hint = next(a for a in typing.get_args(hint) if a is not type(None))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is not Any and (not isinstance(value, hint) or (hint is int and value is True)):
        problems.append(f"{path}: expected {hint.__name__}, not {value!r}")
    return value
