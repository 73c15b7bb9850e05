"""Configs of earlier versions, as checkpoints store them, brought to this version's fields.

A new field needs nothing here: a stored config that lacks it takes the default, or what `option`
says of older configs. A field that is renamed and means what it meant is a line of `RENAMED`, read
at its old place in any format. One that is moved in a body or means something else gets a step from
format n to n + 1, and `FORMAT` grows.
"""

import dataclasses
import logging
import typing
from collections.abc import Callable, Mapping
from typing import Any

from vla_jax.config.option import ConfigError, of_its_kind
from vla_jax.config.schema import Config

logger = logging.getLogger(__name__)

# Of checkpoints and of exported folders. 1: to commit 506fc5a; 2: parity options in their groups;
# 3: one option says how a gripper is predicted.
FORMAT = 3

# Format 2: what only repeats a reference implementation stands in a group of its own.
PARITY = {
    f"{group}.{key}": f"{group}.parity.{key}"
    for group, keys in {
        "data": (
            "left_pad", "windows", "random_goal", "padded_rows", "variant", "gripper",
            "stats_split", "constant_to_zero", "dct",
        ),
        "augment": ("draws", "resize", "jitter_per_frame", "share_cameras"),
        "model.structure": ("act_insert",),
        "model.head": ("vocabulary",),
    }.items()
    for key in keys
}  # fmt: skip

# Names that two groups had for different things.
RENAMED = {"data.max_skipped": "data.max_skipped_share"}
MOVED = PARITY | RENAMED


def move_old_keys(raw: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A raw config with every key that has moved at its new place.

    Returns:
        A copy, and "old key -> new key" of each that was found at its old place.
    """
    moved = []
    result = _copied(raw)
    for old, new in MOVED.items():
        *path, name = old.split(".")
        holder = _group(result, path)
        if holder is None or name not in holder:
            continue
        *path, new_name = new.split(".")
        target = _group(result, path, create=True)
        if target is not None:
            target[new_name] = holder.pop(name)
            moved.append(f"{old} -> {new}")
    return result, moved


def _one_gripper(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Format 2 -> 3: `model.expert.gripper` and `model.fast.gripper` are `model.head.gripper`."""
    result = _copied(raw)
    groups = {name: _group(result, ["model", name]) or {} for name in ("structure", "head")}
    chosen = {
        name: (_group(result, ["model", name]) or {}).pop("gripper", "binary")
        for name in ("expert", "fast")
    }
    # Where an expert acts, or FAST tokens are written, its own option counted and no other.
    if groups["structure"].get("kind") == "expert":
        groups["head"]["gripper"] = chosen["expert"]
    elif groups["head"].get("kind") == "fast":
        groups["head"]["gripper"] = chosen["fast"]
    return result


# Format n -> the step to n + 1.
STEPS: dict[int, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    1: lambda raw: move_old_keys(raw)[0],
    2: _one_gripper,
}


def upgrade(stored: Any, found_format: Any, where: str) -> dict[str, Any]:
    """A stored config as this version of vla_jax would have stored it.

    Args:
        stored: raw config, as it was read.
        found_format: the number that stands beside it.
        where: the file or folder it is from, for messages.

    Returns:
        Raw config with every key of this version; keys unknown to it are left in, for `resolve`
        to refuse.

    Raises:
        ConfigError: the format is none that this version reads, or the config is no dict.
    """
    is_readable = isinstance(found_format, int) and 1 <= found_format <= FORMAT
    if not is_readable:
        newer = isinstance(found_format, int) and found_format > FORMAT
        why = "; a newer version wrote it: update vla_jax" if newer else ""
        raise ConfigError(
            f"{where}: format {found_format!r}, this version of vla_jax reads 1 to {FORMAT}{why}"
        )
    if not isinstance(stored, Mapping):
        raise ConfigError(f"{where}: expected a group of keys as the config, not {stored!r}")
    raw: Mapping[str, Any] = stored
    for number in range(found_format, FORMAT):
        raw = STEPS[number](raw)
    raw, _ = move_old_keys(raw)
    added: list[str] = []
    complete = _filled(Config, raw, "", added)
    if added:
        logger.info(
            "%s: its config lacks %d newer keys, which take their defaults: %s",
            where, len(added), ", ".join(added),
        )  # fmt: skip
    return complete


def _filled(cls: type, raw: Mapping[str, Any], prefix: str, added: list[str]) -> dict[str, Any]:
    """A group with the defaults of the fields it lacks, whose names are added to `added`."""
    hints, defaults, result = typing.get_type_hints(cls), cls(), dict(raw)
    for field in dataclasses.fields(cls):
        name, hint = field.name, hints[field.name]
        # The element type of a tuple of groups, such as data.datasets.
        (inner, *_) = typing.get_args(hint) or (None,)
        if name not in raw:
            value = getattr(defaults, name)
            # A default may differ from what the code did before the field existed.
            older = field.metadata.get("older")
            value = value if older is None else older
            result[name] = dataclasses.asdict(value) if dataclasses.is_dataclass(hint) else value
            added.append(f"{prefix}{name}")
        elif dataclasses.is_dataclass(hint) and isinstance(raw[name], Mapping):
            # Earlier formats had the options of every kind of head.
            group, values = of_its_kind(field.metadata, raw[name])
            result[name] = _filled(group, values, f"{prefix}{name}.", added)
        elif dataclasses.is_dataclass(inner) and isinstance(raw[name], list | tuple):
            group = typing.cast(type, inner)
            result[name] = [
                _filled(group, entry, f"{prefix}{name}[{i}].", added)
                if isinstance(entry, Mapping)
                else entry
                for i, entry in enumerate(raw[name])
            ]
    return result


def _copied(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copied(x) if isinstance(x, Mapping) else x for key, x in raw.items()}


def _group(tree: Any, path: list[str], create: bool = False) -> dict[str, Any] | None:
    """The group at a path; None if there is none, or something else."""
    for name in path:
        if create and isinstance(tree, dict):
            tree.setdefault(name, {})
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree if isinstance(tree, dict) else None
