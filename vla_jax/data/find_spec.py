"""A dataset's spec by name: of the registry, or of the user's own file."""

import importlib.util
from pathlib import Path

from vla_jax import refusal
from vla_jax.data.oxe import get_spec
from vla_jax.data.spec import DatasetSpec


def find_spec(name: str, variant: str = "default") -> DatasetSpec:
    """The spec that `data.datasets[].spec` names.

    Args:
        name: of `vla_jax.data.oxe.SPECS`, or FILE.py:NAME for a `DatasetSpec` in a file of one's
            own.
        variant: see `vla_jax.data.oxe.get_spec`.

    Raises:
        KeyError: what is wrong with the name, and the legal ones.
    """
    file, _, attribute = name.rpartition(":")
    if attribute.endswith(".py"):
        raise KeyError(f"{name!r}: name the spec within the file, {name}:NAME")
    # Names of the registry hold no colon.
    if not file:
        return get_spec(name, variant)
    path = Path(file).expanduser()
    # By its path, so that the file needs to be in no package.
    loader = importlib.util.spec_from_file_location(path.stem, path) if path.is_file() else None
    if loader is None or loader.loader is None:
        raise KeyError(f"{name!r}: {path.absolute()} is no Python file")
    module = importlib.util.module_from_spec(loader)
    try:
        loader.loader.exec_module(module)
    except Exception as error:  # the file is the user's own, and may do anything
        raise KeyError(f"{name!r}: {refusal.in_file(error, path)}") from error
    spec = getattr(module, attribute, None)
    if not isinstance(spec, DatasetSpec):
        specs = sorted(k for k, v in vars(module).items() if isinstance(v, DatasetSpec))
        raise KeyError(f"{name!r}: no DatasetSpec {attribute!r} in {path}; it has {specs}")
    return spec


def short_name(name: str) -> str:
    """What statistics and action specs are keyed by: the name without its file."""
    return name.rpartition(":")[2]
