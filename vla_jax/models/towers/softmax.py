"""Softmax of attention scores, with its gradient written out.

Differentiated by itself it would keep float32 arrays of the scores' shape, and under a scan over
layers the mask and its filler too, each at full size although they never change.

Legend: b batch · h heads · n query tokens · s key tokens
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

# Added to scores that the mask forbids: far below any score, and no sum with one overflows.
FORBIDDEN = 0.5 * float(jnp.finfo(jnp.float32).min)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def softmax(
    dtype: Any, scores: Float[Array, "b h n s"], mask: Bool[Array, "#b 1 #n s"] | None
) -> Float[Array, "b h n s"]:
    """Softmax in float32 over what the mask allows, kept for the backward pass as it goes out."""
    if mask is not None:
        # Added, not chosen: the filler of a choice would be held in the shape of the scores. A
        # number and not -inf: a row that may attend to nothing would be NaN.
        scores = scores + jnp.where(mask, 0.0, FORBIDDEN)
    return jax.nn.softmax(scores, axis=-1).astype(dtype)


def _forward(dtype: Any, scores: Array, mask: Array | None) -> tuple[Any, Any]:
    weights = softmax(dtype, scores, mask)
    # Saved in the narrower type: without the barrier what lies in memory between the two passes
    # would be the float32 exponentials.
    return weights, (jax.lax.optimization_barrier(weights), mask)


def _backward(dtype: Any, residuals: Any, gradient: Array) -> tuple[Array, None]:
    del dtype
    (weights, mask), gradient = residuals, gradient.astype(jnp.float32)
    weights = weights.astype(jnp.float32)
    by_scores = weights * (gradient - (weights * gradient).sum(-1, keepdims=True))
    # A row that may attend to nothing has weights all the same.
    return by_scores if mask is None else jnp.where(mask, by_scores, 0.0), None


softmax.defvjp(_forward, _backward)
