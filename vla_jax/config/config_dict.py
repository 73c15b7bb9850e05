"""The schema's defaults as the `ml_collections.ConfigDict` that config files change."""

import dataclasses
import logging
from typing import Any

from ml_collections import ConfigDict

from vla_jax.config.schema import Config

logger = logging.getLogger(__name__)

# Groups that take any key: the VLM's own config.json, and cameras.
OPEN = ("model.backbone.arch", "augment.shift", "observation.images")


class Group(ConfigDict):
    """A group of options in which those of its `parity` group go by their old names too."""

    def __getitem__(self, key: str) -> Any:
        """A key's value, wherever it is now."""
        return super().__getitem__(f"parity.{key}" if self._has_moved(key) else key)

    def __setitem__(self, key: str, value: Any) -> None:
        """Changes a key's value, with a warning if the key has moved."""
        if self._has_moved(key):
            logger.warning("config key %s is now parity.%s in the same group", key, key)
            self["parity"][key] = value
        else:
            super().__setitem__(key, value)

    def get_type(self, key: str) -> type:
        """Type of a key's value, by which absl reads it from the command line."""
        return self["parity"].get_type(key) if self._has_moved(key) else super().get_type(key)

    def _has_moved(self, key: str) -> bool:
        if key in self or "parity" not in self:
            return False
        parity: Any = super().__getitem__("parity")
        return key in parity


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
    names = [field.name for field in dataclasses.fields(value)]
    return Group({name: _grouped(getattr(value, name)) for name in names})
