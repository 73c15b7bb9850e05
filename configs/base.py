"""Every option with its default: what the other config files start from.

python configs/base.py   (prints all of them, with what each does)

The options are declared in vla_jax/config; a config file states only what differs. Defaults are
the original's published setting where it has one: Kosmos-2, policy head, LSTM (RoboVLMs).
"""

import sys
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: make the repository importable, uninstalled
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vla_jax.config import describe
from vla_jax.config.config_dict import default_config


def get_config() -> Any:
    """The defaults, as a ConfigDict."""
    return default_config()


if __name__ == "__main__":
    print(describe())
