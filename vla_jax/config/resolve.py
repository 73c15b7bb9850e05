"""The one strict step from a raw config to the frozen dataclasses of `schema`.

Config files (`configs/*.py`) build an `ml_collections.ConfigDict`; `resolve` turns it into a
`Config` once, at the edge. Nothing below `launch/` sees a ConfigDict.
"""

import dataclasses
import difflib
import logging
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from vla_jax.config.checks import cross_checks
from vla_jax.config.migrate import move_old_keys
from vla_jax.config.option import ConfigError, of_its_kind
from vla_jax.config.schema import Config

logger = logging.getLogger(__name__)


def resolve(raw: Any) -> Config:
    """ConfigDict or plain nested dict -> `Config`.

    Keys that are not there take the schema's defaults; those that moved are read at their old
    place too, with a warning. Actions and cameras that the config leaves to the data are those of
    a hand with a gripper here, 7 numbers, seen by the primary and the wrist camera:
    `vla_jax.data.robot.resolve_with_data`
    asks the data.

    Raises:
        ConfigError: listing every unknown key (with the nearest legal ones), wrong type and
            illegal value at once.
    """
    raw = raw.to_dict() if hasattr(raw, "to_dict") else raw
    problems: list[str] = []
    if isinstance(raw, Mapping):
        raw, moved = move_old_keys(raw)
        if moved:
            logger.warning("config keys that have moved: %s", ", ".join(moved))
    config = _build(Config, raw, "", problems)
    # Cross checks read all groups, of which some are None after a problem.
    if not problems:
        config = _completed(config)
        problems += cross_checks(config)
    if problems:
        raise ConfigError(f"{len(problems)} problem(s) in the config:\n  " + "\n  ".join(problems))
    return config


def _completed(config: Config) -> Config:
    """The config with actions and cameras; where it leaves them to the data, a hand's."""
    model = config.model
    structure = dataclasses.replace(
        model.structure, cameras=model.structure.cameras or ("primary", "wrist")
    )
    model = dataclasses.replace(
        model,
        structure=structure,
        # Three numbers of translation, three of rotation and the gripper.
        action_dim=model.action_dim or 7,
        gripper=model.gripper or "last",
    )
    return dataclasses.replace(config, model=model)


def to_dict(config: Any) -> dict[str, Any]:
    """Inverse of `resolve`: JSON-serializable nested dict."""
    return dataclasses.asdict(config)


def _build(cls: type, raw: Any, path: str, problems: list[str]) -> Any:
    if not isinstance(raw, Mapping):
        problems.append(f"{path or 'config'}: expected a group of keys, not {raw!r}")
        return None
    # A group with a problem is not built, while the others go on to report theirs.
    before = len(problems)
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    where = path + "." if path else ""
    for key in raw:
        if key not in fields:
            problems.append(f"{where}{key}: unknown key; {_nearest(str(key), list(fields))}")
    values = {}
    for name, spec in fields.items():
        if name not in raw:
            continue
        hint, value = hints[name], raw[name]
        if "group" in spec.metadata and isinstance(value, Mapping):
            hint, value = of_its_kind(spec.metadata, value)
        value = _convert(hint, value, where + name, problems)
        options = spec.metadata.get("choices")
        if options and value not in options:
            problems.append(f"{where}{name}: {value!r} is none of {list(options)}")
        values[name] = value
    return cls(**values) if len(problems) == before else None


def similar_keys(key: str, legal: Sequence[str]) -> list[str]:
    """The legal keys, quoted, that look most like one that is not legal, or that it abbreviates."""
    near = difflib.get_close_matches(key, legal, n=3, cutoff=0.7)
    # Other projects write `lr` for learning_rate.
    initials = {name: "".join(word[:1] for word in name.split("_")) for name in legal}
    near = near or [name for name in legal if "_" in name and initials[name] == key]
    return [repr(name) for name in near]


def _nearest(key: str, legal: list[str]) -> str:
    """What a person who wrote an unknown key may have meant."""
    near = similar_keys(key, legal)
    elsewhere = [repr(path) for path in _paths(Config) if path.rpartition(".")[2] == key]
    if near or elsewhere:
        return f"did you mean {' or '.join([*near, *elsewhere])}?"
    return f"legal keys: {sorted(legal)}"


def _paths(cls: type, prefix: str = "") -> list[str]:
    """Dotted paths of every field below a group."""
    hints, paths = typing.get_type_hints(cls), []
    for field in dataclasses.fields(cls):
        hint, path = hints[field.name], prefix + field.name
        inner = dataclasses.is_dataclass(hint)
        paths += _paths(typing.cast(type, hint), path + ".") if inner else [path]
    return paths


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
        # The schema has no unions but X | None.
        hint = next(a for a in typing.get_args(hint) if a is not type(None))
    # Files and command lines say 1 for 1.0; True is an int in Python and no number here.
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is not Any and (not isinstance(value, hint) or (hint is int and value is True)):
        problems.append(f"{path}: expected {hint.__name__}, not {value!r}")
    return value
