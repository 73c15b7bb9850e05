"""Norms over the last axis. Statistics are in float32, whatever comes in and goes out.

Their gradients are written out: differentiated by itself, a norm keeps several float32 arrays of
its input's shape between its passes, where the input and two numbers a token do.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class LayerNorm(nn.Module):
    """Layer normalization with statistics in float32 (torch's two-pass variance)."""

    eps: float = 1e-5
    dtype: Any = jnp.float32
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        """Normalize the last axis, then scale and shift."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = None
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        return _normalize(True, self.eps, jnp.dtype(self.dtype), x, scale, bias)


class RMSNorm(nn.Module):
    """Division by the root mean square, in float32, then a scale.

    Attributes:
        offset: added to the stored scale; 1 for Gemma, whose checkpoints store it around zero.
    """

    eps: float = 1e-6
    dtype: Any = jnp.float32
    offset: float = 0.0

    @nn.compact
    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        """Normalize the last axis."""
        scale = self.param("scale", nn.initializers.constant(1.0 - self.offset), x.shape[-1:])
        return _normalize(False, self.eps, jnp.dtype(self.dtype), x, scale + self.offset, None)


# kind -> module to call with (eps, dtype)
NORMS: dict[str, Callable[..., nn.Module]] = {
    "layer": LayerNorm,
    "layer_no_bias": functools.partial(LayerNorm, use_bias=False),
    "rms": RMSNorm,
    "rms_plus_one": functools.partial(RMSNorm, offset=1.0),
}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _normalize(
    center: bool, eps: float, dtype: Any, x: Array, scale: Array, bias: Array | None
) -> Array:
    return _forward(center, eps, dtype, x, scale, bias)[0]


def _forward(
    center: bool, eps: float, dtype: Any, x: Array, scale: Array, bias: Array | None
) -> tuple[Array, Any]:
    wide = x.astype(jnp.float32)
    mean = wide.mean(-1, keepdims=True) if center else None
    if mean is not None:
        wide = wide - mean
    root = jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + eps)
    y = wide * root * scale
    if bias is not None:
        y = y + bias
    # `wide` is made again from `x`: two numbers a token are saved in place of an array.
    return y.astype(dtype), (x, mean, root, scale, bias)


def _backward(center: bool, eps: float, dtype: Any, residuals: Any, gradient: Array) -> Any:
    del eps, dtype
    x, mean, root, scale, bias = residuals
    # Two numbers a token: computed within each of the sums below, they would bring the product of
    # gradient and unit vector to memory, in float32.
    mean, root = jax.lax.optimization_barrier((mean, root))
    wide, gradient = x.astype(jnp.float32), gradient.astype(jnp.float32)
    unit = (wide if mean is None else wide - mean) * root
    lead = tuple(range(x.ndim - 1))
    inner = gradient * scale
    # The gradient loses its part along the unit vector: scaling `x` changes nothing.
    by_x = inner - unit * (inner * unit).mean(-1, keepdims=True)
    if center:
        # And its mean, as adding a constant to `x` changes nothing either.
        by_x = by_x - inner.mean(-1, keepdims=True)
    # Summed over all tokens in float32, where bfloat16 would lose the small terms.
    by_scale = (gradient * unit).sum(lead).astype(scale.dtype)
    by_bias = None if bias is None else gradient.sum(lead).astype(bias.dtype)
    return (by_x * root).astype(x.dtype), by_scale, by_bias


_normalize.defvjp(_forward, _backward)
