"""Our config files for tools without absl's flags."""

import ast
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vla_jax.config import Config, ConfigError, read_json, resolve
from vla_jax.models.backbones import BACKBONES
from vla_jax.shipped import config_path


def load(where: str | Path, changes: Sequence[str] = ()) -> dict[str, Any]:
    """Raw config of a file.

    Args:
        where: FILE.py, or FILE.py:ARGUMENT, as launch/train.py takes it.
        changes: KEY=VALUE, dotted keys and Python literals (other values are strings).

    Raises:
        ConfigError: no such file, or a change that does not fit.
    """
    path, _, argument = str(where).partition(":")
    spec = importlib.util.spec_from_file_location("config", path)
    if spec is None or spec.loader is None or not Path(path).is_file():
        raise ConfigError(f"{path}: no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(argument) if argument else module.get_config()
    for change in changes:
        key, _, text = change.partition("=")
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        try:
            config.update_from_flattened_dict({key: value})
        except (KeyError, TypeError) as error:
            raise ConfigError(f"{change}: {error}") from error
    return config.to_dict()


def load_config(where: str | Path, changes: Sequence[str] = ()) -> Config:
    """The config of a file or of a shipped name, resolved and checked.

    Args:
        where: as `launch/train.py --config` takes it: `quickstart`, `FILE.py`, `FILE.py:ARGUMENT`.
        changes: KEY=VALUE, as ["train.batch_size=8"].

    Raises:
        ConfigError: no such file, or something in it does not fit; every problem is listed.
    """
    return resolve(load(config_path(str(where)), changes))


def find(folder: Path, hf_dir: str | Path) -> Path:
    """The first `*_ph.py` whose backbone is the VLM of a Hugging Face folder.

    Raises:
        ConfigError: there is none.
    """
    described = read_json(Path(hf_dir) / "config.json")
    kind, why = described.get("model_type"), ""
    for path in sorted(folder.glob("*_ph.py")):
        name = load(path)["model"]["backbone"]["name"]
        if name in BACKBONES and BACKBONES[name][0].ARCH.get("model_type") == kind:
            try:  # two backbones may share a type
                BACKBONES[name][0].arch(described, strict=False)
            except ValueError as error:
                why = str(error)
                continue
            return path
    if why:
        raise ConfigError(f"{hf_dir}: {why}")
    raise ConfigError(f"{hf_dir}: no config here for a VLM of type {kind!r}; use --config=FILE")
