"""How a field of a config states its default, its meaning and its legal values."""

import dataclasses
from collections.abc import Mapping
from typing import Any


class ConfigError(ValueError):
    """A config that cannot be used; the message lists every problem."""


def option(default: Any, doc: str, *choices: str, older: Any = None) -> Any:
    """A dataclass field with a default and a line of documentation.

    Args:
        default: value of a config that does not set the field.
        doc: what the field does, with its unit; `vla_jax.config.describe` prints it.
        choices: the legal values; none given means that any value of the field's type is legal.
        older: value of stored configs which are older than the field: what the code did before.
            None: the default, which then has to mean just that.
    """
    metadata = {"doc": doc, "choices": choices, "older": older}
    # A dataclass refuses a mutable default.
    if isinstance(default, dict):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def group(cls: type) -> Any:
    """A dataclass field of an `Options` that holds a group of options with their defaults."""
    return dataclasses.field(default_factory=cls, metadata={"group": cls})


class Options:
    """What a dataclass with groups derives from: a program may give a group as a plain dict."""

    def __post_init__(self) -> None:
        """Turns the dicts of groups into the groups' own dataclasses.

        Raises:
            TypeError: a group has no such option.
        """
        for field in dataclasses.fields(self):  # pyright: ignore[reportArgumentType]
            cls, value = field.metadata.get("group"), getattr(self, field.name)
            if cls and isinstance(value, Mapping):
                object.__setattr__(self, field.name, cls(**value))
