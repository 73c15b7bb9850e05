"""In which order gradients are computed, as far as memory hangs on it.

A compiler's scheduler puts off what nobody waits for, and begins with what waits for nobody. Both
hold memory through the backward pass of everything that stands before in the model.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int


@jax.custom_jvp
def together(values: Any) -> Any:
    """The same values, of whose gradients none is handed on before all are there.

    Where parameters and inputs of a part of the model go through it, the gradients of the
    parameters are not put off, and with them all that they are made of.
    """
    return values


@functools.partial(together.defjvp, symbolic_zeros=True)
def _together(primals: tuple[Any], tangents: tuple[Any]) -> tuple[Any, Any]:
    leaves, tree = jax.tree.flatten(tangents[0])
    # What is frozen has no gradient, and need not get one here. The barrier is transposed as it is.
    moving = [i for i, leaf in enumerate(leaves) if not isinstance(leaf, SymbolicZero)]
    for i, leaf in zip(
        moving, jax.lax.optimization_barrier([leaves[i] for i in moving]), strict=True
    ):
        leaves[i] = leaf
    return primals[0], tree.unflatten(leaves)


def lookup(table: Float[Array, "v d"], ids: Int[Array, "*b"]) -> Float[Array, "*b d"]:
    """Rows of a table, whose gradient takes memory only from when there is one."""
    return _lookup(table.shape, table, ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _lookup(shape: tuple[int, ...], table: Array, ids: Array) -> Array:
    del shape
    return jnp.take(table, ids, axis=0)


def _by_table(shape: tuple[int, ...], ids: Array, gradient: Array) -> tuple[Array, None]:
    # A zero that is known only now; a plain one would be spread over the table at any time before.
    zero, gradient = jax.lax.optimization_barrier((jnp.zeros((), gradient.dtype), gradient))
    return jnp.broadcast_to(zero, shape).at[ids].add(gradient, mode="drop"), None


_lookup.defvjp(lambda shape, table, ids: (_lookup(shape, table, ids), ids), _by_table)
