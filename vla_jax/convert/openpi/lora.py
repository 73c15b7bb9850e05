"""openpi's LoRA factors, added to the weights they stand beside.

The low rank of queries, keys and values is per head, that of outputs is not, and the MLP's factors
have no alpha / rank, so that the factors as such have no counterpart here; what they compute has.

Source: openpi 15a9616 `models/lora.py`.
"""

import re
from collections.abc import Callable, Hashable

import numpy as np

from vla_jax.convert.tensors import Source

# attn/q_einsum/lora_a beside attn/q_einsum/w; mlp/linear_lora_a beside mlp/linear
_FACTOR = re.compile(r"(?:/lora|_lora)_[ab]$")


def has_factors(source: Source) -> bool:
    """Whether some of the tensors are LoRA factors."""
    return any(_FACTOR.search(name) for name in source.shapes)


class Merged:
    """A source without LoRA factors, their products added to the weights; see `Source`."""

    def __init__(self, source: Source, alpha: Callable[[str], float] | None = None):
        """Reads nothing.

        Args:
            source: of openpi's JAX parameters.
            alpha: name of an attention weight -> its alpha; None = its rank, as in all variants
                that are shipped.
        """
        self._source, self._alpha = source, alpha
        weights = [name for name in source.shapes if not _FACTOR.search(name)]
        self.shapes = {name: source.shapes[name] for name in weights}
        self.dtypes = {name: source.dtypes[name] for name in weights}

    def read(self, name: str) -> np.ndarray:
        """The tensor, contiguous and owned by the caller."""
        weight = self._source.read(name)
        # The factors of `x/w` are named `x/lora_a`, those of `x` are named `x_lora_a`.
        root = name.removesuffix("/w") + "/" if name.endswith("/w") else name + "_"
        first, second = (f"{root}lora_{letter}" for letter in "ab")
        if first not in self._source.shapes:
            return weight
        a, b = (self._source.read(x).astype(np.float32) for x in (first, second))
        rank = a.shape[-1]
        if "attn_vec_einsum" in name:
            # The heads are summed between the factors: each meets the sum of all second factors.
            b = b.sum(-3, keepdims=True)
        scale = self._alpha(name) / rank if self._alpha and name.endswith("/w") else 1.0
        return (weight.astype(np.float32) + scale * (a @ b)).astype(weight.dtype)

    def place(self, name: str) -> Hashable:
        """Where its bytes lie."""
        return self._source.place(name)
