"""Vision-language-action models in JAX: backbone x structure x head.

The names below are what most programs need; they are imported when they are first used, so that
`import vla_jax` is quick and a program that only reads data never loads jax.

    from vla_jax import Policy
    policy = Policy.from_checkpoint("runs/quickstart")
"""

import importlib
from typing import TYPE_CHECKING, Any

from vla_jax import moved

__version__ = "0.2.0"

# Public name -> the module that has it, and its name there.
_PUBLIC = {
    "Batch": ("vla_jax.types", "Batch"),
    "Checkpoints": ("vla_jax.train.checkpoint", "Checkpoints"),
    "Config": ("vla_jax.config", "Config"),
    "ConfigError": ("vla_jax.config", "ConfigError"),
    "DatasetSpec": ("vla_jax.data.spec", "DatasetSpec"),
    "Loader": ("vla_jax.data.loader", "Loader"),
    "Observation": ("vla_jax.types", "Observation"),
    "Policy": ("vla_jax.inference.policy", "Policy"),
    "PolicyClient": ("eval_servers.client", "PolicyClient"),
    "RLDSWriter": ("vla_jax.data.rlds.writer", "RLDSWriter"),
    "Tokenizer": ("vla_jax.data.language.tokenizer", "Tokenizer"),
    "Trajectory": ("vla_jax.data.spec", "Trajectory"),
    "build_model": ("vla_jax.models.vla", "build"),
    "import_hf": ("vla_jax.convert.importing", "from_hf"),
    "load_config": ("vla_jax.config", "load_config"),
    "make_mesh": ("vla_jax.train.mesh", "make_mesh"),
    "open_datasets": ("vla_jax.data.mixture", "open_datasets"),
}
# Written out, since type checkers and editors read this list without running the module.
__all__ = [
    "Batch",
    "Checkpoints",
    "Config",
    "ConfigError",
    "DatasetSpec",
    "Loader",
    "Observation",
    "Policy",
    "PolicyClient",
    "RLDSWriter",
    "Tokenizer",
    "Trajectory",
    "__version__",
    "build_model",
    "import_hf",
    "load_config",
    "make_mesh",
    "open_datasets",
]

if TYPE_CHECKING:  # the same names again, for type checkers and editors
    from eval_servers.client import PolicyClient as PolicyClient
    from vla_jax.config import Config as Config
    from vla_jax.config import ConfigError as ConfigError
    from vla_jax.config import load_config as load_config
    from vla_jax.convert.importing import from_hf as import_hf
    from vla_jax.data.language.tokenizer import Tokenizer as Tokenizer
    from vla_jax.data.loader import Loader as Loader
    from vla_jax.data.mixture import open_datasets as open_datasets
    from vla_jax.data.rlds.writer import RLDSWriter as RLDSWriter
    from vla_jax.data.spec import DatasetSpec as DatasetSpec
    from vla_jax.data.spec import Trajectory as Trajectory
    from vla_jax.inference.policy import Policy as Policy
    from vla_jax.models.vla import build as build_model
    from vla_jax.train.checkpoint import Checkpoints as Checkpoints
    from vla_jax.train.mesh import make_mesh as make_mesh
    from vla_jax.types import Batch as Batch
    from vla_jax.types import Observation as Observation


# Here, as importing anything below the package runs this file first.
moved.register()


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'vla_jax' has no attribute {name!r}; it has {__all__}")
    module, attribute = _PUBLIC[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
