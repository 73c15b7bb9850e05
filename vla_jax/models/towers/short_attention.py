"""Attention of short sequences in one TPU kernel: a row's scores live in the chip's own memory.

Kernels for long sequences go through the keys in blocks of hundreds. Here all scores of a head fit
at once, so nothing is carried from block to block, no length needs padding, dropout is possible,
and heads are read as the projections leave them, side by side: with a head of its own an array of
64 numbers would take the place of 128, and every one would be transposed.

Legend: b rows · n query tokens · s key tokens · h heads · w head width
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Int

from vla_jax.models.towers.softmax import FORBIDDEN

LANES = 128  # numbers side by side in a TPU's registers
WORD = 32  # bits of the numbers that say what dropout keeps, one bit a head


class How(NamedTuple):
    """What the kernel is compiled for.

    Attributes:
        width: of a head.
        scale: of the scores.
        causal: tokens see those at or before them only.
        rate: of the dropout on the weights.
        interpret: run as plain operations, for tests.
    """

    width: int
    scale: float
    causal: bool
    rate: float
    interpret: bool = False


def fits(heads: int, width: int) -> bool:
    """Whether heads of this width fill whole registers."""
    # A head that begins within a register would have to be moved before every product.
    return width % LANES == 0 or (LANES % width == 0 and heads % (LANES // width) == 0)


def packed(keep: Bool[Array, "b h n s"]) -> Int[Array, "b c n s"]:
    """What dropout keeps, one bit a head: a 32nd of the bytes, and exact."""
    b, h, n, s = keep.shape
    # The last word of a place is filled up with heads that do not exist and are never asked for.
    keep = jnp.pad(keep, ((0, 0), (0, -h % WORD), (0, 0), (0, 0)))
    bits = keep.reshape(b, -1, WORD, n, s).astype(jnp.uint32)
    words = (bits << jnp.arange(WORD, dtype=jnp.uint32)[:, None, None]).sum(2, dtype=jnp.uint32)
    return words.astype(jnp.int32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(
    how: How,
    q: Float[Array, "b n hw"],
    k: Float[Array, "b s hw"],
    v: Float[Array, "b s hw"],
    valid: Int[Array, "b 1 s"],
    keep: Int[Array, "b c n s"] | None,
) -> Float[Array, "b n hw"]:
    """dropout(softmax(scale q k^T)) v of every head, over the rows of one device.

    Args:
        how: see `How`.
        q: of h heads side by side.
        k: of as many.
        v: see `k`.
        valid: 1 where a key may be attended to.
        keep: of `packed`; None without dropout.
    """
    shapes = [jax.ShapeDtypeStruct(q.shape, q.dtype)]
    return _call(how, _forward_kernel, [q, k, v], valid, keep, shapes)[0]


def _forward(how: How, q: Array, k: Array, v: Array, valid: Array, keep: Any) -> tuple[Array, Any]:
    # The scores are made anew: they take less time than their bytes would.
    return attend(how, q, k, v, valid, keep), (q, k, v, valid, keep)


def _backward(how: How, residuals: Any, gradient: Array) -> Any:
    q, k, v, valid, keep = residuals
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)]
    gradients = _call(how, _backward_kernel, [q, k, v, gradient], valid, keep, shapes)
    return (*gradients, None, None)


attend.defvjp(_forward, _backward)


def _call(
    how: How, kernel: Any, wide: list[Array], valid: Array, keep: Array | None, shapes: list[Any]
) -> Sequence[Array]:
    """Run a kernel for every row and block of heads."""
    rows, block = wide[0].shape[0], max(LANES, how.width)
    heads = block // how.width

    def tokens(x: Any) -> pl.BlockSpec:
        return pl.BlockSpec((1, x.shape[1], block), lambda i, j: (i, 0, j))

    specs = [tokens(x) for x in wide]
    specs.append(pl.BlockSpec((1, 1, valid.shape[2]), lambda i, j: (i, 0, 0)))
    inputs = [*wide, valid]
    if keep is not None:
        # The same words serve 32 heads, and stay where they are meanwhile.
        shape = (1, 1, *keep.shape[2:])
        specs.append(pl.BlockSpec(shape, lambda i, j: (i, j * heads // WORD, 0, 0)))
        inputs.append(keep)
    q, k = wide[:2]
    # Two products forward; five backward, which makes the scores anew.
    products = 2 * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[1] * (5 if len(wide) > 3 else 2)
    return pl.pallas_call(
        functools.partial(kernel, how, keep is not None),
        grid=(rows, q.shape[2] // block),
        in_specs=specs,
        out_specs=[tokens(x) for x in shapes],
        out_shape=shapes,
        cost_estimate=pl.CostEstimate(
            flops=products,
            transcendentals=q.shape[0] * q.shape[1] * k.shape[1] * (q.shape[2] // how.width),
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*inputs, *shapes)),
        ),
        interpret=how.interpret,
        name=kernel.__name__.strip("_"),
    )(*inputs)


def _parts(how: How, drops: bool, refs: Any, count: int) -> tuple[list[Array], Any, Any]:
    """The wide inputs as they are, what is forbidden [n, s], and keep(head of the block)."""
    wide = [ref[0] for ref in refs[:count]]
    (n, _), s = wide[0].shape, wide[1].shape[0]
    allowed = jnp.broadcast_to(refs[count][0] > 0, (n, s))
    if how.causal:
        row, column = (jax.lax.broadcasted_iota(jnp.int32, (n, s), axis) for axis in (0, 1))
        allowed = allowed & (row >= column)
    words: Any = refs[count + 1][0, 0] if drops else None
    # Heads of a block are a power of two in number, so no block lies in two words.
    first = pl.program_id(1) * (wide[0].shape[1] // how.width) % WORD

    def keep(head: int) -> Array:
        return (jax.lax.shift_right_logical(words, first + head) & 1) == 1

    # Made once and added to the scores of every head in the block.
    return wide, jnp.where(allowed, 0.0, FORBIDDEN), keep if drops else None


def _weights(how: How, q: Array, k: Array, forbidden: Array) -> Float[Array, "n s"]:
    """Softmax of a head's scores, float32."""
    scores = product(q, k, (1, 1)) * how.scale + forbidden
    # Less the largest score, as the exponential of a large one overflows.
    powers = jnp.exp(scores - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def product(a: Array, b: Array, contracted: tuple[int, int]) -> Array:
    """A matrix product within a kernel, in float32, over an axis of each."""
    axes = (((contracted[0],), (contracted[1],)), ((), ()))
    return jax.lax.dot_general(a, b, axes, preferred_element_type=jnp.float32)


def _dropped(how: How, x: Array, keep: Array | None) -> Array:
    return x if keep is None else jnp.where(keep, x * (1.0 / (1.0 - how.rate)), 0.0)


def _forward_kernel(how: How, drops: bool, *refs: Any) -> None:
    (q, k, v), forbidden, keep = _parts(how, drops, refs, 3)
    heads = []
    for head in range(q.shape[1] // how.width):
        at = slice(head * how.width, (head + 1) * how.width)
        weights = _weights(how, q[:, at], k[:, at], forbidden)
        weights = _dropped(how, weights, keep(head) if keep else None)
        heads.append(product(weights.astype(v.dtype), v[:, at], (1, 0)))
    refs[-1][0] = jnp.concatenate(heads, axis=1).astype(v.dtype)


def _backward_kernel(how: How, drops: bool, *refs: Any) -> None:
    (q, k, v, gradient), forbidden, keep = _parts(how, drops, refs, 4)
    out: list[list[Array]] = [[], [], []]
    for head in range(q.shape[1] // how.width):
        at = slice(head * how.width, (head + 1) * how.width)
        keep_of_head = keep(head) if keep else None
        weights = _weights(how, q[:, at], k[:, at], forbidden)
        by_weights = _dropped(how, product(gradient[:, at], v[:, at], (1, 1)), keep_of_head)
        # The weights of a query add up to 1, so what all of them would gain alike is taken off.
        inner = (weights * by_weights).sum(-1, keepdims=True)
        by_scores = (weights * (by_weights - inner) * how.scale).astype(q.dtype)
        # The values have met the weights after dropout, the scores those before it.
        attended = _dropped(how, weights, keep_of_head).astype(q.dtype)
        out[0].append(product(by_scores, k[:, at], (1, 0)))
        out[1].append(product(by_scores, q[:, at], (0, 0)))
        out[2].append(product(attended, gradient[:, at], (0, 0)))
    for ref, heads in zip(refs[-3:], out, strict=True):
        ref[0] = jnp.concatenate(heads, axis=1).astype(q.dtype)
