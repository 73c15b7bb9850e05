"""Attention with dropout in GPU kernels of our own: neither scores nor what is dropped is stored.

The kernels go through the keys in blocks and keep a running softmax (Dao et al. 2022,
"FlashAttention"). Whether a weight is dropped follows from its place, (seed, row, head, query,
key), by a hash, so both passes drop the same without remembering it; the seed is an input, so every
step drops others. cuDNN's kernel has its seed compiled into it.

Legend: b rows · n query tokens · s key tokens · h query heads · g key heads, each shared by h / g
query heads · w head width · i queries and j keys of a block
"""

import functools
import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Bool, Float, UInt32

from vla_jax.models.towers.short_attention import product

WIDTHS = (16, 32, 64, 128)  # of heads: a power of two, as all that a Triton kernel loads
# Queries and keys of a block, forward, and of both kernels of the backward pass.
FORWARD, BACKWARD = (128, 64), (64, 64)
_LOG2 = math.log2(math.e)  # powers of two are what the hardware has
# The first is below any score, the second below the first: what is forbidden gets weight 0 even
# where nothing is allowed, and no difference of two is no number.
_LOWEST, _FORBIDDEN = -1e20, -1e30
_GOLDEN = np.uint32(0x9E3779B9)  # 2^32 over the golden ratio: spreads neighbors far apart
# Multipliers of a good 32-bit hash, found by search (C. Wellons, hash-prospector, 2018).
_ODD = np.uint32(0x21F0AAAD), np.uint32(0x735A2D97)


class How(NamedTuple):
    """What the kernels are compiled for.

    Attributes:
        scale: of the scores.
        causal: tokens see those at or before them only; n = s.
        rate: of the dropout on the weights.
        heads: query heads over all devices.
        interpret: run as plain operations, for tests.
    """

    scale: float
    causal: bool
    rate: float
    heads: int
    interpret: bool = False


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(
    how: How,
    q: Float[Array, "b n h w"],
    k: Float[Array, "b s g w"],
    v: Float[Array, "b s g w"],
    mask: Bool[Array, "#b #n s"] | None,
    seed: UInt32[Array, "4"],
) -> Float[Array, "b n h w"]:
    """dropout(softmax(scale q k^T)) v over the rows and heads of one device.

    A token that may attend to nothing gets zeros.

    Args:
        how: see `How`.
        q: w is one of `WIDTHS`.
        k: see `q`.
        v: see `q`.
        mask: True where attention is allowed; None = everywhere.
        seed: two random words, and the numbers, over all devices, of the first row and head here.
    """
    return _attended(how, q, k, v, mask, seed)[0]


def _forward(how: How, q: Array, k: Array, v: Array, mask: Any, seed: Array) -> tuple[Array, Any]:
    out, logs = _attended(how, q, k, v, mask, seed)
    return out, (q, k, v, mask, seed, out, logs)


def _attended(how: How, q: Array, k: Array, v: Array, mask: Any, seed: Array) -> Any:
    """The result, and the binary logarithm of the sum of each query's powers, float32 [b, h, n]."""
    (b, n, h, _), ratio = q.shape, q.shape[2] // k.shape[2]
    wide = [(q, _tokens(q)), (k, _tokens(k, ratio)), (v, _tokens(v, ratio))]
    logs = jax.ShapeDtypeStruct((b, h, n), jnp.float32)
    outs = [(jax.ShapeDtypeStruct(q.shape, q.dtype), _tokens(q)), (logs, _sums(n))]
    grid = (pl.cdiv(n, FORWARD[0]), b, h)
    return _call(how, _forward_kernel, 2, grid, wide, (mask, seed), outs)


def _backward(how: How, residuals: Any, gradient: Array) -> Any:
    q, k, v, mask, seed, out, logs = residuals
    (b, n, h, _), (_, s, groups, _) = q.shape, k.shape
    ratio = h // groups
    # Of each query the mean gradient of its weights, in which dropout is accounted for.
    mean = (gradient.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1).swapaxes(1, 2)
    # Two kernels, one over queries and one over keys: each sums up what it alone writes, so that no
    # program has to add to the memory of another.
    own, keys = _tokens(q), _tokens(k, ratio)
    inputs = [(q, own), (k, keys), (v, keys), (gradient, own), (logs, _sums(n)), (mean, _sums(n))]
    outs = [(jax.ShapeDtypeStruct(q.shape, q.dtype), own)]
    grid = (pl.cdiv(n, BACKWARD[0]), b, h)
    (by_q,) = _call(how, _query_kernel, 3, grid, inputs, (mask, seed), outs)
    # A key head with all the query heads that share it.
    own, keys, sums = _tokens(q, heads=ratio), _tokens(k), _sums(n, ratio)
    inputs = [(q, own), (k, keys), (v, keys), (gradient, own), (logs, sums), (mean, sums)]
    outs = [(jax.ShapeDtypeStruct(x.shape, x.dtype), keys) for x in (k, v)]
    grid = (pl.cdiv(s, BACKWARD[1]), b, groups)
    by_k, by_v = _call(how, _key_kernel, 4, grid, inputs, (mask, seed), outs)
    return by_q, by_k, by_v, None, None


attend.defvjp(_forward, _backward)


def _tokens(x: Array, ratio: int = 1, heads: int | None = None) -> pl.BlockSpec:
    """All tokens of the head that `ratio` programs share, or of several heads."""
    shape = (None, x.shape[1], heads, x.shape[3])
    return pl.BlockSpec(shape, lambda block, row, head: (row, 0, head // ratio, 0))


def _sums(n: int, heads: int | None = None) -> pl.BlockSpec:
    return pl.BlockSpec((None, heads, n), lambda block, row, head: (row, head, 0))


def _call(
    how: How,
    kernel: Any,
    products: int,
    grid: tuple[int, int, int],
    inputs: list[tuple[Array, pl.BlockSpec]],
    shared: tuple[Array | None, Array],
    outs: list[tuple[Any, pl.BlockSpec]],
) -> Any:
    """Run a kernel for every block of tokens, row and head."""
    (mask, seed), q, k = shared, inputs[0][0], inputs[1][0]
    inputs = [*inputs, (seed, pl.BlockSpec((4,), lambda block, row, head: (0,)))]
    if mask is not None:
        rows, queries, keys = mask.shape
        shape = (None, queries if queries > 1 else None, keys)
        spec = pl.BlockSpec(shape, lambda block, row, head: (row if rows > 1 else 0, 0, 0))
        inputs.append((mask, spec))
    arrays, shapes = [x for x, _ in inputs], [x for x, _ in outs]
    wide = kernel is _forward_kernel or q.shape[-1] > 64
    return pl.pallas_call(
        functools.partial(kernel, how),
        grid=grid,
        in_specs=[spec for _, spec in inputs],
        out_specs=[spec for _, spec in outs],
        out_shape=shapes,
        cost_estimate=pl.CostEstimate(
            # What a causal mask leaves out counts too, as it does for other kernels.
            flops=2 * products * math.prod(q.shape) * k.shape[1],
            transcendentals=math.prod(q.shape[:3]) * k.shape[1],
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*arrays, *shapes)),
        ),
        # Registers: a large block, or a wide head, is shared by twice as many threads.
        compiler_params=triton.CompilerParams(num_warps=8 if wide else 4, num_stages=2),
        interpret=how.interpret,
        name="dropping_" + kernel.__name__.strip("_"),
    )(*arrays)


@dataclass(frozen=True)
class _Scores:
    """Blocks of the scores of one row, as a kernel goes through them.

    Attributes:
        how: see `How`.
        seed: its random words.
        first: the number of this row's first head here among those of all rows.
        masks: where the mask lies, if there is one.
        lengths: n and s.
        sizes: i and j.
        keys_first: blocks are [j, i].
    """

    how: How
    seed: tuple[Any, Any]
    first: Any
    masks: list[Any]
    lengths: tuple[int, int]
    sizes: tuple[int, int]
    keys_first: bool = False

    @classmethod
    def of(
        cls, how: How, refs: tuple[Any, Any], lengths: tuple[int, int], sizes: tuple[int, int]
    ) -> "_Scores":
        """The scores of this program's row.

        Args:
            how: see `How`.
            refs: where the seed lies, and the mask if there is one.
            lengths: n and s.
            sizes: i and j.
        """
        seed, masks = refs
        # Counted over all devices: a row drops the same on any mesh, and no two rows draw alike.
        row = seed[2] + pl.program_id(1).astype(jnp.uint32)
        first = row * np.uint32(how.heads) + seed[3]
        return cls(how, (seed[0], seed[1]), first, masks, lengths, sizes)

    def forbidding(self, scores: Array, starts: tuple[Any, Any]) -> Array:
        """Scores of the block that begins at this query and key, where attention is allowed."""
        (_, s), allowed = self.lengths, []
        rows, columns = self._numbers(starts)
        # Keys behind the last are loaded as zeros, and a score of 0 may well be the largest.
        if s % self.sizes[1]:
            allowed.append(self._key(columns < s))
        if self.how.causal:
            allowed.append(self._query(rows) >= self._key(columns))
        for mask in self.masks:
            allowed.append(self._loaded(mask, starts))
        if not allowed:
            return scores
        return jnp.where(functools.reduce(jnp.logical_and, allowed), scores, _FORBIDDEN)

    def dropping(self, x: Array, starts: tuple[Any, Any], head: Any) -> Array:
        """The same block of weights or their gradients, with zeros for what is dropped."""
        rows, columns = (numbers.astype(jnp.uint32) for numbers in self._numbers(starts))
        head = self.first + head.astype(jnp.uint32)
        # Words of queries and of keys are thoroughly mixed; each pair then needs little more.
        by_query = _mixed(_mixed(self.seed[0] ^ _mixed(head)) + rows * _GOLDEN)
        by_key = _mixed(_mixed(self.seed[1] ^ _mixed(~head)) + columns * _GOLDEN)
        word = (self._query(by_query) ^ self._key(by_key)) * _ODD[0]
        word = (word ^ (word >> np.uint32(15))) * _ODD[1]
        # The words are spread evenly, so the share `rate` of them lies below this bound.
        return jnp.where(word >= np.uint32(round(self.how.rate * 2**32)), x, 0.0)

    def _numbers(self, starts: tuple[Any, Any]) -> list[Array]:
        return [start + jnp.arange(size) for start, size in zip(starts, self.sizes, strict=True)]

    def _query(self, x: Array) -> Array:
        return x[None] if self.keys_first else x[:, None]

    def _key(self, x: Array) -> Array:
        return x[:, None] if self.keys_first else x[None]

    def _loaded(self, mask: Any, starts: tuple[Any, Any]) -> Array:
        (i, j), (rows, columns) = self.sizes, self._numbers(starts)
        inside, at = columns < self.lengths[1], pl.ds(starts[1], j)
        if len(mask.shape) == 1:  # the same for all queries
            return self._key(triton.load(mask.at[at], mask=inside, other=False))
        inside = (rows < self.lengths[0])[:, None] & inside[None]
        loaded = triton.load(mask.at[pl.ds(starts[0], i), at], mask=inside, other=False)
        return loaded.T if self.keys_first else loaded


def _mixed(x: Array) -> Array:
    """A permutation of the words in which every bit hangs on all."""
    x = (x ^ (x >> np.uint32(16))) * _ODD[0]
    x = (x ^ (x >> np.uint32(15))) * _ODD[1]
    return x ^ (x >> np.uint32(15))


def _load(ref: Any, start: Any, size: int, *head: Any) -> Float[Array, "size w"]:
    """Tokens of a head; zeros behind the last."""
    inside = (start + jnp.arange(size) < ref.shape[0])[:, None]
    return triton.load(ref.at[(pl.ds(start, size), *head)], mask=inside, other=0.0)


def _load_sums(ref: Any, start: Any, size: int, *head: Any) -> Float[Array, "size"]:
    inside = start + jnp.arange(size) < ref.shape[-1]
    return triton.load(ref.at[(*head, pl.ds(start, size))], mask=inside, other=0.0)


def _store(ref: Any, start: Any, x: Array) -> None:
    inside = start + jnp.arange(x.shape[0]) < ref.shape[0]
    inside = inside if x.ndim == 1 else inside[:, None]
    triton.store(ref.at[pl.ds(start, x.shape[0])], x.astype(ref.dtype), mask=inside)


def _forward_kernel(how: How, q_ref: Any, k_ref: Any, v_ref: Any, seed: Any, *refs: Any) -> None:
    """A block of queries against all keys."""
    *masks, out, logs = refs
    (n, w), s, (i, j) = q_ref.shape, k_ref.shape[0], FORWARD
    start, head = pl.program_id(0) * i, pl.program_id(2)
    block = _Scores.of(how, (seed, masks), (n, s), FORWARD)
    q = _load(q_ref, start, i)

    def turn(number: Any, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        summed, highest, total = carry
        at = start, number * j
        k, v = (_load(ref, at[1], j) for ref in (k_ref, v_ref))
        scores = block.forbidding(product(q, k, (1, 1)) * (how.scale * _LOG2), at)
        higher = jnp.maximum(highest, scores.max(1))
        powers, shrunk = jnp.exp2(scores - higher[:, None]), jnp.exp2(highest - higher)
        total = total * shrunk + powers.sum(1)
        # Behind the sum: the softmax divides by all of the weights, dropped or not.
        powers = block.dropping(powers, at, head).astype(v.dtype)
        return summed * shrunk[:, None] + product(powers, v, (1, 0)), higher, total

    zeros = jnp.zeros((i, w), jnp.float32), jnp.full((i,), _LOWEST), jnp.zeros((i,), jnp.float32)
    summed, highest, total = jax.lax.fori_loop(0, _end(how, start + i, s, j), turn, zeros)
    # A query that may see nothing has no weights to divide by; it gets zeros and not NaN.
    total = jnp.where(total == 0.0, 1.0, total)
    _store(out, start, summed / (total * (1.0 - how.rate))[:, None])
    # From this one number a query the backward pass makes all weights anew, in one go.
    _store(logs, start, highest + jnp.log2(total))


def _end(how: How, rows: Any, s: int, size: int) -> Any:
    """Blocks of keys that queries before `rows` may attend to."""
    count = pl.cdiv(s, size)
    return jnp.minimum(count, jax.lax.div(rows + size - 1, size)) if how.causal else count


def _query_kernel(
    how: How,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    gradient_ref: Any,
    logs_ref: Any,
    mean_ref: Any,
    seed: Any,
    *refs: Any,
) -> None:
    """Gradients of a block of queries, from all keys."""
    *masks, out = refs
    (n, w), s, (i, j) = q_ref.shape, k_ref.shape[0], BACKWARD
    start, head = pl.program_id(0) * i, pl.program_id(2)
    block = _Scores.of(how, (seed, masks), (n, s), BACKWARD)
    q, gradient = (_load(ref, start, i) for ref in (q_ref, gradient_ref))
    logs, mean = (_load_sums(ref, start, i)[:, None] for ref in (logs_ref, mean_ref))

    def turn(number: Any, summed: Array) -> Array:
        at = start, number * j
        k, v = (_load(ref, at[1], j) for ref in (k_ref, v_ref))
        scores = block.forbidding(product(q, k, (1, 1)) * (how.scale * _LOG2), at)
        by_weights = block.dropping(product(gradient, v, (1, 1)), at, head) / (1.0 - how.rate)
        by_scores = jnp.exp2(scores - logs) * (by_weights - mean)
        return summed + product(by_scores.astype(k.dtype), k, (1, 0))

    zeros = jnp.zeros((i, w), jnp.float32)
    summed = jax.lax.fori_loop(0, _end(how, start + i, s, j), turn, zeros)
    _store(out, start, summed * how.scale)


def _key_kernel(
    how: How,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    gradient_ref: Any,
    logs_ref: Any,
    mean_ref: Any,
    seed: Any,
    *refs: Any,
) -> None:
    """Gradients of a block of keys and values, from all queries of the heads that share them."""
    *masks, k_out, v_out = refs
    (n, ratio, _), (s, w), (i, j) = q_ref.shape, k_ref.shape, BACKWARD
    start, first_head = pl.program_id(0) * j, pl.program_id(2) * ratio
    block = replace(_Scores.of(how, (seed, masks), (n, s), BACKWARD), keys_first=True)
    k, v = (_load(ref, start, j) for ref in (k_ref, v_ref))

    def heads(number: Any, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        head = first_head + number

        def turn(number_of_block: Any, sums: tuple[Array, Array]) -> tuple[Array, Array]:
            at = number_of_block * i, start
            q, gradient = (_load(ref, at[0], i, number) for ref in (q_ref, gradient_ref))
            logs, mean = (_load_sums(ref, at[0], i, number)[None] for ref in (logs_ref, mean_ref))
            scores = block.forbidding(product(k, q, (1, 1)) * (how.scale * _LOG2), at)
            weights = jnp.exp2(scores - logs)
            # The values have met the weights after dropout, the scores those before it.
            dropped = block.dropping(weights, at, head).astype(q.dtype)
            by_weights = block.dropping(product(v, gradient, (1, 1)), at, head) / (1.0 - how.rate)
            by_scores = (weights * (by_weights - mean)).astype(q.dtype)
            by_k, by_v = sums
            return by_k + product(by_scores, q, (1, 0)), by_v + product(dropped, gradient, (1, 0))

        # Queries before the first key do not see it.
        first = jax.lax.div(start, i) if how.causal else 0
        return jax.lax.fori_loop(first, pl.cdiv(n, i), turn, sums)

    zeros = jnp.zeros((j, w), jnp.float32)
    by_k, by_v = jax.lax.fori_loop(0, ratio, heads, (zeros, zeros))
    _store(k_out, start, by_k * how.scale)
    _store(v_out, start, by_v / (1.0 - how.rate))
