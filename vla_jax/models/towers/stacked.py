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
            hand it on, and each adds its own. Kernels are in the type of the products here, as
            their gradients come.
    """

    values: Any
    sink: Any

    @classmethod
    def of(cls, params: Any, dtype: Any) -> "Stack":
        """The stack before any layer is taken from it; `dtype` is that of the products."""

        def sink(path: Any, leaf: Array) -> Array:
            # Nobody computes these values: what counts is the type that gradients are kept in.
            return leaf.astype(dtype) if path[-1].key == "kernel" else leaf

        return cls(jax.lax.stop_gradient(params), jax.tree_util.tree_map_with_path(sink, params))


def run(
    step: Callable[[Any, Array, Any], tuple[Array, Any]],
    stack: Stack,
    x: Float[Array, "b n d"],
    own: Any,
    layers: tuple[int, int],
    kind: str,
) -> tuple[Float[Array, "b n d"], Stack, Any]:
    """Layers one after another.

    Args:
        step: (parameters, tokens, what is the layer's own) -> (tokens, what it gives); of a layer.
        stack: of all layers.
        x: tokens.
        own: of all layers, [l, ...] each.
        layers: the first, and the one after the last.
        kind: see `block.remat`.

    Returns:
        Tokens, the stack to take later layers from, and what the layers gave, stacked.
    """
    first, end = layers
    # Made here, these are one array for all turns of the loop.
    marks = _marks(stack)
    # A control step on a GPU has no loop: with known numbers its compiler sees through the stack.
    if sharding.unroll(end - first + 1) > 1:
        outs = []
        for i in range(first, end):
            x, stack, out = _turn(step, stack, marks, x, i, _item(own, i), kind)
            outs.append(out)
        return x, stack, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outs)

    def turn(carry: tuple[Array, Any], item: tuple[Array, Any]) -> tuple[tuple[Array, Any], Any]:
        x, sink = carry
        x, left, out = _turn(step, Stack(stack.values, sink), marks, x, *item, kind)
        return (x, left.sink), out

    items = jnp.arange(first, end), jax.tree.map(lambda leaf: leaf[first:end], own)
    (x, sink), out = jax.lax.scan(turn, (x, stack.sink), items)
    return x, Stack(stack.values, sink), out


def run_last(
    step: Callable[[Any, Array, Any], tuple[Array, Any]],
    stack: Stack,
    x: Float[Array, "b n d"],
    own: Any,
) -> tuple[Float[Array, "b _ d"], Any]:
    """The last layer, not recomputed for its gradients, which come next; see `run`.

    Returns:
        What `step` gives.
    """
    last = len(jax.tree.leaves(stack.values)[0]) - 1
    x, _, out = _turn(step, stack, _marks(stack), x, last, _item(own, last), "none")
    return x, out


def _turn(
    step: Callable[[Any, Array, Any], tuple[Array, Any]],
    stack: Stack,
    marks: Any,
    x: Array,
    number: Any,
    own: Any,
    kind: str,
) -> tuple[Array, Stack, Any]:
    """One layer of `run`."""

    def layer(marks: Any, x: Array, own: Any) -> tuple[Array, Any]:
        # Within what is recomputed, or every layer's parameters would be kept for it.
        here = jax.tree.map(
            lambda leaf: jax.lax.dynamic_index_in_dim(leaf, number, keepdims=False), stack.values
        )
        marked = jax.tree.map(lambda a, b: _standing_for(a, b.astype(a.dtype)), here, marks)
        return step(marked, x, own)

    leaves, tree = jax.tree.flatten(stack.sink)
    marked = [_marked(*both, number) for both in zip(leaves, jax.tree.leaves(marks), strict=True)]
    here, sink = (tree.unflatten([pair[i] for pair in marked]) for i in range(2))
    x, out = recomputed(layer, kind)(here, x, own)
    return x, Stack(stack.values, sink), out


def _marks(stack: Stack) -> Any:
    """Of one layer; nothing reads them, but gradients go through them."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[1:], leaf.dtype), stack.sink)


def _item(own: Any, number: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[number], own)


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
