"""openpi's JAX parameters as named tensors, layer by layer."""

import re
from collections.abc import Hashable, Iterable

import numpy as np

from vla_jax.convert.tensors import Source

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
        if self._last is None or self._last[0] != old:
            self._last = old, self._source.read(old)
        return np.array(self._last[1][layer])

    def place(self, name: str) -> Hashable:
        """Where its bytes lie."""
        old, layer = self._where[name]
        return self._source.place(old), layer
