"""How a field of a config states its default, its meaning and its legal values."""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any


class ConfigError(ValueError):
    """A config that cannot be used; the message lists every problem."""


def option(default: Any, doc: str, *choices: str, older: Any = None, positive: bool = False) -> Any:
    """A dataclass field with a default and a line of documentation.

    Args:
        default: value of a config that does not set the field.
        doc: what the field does, with its unit; `vla_jax.config.describe` prints it.
        choices: the legal values; none given means that any value of the field's type is legal.
        older: value of stored configs which are older than the field: what the code did before.
            None: the default, which then has to mean just that.
        positive: whether the number must be more than 0.
    """
    metadata = {"doc": doc, "choices": choices, "older": older, "positive": positive}
    # A dataclass refuses a mutable default.
    if isinstance(default, dict):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def group(cls: type, table: str = "") -> Any:
    """A dataclass field of an `Options` that holds a group of options with their defaults.

    Args:
        cls: dataclass of the group.
        table: "MODULE:NAME" of a dict for a group that is of several kinds, which have options of
            their own beside those of `cls`: the group's `kind` -> what has the dataclass of that
            kind, a subclass of `cls`, as its `OPTIONS`. It is imported when a config is made, and
            by name: what has options stands on the floors above and imports this module.
    """
    metadata = {"group": cls, "table": table}
    return dataclasses.field(
        default_factory=lambda: _class(kinds(metadata), cls, {})(), metadata=metadata
    )


def kinds(metadata: Mapping[str, Any]) -> dict[str, type]:
    """Kind -> dataclass of a group's kinds; {} of most groups, which are of one kind.

    Args:
        metadata: of the group's field.
    """
    module, _, name = metadata.get("table", "").partition(":")
    if not module:
        return {}
    table = getattr(importlib.import_module(module), name)
    return {kind: holder.OPTIONS for kind, holder in table.items()}


def of_its_kind(
    metadata: Mapping[str, Any], values: Mapping[str, Any]
) -> tuple[type, dict[str, Any]]:
    """The dataclass of a group with these values, and the values without other kinds' options.

    A config file may have options of several kinds, so that the kind can be chosen later. Where
    the kind is none that is known, the dataclass is what all kinds share.
    """
    classes, shared = kinds(metadata), metadata["group"]
    cls = _class(classes, shared, values)
    # An option that two kinds have by the same name belongs to both.
    foreign = set().union(*map(_names, classes.values())) - _names(cls)
    return cls, {key: value for key, value in values.items() if key not in foreign}


def _class(classes: Mapping[str, type], shared: type, values: Mapping[str, Any]) -> type:
    kind = values.get("kind", getattr(shared, "kind", None))
    # A kind of the wrong type is reported with all other problems, and not here.
    return classes.get(kind, shared) if isinstance(kind, str) else shared


def _names(cls: type) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)}


class Options:
    """What a dataclass with groups derives from: a program may give a group as a plain dict."""

    def __post_init__(self) -> None:
        """Turns the dicts of groups into the groups' own dataclasses.

        Raises:
            TypeError: a group has no such option.
        """
        for field in dataclasses.fields(self):  # pyrefly: ignore[bad-argument-type]
            value = getattr(self, field.name)
            if "group" in field.metadata and isinstance(value, Mapping):
                cls, values = of_its_kind(field.metadata, value)
                # A frozen dataclass refuses plain assignment, its own included.
                object.__setattr__(self, field.name, cls(**values))
