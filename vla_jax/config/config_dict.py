"""The schema's defaults as the `ml_collections.ConfigDict` that config files change."""

import dataclasses
import logging
from typing import Any

from ml_collections import ConfigDict

from vla_jax.config.migrate import RENAMED
from vla_jax.config.option import kinds
from vla_jax.config.schema import Config

logger = logging.getLogger(__name__)

# A renamed key has stayed in its group, so the last part of its path is enough.
_RENAMED = {old.split(".")[-1]: new.split(".")[-1] for old, new in RENAMED.items()}
# Groups that take any key: the VLM's own config.json, and cameras.
OPEN = ("model.backbone.arch", "augment.shift", "observation.images")


class Group(ConfigDict):
    """A group of options which go by their old names too, if they have been renamed or moved."""

    def __getitem__(self, key: str) -> Any:
        """A key's value, wherever it is now."""
        group, name = self._place(key)
        return ConfigDict.__getitem__(group, name)

    def __setitem__(self, key: str, value: Any) -> None:
        """Changes a key's value, with a warning if the key has moved."""
        group, name = self._place(key)
        if (group, name) != (self, key):
            new_place = name if group is self else f"parity.{name}"
            logger.warning("config key %s is now %s in the same group", key, new_place)
        ConfigDict.__setitem__(group, name, value)

    def get_type(self, key: str) -> type:
        """Type of a key's value, by which absl reads it from the command line."""
        group, name = self._place(key)
        return ConfigDict.get_type(group, name)

    def _place(self, key: str) -> tuple[ConfigDict, str]:
        """The group that holds a key now, and its name there."""
        if key in self:
            return self, key
        if "parity" in self:
            parity: Any = super().__getitem__("parity")
            if key in parity:
                return parity, key
        name = _RENAMED.get(key)
        return (self, name) if name is not None and name in self else (self, key)


def default_config() -> Any:
    """Every key with its default, locked against keys that are not there."""
    config = _grouped(Config())
    config.lock()
    for path in OPEN:
        config[path].unlock()
    return config


def _grouped(value: Any) -> Any:
    if not dataclasses.is_dataclass(value):
        return ConfigDict(value) if isinstance(value, dict) else value
    groups = {}
    for field in dataclasses.fields(value):
        groups[field.name] = _grouped(getattr(value, field.name))
        # Options of all kinds, so that a file or the command line can choose another kind.
        for cls in kinds(field.metadata).values():
            for name, default in _grouped(cls()).items():
                if name not in groups[field.name]:
                    groups[field.name][name] = default
                elif groups[field.name][name] != default:
                    raise TypeError(f"{cls.__name__}.{name}: another kind has another default")
    return Group(groups)
