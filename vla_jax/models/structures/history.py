"""What a policy remembers from one control step to the next.

Legend: b batch · w window · k tokens of a step before the text · m latents · d width
"""

import dataclasses
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vla_jax.types import ArrayT, pytree


@pytree
@dataclass(frozen=True)
class History:
    """What a policy remembers of the steps so far, oldest first; the newest is at the end.

    Attributes:
        features: [b, w, m, d], what the head reads of the last w steps; where the VLM sees the
            window, [b, w, k, d], the tokens of their cameras and state.
        valid: False where no step has been taken yet.
    """

    features: Float[ArrayT, "*b w m d"]
    valid: Bool[ArrayT, "*b w"]

    def append(self, features: Array, valid: Array) -> "History":
        """The history with one step more at its end, and without its oldest."""
        return dataclasses.replace(
            self,
            features=append_step(self.features, features),
            valid=append_step(self.valid, valid),
        )


def append_step(past: Array, new: Array) -> Array:
    """[b, w, ...] without its oldest step and with [b, 1, ...] behind the newest."""
    # The history keeps its type, or a compiled step would be compiled again.
    return jnp.concatenate([past[:, 1:], new.astype(past.dtype)], axis=1)
