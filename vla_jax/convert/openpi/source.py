"""openpi's JAX parameters as named tensors, layer by layer."""

import re
from collections.abc import Hashable, Iterable
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from vla_jax import rules
from vla_jax.convert.tensors import Source
from vla_jax.models.weights import WeightError

# What stands before the layer number of a stacked tensor.
STACKS = (r"^PaliGemma/llm/layers/", r"^PaliGemma/img/Transformer/encoderblock/")


class Unstacked:
    """A source whose stacked tensors appear as their layers, `NAME[0]`, `NAME[1]`, ...

    A layer is a view of the stack, which is read once for all of its layers.
    """

    def __init__(self, source: Source, stacks: Iterable[str] = STACKS):
        """Reads nothing.

        Args:
            source: of whole tensors.
            stacks: regexes of the names that are stacked.
        """
        self._source, patterns = source, tuple(stacks)
        self._where: dict[str, tuple[str, int | None]] = {}
        for name, shape in source.shapes.items():
            if any(re.search(pattern, name) for pattern in patterns):
                self._where |= {f"{name}[{i}]": (name, i) for i in range(shape[0])}
            else:
                self._where[name] = (name, None)
        self.shapes = {
            new: source.shapes[old] if i is None else source.shapes[old][1:]
            for new, (old, i) in self._where.items()
        }
        self.dtypes = {new: source.dtypes[old] for new, (old, _) in self._where.items()}
        self._last: tuple[str, np.ndarray] | None = None

    def read(self, name: str) -> np.ndarray:
        """The tensor, contiguous and owned by the caller."""
        old, layer = self._where[name]
        if layer is None:
            return self._source.read(old)
        # Layers of one stack are asked for one after another, so one stack in memory is enough.
        if self._last is None or self._last[0] != old:
            self._last = old, self._source.read(old)
        # A copy, as the caller owns it and the stack is used again.
        return np.array(self._last[1][layer])

    def place(self, name: str) -> Hashable:
        """Where its bytes lie."""
        old, layer = self._where[name]
        return self._source.place(old), layer


class OrbaxParams:
    """An Orbax folder of parameters as named tensors; see `Source`.

    openpi's trainer writes a last path element `value` to every leaf, older files have none; it is
    left out of the names.
    """

    def __init__(self, folder: str | Path):
        """Reads names, shapes and types.

        Raises:
            WeightError: there are no parameters, or they cannot be read.
        """
        # Orbax refuses relative paths.
        self._folder = Path(folder).absolute()
        self._handler = ocp.PyTreeCheckpointHandler()
        try:
            stored = rules.flatten(self._handler.metadata(self._folder).tree)  # type: ignore[arg-type]
        except (OSError, ValueError, KeyError) as error:
            raise WeightError(f"{folder}: no Orbax parameters: {error}") from error
        # From all leaves or from none, as openpi's own loader has it.
        suffix = "/value" if all(path.endswith("/value") for path in stored) else ""
        self._paths = {path.removeprefix("params/").removesuffix(suffix): path for path in stored}
        self.shapes = {name: tuple(stored[path].shape) for name, path in self._paths.items()}
        self.dtypes = {name: np.dtype(stored[path].dtype) for name, path in self._paths.items()}

    def read(self, name: str) -> np.ndarray:
        """The tensor, contiguous and owned by the caller."""
        path = self._paths[name]
        item = rules.unflatten({path: 0})
        how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
        args = ocp.args.PyTreeRestore(item, restore_args=how, partial_restore=True)  # type: ignore[call-arg]
        return rules.flatten(self._handler.restore(self._folder, args=args))[path]  # type: ignore[arg-type]

    def place(self, name: str) -> Hashable:
        """Where its bytes lie."""
        return name
