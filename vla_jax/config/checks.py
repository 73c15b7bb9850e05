"""What the values of a `Config` must fulfil beyond their types; `vla_jax.config.resolve` asks."""

import dataclasses
import re
from typing import Any

from vla_jax.cameras import CAMERAS
from vla_jax.config.schema import Config


def cross_checks(config: Config) -> list[str]:
    """Problems of fields with the right types, one line each; [] if there are none."""
    structure, data, problems = config.model.structure, config.data, []
    for camera in structure.cameras:
        if camera not in CAMERAS:
            problems.append(f"model.structure.cameras: {camera!r} is none of {list(CAMERAS)}")
    for camera in config.augment.shift:
        if camera not in CAMERAS:
            problems.append(f"augment.shift: {camera!r} is none of {list(CAMERAS)}")
    if config.model.action_dim < 1 + config.model.has_gripper:
        problems.append(f"model.action_dim: {config.model.action_dim} leaves no arm")
    if not data.datasets:
        problems.append("data.datasets: name at least one dataset")
    if config.model.sentence.dim < 0:
        problems.append("model.sentence.dim: must not be negative")
    if config.model.sentence.dim and not config.model.sentence.dir:
        problems.append("model.sentence.dir: name the folder of the text encoder, or set dim to 0")
    for name in ("resampler", "proprio"):
        if getattr(structure, name) < 0:
            problems.append(f"model.structure.{name}: must not be negative")
    problems += _not_positive(config)
    if not 0 <= data.max_skipped_share <= 1:
        problems.append(f"data.max_skipped_share: must be in [0, 1], not {data.max_skipped_share}")
    problems += [
        f"data.datasets[{i}].{name}: missing; {advice}"
        for i, d in enumerate(data.datasets)
        for name, advice in (("spec", "name its standardization"), ("dir", "name its folder"))
        if not getattr(d, name)
    ]
    problems += [
        f"data.datasets[{i}].weight: must be positive, not {d.weight}"
        for i, d in enumerate(data.datasets)
        if not 0 < d.weight < float("inf")
    ]
    if not 0 <= data.val_fraction < 1:
        problems.append(f"data.val_fraction: must be in [0, 1), not {data.val_fraction}")
    problems += _unit_checks(config)
    problems += _lora_checks(config) + _cotrain_checks(config) + _filter_checks(config)
    if config.train.profile and not re.fullmatch(r"[1-9]\d*:[1-9]\d*", config.train.profile):
        problems.append(f"train.profile: {config.train.profile!r} is not START:STEPS, as '20:3'")
    # 0 turns each of these off, so only negative values are wrong.
    amounts = {
        "train.epochs": config.train.epochs,
        "train.check_epochs": config.train.check_epochs,
        "optim.warmup_epochs": config.optim.warmup_epochs,
        "optim.warmup_steps": config.optim.warmup_steps,
        "optim.weight_decay": config.optim.weight_decay,
        "optim.clip_norm": config.optim.clip_norm,
    }
    problems += [f"{name}: must not be negative, {v} is" for name, v in amounts.items() if v < 0]
    if not 0 <= config.optim.ema_decay < 1:
        problems.append(f"optim.ema_decay: must be in [0, 1), not {config.optim.ema_decay}")
    # -1 takes the devices that are left, which one axis alone can do.
    if [config.mesh.data, config.mesh.fsdp, config.mesh.tensor].count(-1) > 1:
        problems.append("mesh: only one axis may be -1")
    return problems


def _not_positive(group: Any, prefix: str = "") -> list[str]:
    """Problems of the options whose fields say that they are more than 0."""
    problems = []
    for field in dataclasses.fields(group):
        value = getattr(group, field.name)
        if dataclasses.is_dataclass(value):
            problems += _not_positive(value, f"{prefix}{field.name}.")
        # Written with `not`, so that a NaN is refused as well.
        elif field.metadata.get("positive") and not value > 0:
            problems.append(f"{prefix}{field.name}: must be positive, not {value}")
    return problems


def _cotrain_checks(config: Config) -> list[str]:
    cotrain, problems = config.data.cotrain, []
    if not cotrain.path:
        return []
    if cotrain.rows < 1 or cotrain.text_len < 1:
        problems.append("data.cotrain: rows and text_len must be positive")
    if cotrain.prompt.count("{question}") != 1:
        problems.append(f"data.cotrain.prompt: needs {{question}} once: {cotrain.prompt!r}")
    return problems


def _filter_checks(config: Config) -> list[str]:
    filters, language, problems = config.data.filters, config.data.language, []
    for name in ("language", "not_language"):
        for pattern in getattr(filters, name):
            try:
                re.compile(pattern)
            except re.error as error:
                problems.append(f"data.filters.{name}: {pattern!r} is no regex: {error}")
    if filters.few_shot < 0 or filters.noop < 0:
        problems.append("data.filters: few_shot and noop must not be negative")
    if not 0 <= config.augment.dropout < 1:
        problems.append("augment.dropout: must be in [0, 1)")
    for name in ("paraphrase", "dropout"):
        if not 0 <= getattr(language, name) <= 1:
            problems.append(f"data.language.{name}: must be in [0, 1]")
    return problems


def _lora_checks(config: Config) -> list[str]:
    lora, problems = config.lora, []
    if lora.rank < 0:
        problems.append(f"lora.rank: must not be negative, {lora.rank} is")
    if not 0 <= lora.dropout < 1:
        problems.append(f"lora.dropout: must be in [0, 1), not {lora.dropout}")
    if lora.rank and not lora.targets:
        problems.append("lora.targets: name at least one path regex, or set lora.rank to 0")
    if lora.rank and lora.dropout and not config.model.dropout:
        problems.append(
            f"lora.dropout: {lora.dropout} has no effect without model.dropout; set one of them"
        )
    return problems


def _unit_checks(config: Config) -> list[str]:
    data = config.data
    if not data.units:
        unused = [name for name in ("relative", "robot") if getattr(data, name)]
        return [f"data.{name}: has no effect without data.units" for name in unused]
    problems = []
    # These units treat the gripper as a plain number; the heads say whether they predict one.
    if not config.model.gripper_is_number:
        problems.append(
            "data.units: only where the gripper is predicted as a number: model.head.gripper "
            "'number'"
        )
    # (6, -1) speaks of seven numbers: the sign only says which are relative.
    if data.relative and sum(map(abs, data.relative)) > config.model.action_dim:
        problems.append(f"data.relative: {data.relative} is longer than model.action_dim")
    return problems
