"""Files of configs: ours in Python for tools without absl's flags, and JSON."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vla_jax import refusal
from vla_jax.config.option import ConfigError
from vla_jax.config.resolve import resolve, similar_keys
from vla_jax.config.schema import Config
from vla_jax.files import explain_file
from vla_jax.shipped import config_names, config_path


def load_config(where: str | Path, changes: Sequence[str] = ()) -> Config:
    """The config of a file or of a shipped name, resolved and checked.

    Args:
        where: as `launch/train.py --config` takes it: `quickstart`, `FILE.py`, `FILE.py:ARGUMENT`.
        changes: KEY=VALUE, as ["train.batch_size=8"].

    Raises:
        ConfigError: no such file, or something in it does not fit; every problem is listed.
    """
    return resolve(load_config_file(where, changes))


def load_config_file(where: str | Path, changes: Sequence[str] = ()) -> dict[str, Any]:
    """Raw config of a file, read as `launch/train.py --config=... --config.KEY=VALUE` reads it.

    Args:
        where: see `load_config`.
        changes: see `load_config`.

    Raises:
        ConfigError: no such file, or a change that does not fit.
    """
    # Only those who read a file pay for absl.
    from absl import flags
    from ml_collections import config_flags

    where = config_path(str(where))
    path = where.partition(":")[0]
    if not Path(path).is_file():
        names = ", ".join(config_names())
        raise ConfigError(f"{path}: no such file, and none is shipped: {names}")
    arguments = ["", f"--config={where}", *(f"--config.{change}" for change in changes)]
    # The global flags belong to the program that calls this.
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=arguments)
    try:
        values(arguments)
        config = holder.value
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        keys = [change.partition("=")[0] for change in changes]
        problems = unknown_keys(load_config_file(where), keys) if changes else []
        text = "\n".join(problems) or f"{where} {' '.join(changes)}: {error}"
        raise ConfigError(text) from error
    except Exception as error:  # the file is the user's own, and may do anything
        raise ConfigError(refusal.in_file(error, path)) from error
    return config.to_dict()


def unknown_keys(config: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    """What is wrong with keys that a config does not have, a sentence each.

    Args:
        config: as `load_config_file` returns it.
        keys: as "train.batch_size".
    """
    problems = []
    for key in keys:
        branch: Any = config
        for place, part in enumerate(key.split(".")):
            name = part.partition("[")[0]  # of a list's entry, "datasets[0]"
            legal = sorted(branch) if isinstance(branch, Mapping) else []
            if name not in legal:
                similar = " or ".join(similar_keys(name, legal))
                guess = f" (did you mean {similar}?)" if similar else ""
                above = ".".join(key.split(".")[:place]) or "the config"
                problems.append(f"{key}: unknown key{guess}; legal keys of {above}: {legal}")
                break
            if name != part:
                break  # what lies in a list is checked with the rest of the config
            branch = branch[name]
    return problems


def read_json(path: str | Path, where: str = "", expected: str = "an object") -> dict[str, Any]:
    """A JSON file with an object in it.

    Args:
        path: file to read.
        where: what the message begins with, such as the key that names the file.
        expected: the form, for the message.

    Raises:
        ConfigError: it is missing or something else.
    """
    try:
        # Editors on Windows begin files with a byte order mark.
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{where}{path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}{path}: {explain_file(path) or f'not JSON: {error}'}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{where}{path}: expected {expected}, found {type(content).__name__}")
    return content
