"""Actions as ids at the upper end of the vocabulary, and back (RoboVLMs' ActionTokenizer).

A value is clipped to [low, high] and falls into bin k = 1 ... bins, the number of edges at or below
it; its id is `end` - k, so larger values have smaller ids. An id stands for the middle between two
edges; there are `bins` edges and so one middle fewer, and the last bin, which holds `high` alone,
shares the middle below it. Ids that are no action read as the nearest end of the range.

Functions take numpy arrays (computed there, in float64) or jax arrays (traceable, float32 with the
same ids to the last bit).
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class ActionTokenizer:
    """The map between values and ids.

    Attributes:
        end: first id above the actions'; in the original the tokenizer's vocabulary size less its
            special tokens less 10 that it keeps free (Kosmos-2: 63985).
        bins: ids in use, end - bins ... end - 1.
        low: smallest value.
        high: largest value.
    """

    end: int
    bins: int = 256
    low: float = -1.0
    high: float = 1.0

    @property
    def edges(self) -> np.ndarray:
        """Lower ends of the bins, float64 [bins]."""
        return np.linspace(self.low, self.high, self.bins)

    def encode(self, values: Any) -> Any:
        """Values of any shape -> int32 ids of that shape."""
        if isinstance(values, jax.Array):
            # Rounded up, float32 edges sort every float32 value as the float64 edges would.
            edges = jnp.asarray(_round_up(self.edges))
            clipped = jnp.clip(values.astype(jnp.float32), edges[0], edges[-1])
            # A value on an edge belongs to the bin above it, as `np.digitize` has it below.
            return self.end - jnp.searchsorted(edges, clipped, side="right").astype(jnp.int32)
        # Below the first edge `digitize` says bin 0, whose id stands for no action.
        clipped = np.clip(values, self.low, self.high)
        return (self.end - np.digitize(clipped, self.edges)).astype(np.int32)

    def decode(self, ids: Any) -> Any:
        """Ids of any shape -> values of that shape: float32 of jax arrays, else float64."""
        edges = self.edges
        # A value is decoded as the middle of its bin; n edges make n - 1 bins.
        middles = (edges[1:] + edges[:-1]) / 2
        if isinstance(ids, jax.Array):
            return jnp.asarray(middles, jnp.float32)[jnp.clip(self.end - ids - 1, 0, self.bins - 2)]
        return middles[np.clip(self.end - np.asarray(ids) - 1, 0, self.bins - 2)]

    def is_action(self, ids: Any) -> Any:
        """A bool of the same shape, True where an id stands for an action."""
        return (ids >= self.end - self.bins) & (ids < self.end)


def _round_up(values: np.ndarray) -> np.ndarray:
    """The smallest float32 at or above each: float32 x >= it exactly when x >= the float64."""
    near = values.astype(np.float32)
    return np.where(near < values, np.nextafter(near, np.float32(np.inf)), near)
