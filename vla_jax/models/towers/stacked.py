"""Some layers of a stack, without a copy of them.

A loop over all layers reads the parameters of each from the stack as it comes to it. A loop over a
part of them would read from a copy of that part, and the gradients of both parts would be joined in
one copy more. Here a loop reads any layer from the whole stack, and writes its gradients into the
whole stack's.

Legend: l layers · b batch · n tokens · d width
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vla_jax.models import sharding
from vla_jax.models.towers.block import Block, recomputed


class Stack(NamedTuple):
    """Parameters of all layers, [l, ...] each, to take every layer from once at most.

    Attributes:
        values: that are read; no gradient goes through them.
        sink: the same parameters, for gradients alone: layers that are taken one after another
            hand it on, and each adds its own.
    """

    values: Any
    sink: Any

    @classmethod
    def of(cls, params: Any) -> "Stack":
        """The stack before any layer is taken from it."""
        return cls(jax.lax.stop_gradient(params), params)


def run(
    step: Callable[[Any, Array, Any], tuple[Array, Any]],
    stack: Stack,
    x: Float[Array, "b n d"],
    own: Any,
    layers: tuple[int, int],
    kind: str,
) -> tuple[Float[Array, "b _ d"], Stack, Any]:
    """Layers one after another.

    Args:
        step: (parameters, tokens, what is the layer's own) -> (tokens, what it gives); of a layer.
        stack: of all layers.
        x: tokens; what the last layer gives may be fewer if it runs alone.
        own: of all layers, [l, ...] each.
        layers: the first, and the one after the last.
        kind: see `block.remat`.

    Returns:
        Tokens, the stack to take later layers from, and what the layers gave, stacked.
    """
    values, tree = jax.tree.flatten(stack.values)
    # Nothing reads them; made here, they are one array for all turns of the loop.
    zeros = [jnp.zeros(leaf.shape[1:], leaf.dtype) for leaf in values]
    first, end = layers
    turns = end - first
    # Without a loop numbers are known, and a compiler sees which layer a product reads.
    is_loop = not turns or turns != sharding.unroll(turns)

    def turn(carry: tuple[Array, Any], number: Any, own: Any) -> tuple[tuple[Array, Any], Any]:
        def one(marks: list[Array], x: Array, own: Any) -> tuple[Array, Any]:
            # Within what is recomputed, or every layer's parameters would be kept for it.
            here = [jax.lax.dynamic_index_in_dim(leaf, number, keepdims=False) for leaf in values]
            params = [_standing_for(*both) for both in zip(here, marks, strict=True)]
            return step(tree.unflatten(params), x, own)

        x, sink = carry
        marked = [_marked(*both, number) for both in zip(sink, zeros, strict=True)]
        x, out = recomputed(one, kind, is_loop)([mark for mark, _ in marked], x, own)
        return (x, [left for _, left in marked]), out

    carry = x, jax.tree.leaves(stack.sink)
    if is_loop:
        items = jnp.arange(first, end), jax.tree.map(lambda leaf: leaf[first:end], own)
        carry, out = jax.lax.scan(lambda carry, item: turn(carry, *item), carry, items)
    else:
        outs = []
        for i in range(first, end):
            carry, each = turn(carry, i, jax.tree.map(lambda leaf, i=i: leaf[i], own))
            outs.append(each)
        out = jax.tree.map(lambda *leaves: jnp.stack(leaves), *outs)
    return carry[0], Stack(stack.values, tree.unflatten(carry[1])), out


def some_layers(
    blocks: Any,
    stack: Stack,
    kind: str,
    layers: tuple[int, int],
    x: Float[Array, "b n d"],
    *args: Any,
) -> tuple[Float[Array, "b n d"], Stack]:
    """`run` for layers of a `block.stack`.

    Args:
        blocks: what `block.stack` returned, bound to its parent, with parameters.
        stack: of its layers.
        kind: see `block.remat`.
        layers: the first, and the one after the last.
        x: tokens.
        *args: further arguments of `Block`.
    """
    # Without a parent, or flax would register a second set of parameters. A module applied on its
    # own sees none of its parent's keys.
    block, keys = Block(blocks.spec, blocks.dtype, parent=None), {}
    if blocks.has_rng("dropout"):
        count = len(jax.tree.leaves(stack.values)[0])
        keys = {"dropout": jax.random.split(blocks.make_rng("dropout"), count)}

    def step(params: Any, x: Array, keys: Any) -> tuple[Array, None]:
        return block.apply({"params": params}, x, *args, rngs=keys)  # type: ignore[return-value]

    x, stack, _ = run(step, stack, x, keys, layers, kind)
    return x, stack


@jax.custom_vjp
def _marked(sink: Array, zeros: Array, number: Any) -> tuple[Array, Array]:
    """A mark for a layer, whose gradient becomes the layer's in the sink's; and the sink."""
    del number
    return zeros, sink


def _marked_backward(number: Any, gradients: tuple[Array, Array]) -> tuple[Array, None, None]:
    layer, others = gradients
    # In place: as yet the others hold zeros for this layer.
    return jax.lax.dynamic_update_index_in_dim(others, layer, number, 0), None, None


_marked.defvjp(lambda sink, zeros, number: ((zeros, sink), number), _marked_backward)


@jax.custom_vjp
def _standing_for(value: Array, mark: Array) -> Array:
    """The value, whose gradient goes to the mark."""
    del mark
    return value


_standing_for.defvjp(lambda value, mark: (value, None), lambda _, gradient: (None, gradient))
