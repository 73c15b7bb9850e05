"""Attention in one kernel, where the machine has one: the scores never lie in memory.

Which machine that is the mesh of the step says, not this process: a program may be compiled for
devices that are not here. Without a mesh (serving, tests) there is no fused kernel.

Legend: b batch · n query tokens · s key tokens · h query heads · g key heads, k head width
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from vla_jax.models.sharding import ROWS
from vla_jax.models.towers import short_attention
from vla_jax.models.towers.short_attention import LANES

# JAX's own kernel works on blocks of at least LANES tokens, and pads to them; shorter sequences
# have a kernel whose scores fit into the chip's own memory.
SHORTEST_ON_TPU = 576
BLOCK = 512
GRANULE = 8  # GPU products of half precision want multiples of it
WIDEST_HEAD = 128  # of cuDNN's kernel on every GPU that has it
HALVES = (jnp.bfloat16, jnp.float16)  # all that GPUs' kernels take
# Fewer queries than a block of the kernels that drop have few scores, too.
FEWEST_QUERIES = 64


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rule:
    """A mask by its rule, for kernels that need no [b, n, n] of it: tokens see the valid ones.

    Attributes:
        valid: bool [#b, n], False on padding.
        causal: ... and of these only those at or before them.
    """

    valid: Any
    causal: bool = field(default=True, metadata={"static": True})

    def dense(self) -> Bool[Array, "#b #n n"]:
        """The same as a plain mask."""
        n, visible = self.valid.shape[1], self.valid[:, None, :]
        return jnp.tril(jnp.ones((n, n), bool)) & visible if self.causal else visible


Mask = Bool[Array, "#b #n s"] | Rule | None


class Drop(NamedTuple):
    """Dropout on the attention weights.

    Attributes:
        rate: share that is dropped.
        keep: draws the weights that stay, [b, h, n, s].
        seed: draws two words, for kernels that decide by themselves what stays.
    """

    rate: float
    keep: Callable[[], Array]
    seed: Callable[[], Array]


def attend(
    q: Float[Array, "b n h k"],
    k: Float[Array, "b s g k"],
    v: Float[Array, "b s g k"],
    mask: Mask,
    scale: float,
    drop: Drop | None = None,
) -> Float[Array, "b n h k"] | None:
    """dropout(softmax(scale q k^T)) v in one kernel, or None where there is none for this case.

    What padding attends to is not defined, and differs from the plain computation.

    Args:
        q: of h heads.
        k: of g heads, each shared by h / g query heads.
        v: see `k`.
        mask: True where attention is allowed; a `Rule` in self-attention only; None = everywhere.
        scale: of the scores.
        drop: dropout of the weights, if any.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    # Rows that the devices do not divide cannot be handed out to one kernel each; and there may be
    # no token to attend, where keys alone are wanted.
    if device is None or not q.shape[1] or not _rows_split(q):
        return None
    if device.platform == "gpu":
        if q.dtype not in HALVES:
            return None
        # cuDNN's dropout takes its seed when it is compiled: every step would drop the same.
        if drop is None:
            return _on_gpu(q, k, v, mask, scale)
        return _dropping_on_gpu(q, k, v, mask, scale, drop)
    if device.platform == "tpu" and (mask is None or isinstance(mask, Rule)):
        if max(q.shape[1], k.shape[1]) < SHORTEST_ON_TPU:
            return _short_on_tpu(q, k, v, mask, scale, drop)
        return _on_tpu(q * scale, k, v, mask) if drop is None else None
    return None


def padded(x: Float[Array, "b n d"], rope: Any) -> tuple[Array, Mask, Any]:
    """Tokens that all see each other, in the number that the machine's kernels want.

    One length for all layers costs a few idle tokens; each layer would pad and cut by itself.

    Args:
        x: tokens.
        rope: cosines and sines of every token, or None.

    Returns:
        The tokens, which may be more, the mask that hides those, and `rope` of all.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    more = -x.shape[1] % GRANULE
    if device is None or device.platform != "gpu" or not more:
        return x, None, rope
    pad = ((0, 0), (0, more), (0, 0))
    rope = None if rope is None else tuple(jnp.pad(angle, pad) for angle in rope)
    valid = jnp.arange(x.shape[1] + more)[None] < x.shape[1]
    return jnp.pad(x, pad), Rule(valid, causal=False), rope


def _rows_split(q: Array) -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    return q.shape[0] % math.prod(mesh.shape.get(axis, 1) for axis in ROWS) == 0


def _on_gpu(q: Array, k: Array, v: Array, mask: Mask, scale: float) -> Array | None:
    """CuDNN's kernel."""
    width = q.shape[-1]
    if width % 8 or width > WIDEST_HEAD:
        return None
    n, s = q.shape[1], k.shape[1]
    # An odd length gets a padded key, which only a mask can hide.
    if s % 2 and mask is None:
        mask = jnp.ones((1, 1, s), bool)
    if mask is not None:
        mask = mask.dense() if isinstance(mask, Rule) else mask
        mask = jnp.broadcast_to(mask, (mask.shape[0], n, s))
        mask = jnp.pad(mask, ((0, 0), (0, n % 2), (0, s % 2)))[:, None]
    # The kernel takes even lengths; what is added is masked, or cut off again.
    q, k, v = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (q, k, v))
    x = jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale, implementation="cudnn")
    return x[:, :n]


def _dropping_on_gpu(
    q: Array, k: Array, v: Array, mask: Mask, scale: float, drop: Drop, interpret: bool = False
) -> Array | None:
    """Our own kernels, for heads whose width is a power of two."""
    # Only here: what Pallas has for Triton takes a while to load, and is for GPUs alone.
    from vla_jax.models.towers import dropping_attention

    if q.shape[3] not in dropping_attention.WIDTHS or q.shape[1] < FEWEST_QUERIES:
        return None
    axis, causal = _heads_axis(q, k), isinstance(mask, Rule) and mask.causal
    how = dropping_attention.How(scale, causal, drop.rate, q.shape[2], interpret)
    wide = PartitionSpec(ROWS, None, axis)
    args, specs = [q, k, v, drop.seed()], [wide, wide, wide, PartitionSpec()]
    if mask is not None:
        args.append(mask.valid[:, None] if isinstance(mask, Rule) else mask)
        specs.append(PartitionSpec(ROWS if len(args[-1]) > 1 else None))

    def run(q: Array, k: Array, v: Array, words: Array, mask: Array | None = None) -> Array:
        # What a row and head drop hangs on their numbers in the whole batch, not on the mesh.
        row = jax.lax.axis_index(ROWS) * q.shape[0]
        head = jax.lax.axis_index(axis) * q.shape[2] if axis else jnp.zeros_like(row)
        seed = jnp.concatenate([words, jnp.stack([row, head]).astype(words.dtype)])
        return dropping_attention.attend(how, q, k, v, mask, seed)

    # A Pallas call is opaque to the partitioner, so each device is told to run its own rows.
    run = jax.shard_map(run, in_specs=tuple(specs), out_specs=wide, check_vma=False)
    return run(*args)


def _short_on_tpu(
    q: Array,
    k: Array,
    v: Array,
    mask: Rule | None,
    scale: float,
    drop: Drop | None,
    interpret: bool = False,
) -> Array | None:
    """Our own kernel, for heads that fill registers and share no keys."""
    (b, n, h, width), s = q.shape, k.shape[1]
    mesh = jax.sharding.get_abstract_mesh()
    axis = _heads_axis(q, k)
    if k.shape[2] != h or not short_attention.fits(h // mesh.shape.get(axis, 1), width):
        return None
    valid = mask.valid if mask is not None else jnp.ones((1, s), bool)
    valid = jnp.broadcast_to(valid, (b, s))[:, None].astype(jnp.int32)
    causal = mask is not None and mask.causal
    how = short_attention.How(width, scale, causal, drop.rate if drop else 0.0, interpret)

    def run(q: Array, k: Array, v: Array, valid: Array, *keep: Array) -> Array:
        words = short_attention.packed(keep[0]) if keep else None
        return short_attention.attend(how, q, k, v, valid, words)

    rows, wide = PartitionSpec(ROWS), PartitionSpec(ROWS, None, axis)
    keep, specs = (), (wide, wide, wide, rows)
    if drop is not None:
        keep, specs = (drop.keep(),), (*specs, PartitionSpec(ROWS, axis))
    # A Pallas call is opaque to the partitioner, so each device is told to run its own rows.
    run = jax.shard_map(run, in_specs=specs, out_specs=wide, check_vma=False)
    q, k, v = (x.reshape(b, -1, h * width) for x in (q, k, v))
    return run(q, k, v, valid, *keep).reshape(b, n, h, width)


def _heads_axis(q: Array, k: Array) -> str | None:
    """Heads are split over the tensor axis only where both counts allow it."""
    tensor = jax.sharding.get_abstract_mesh().shape["tensor"]
    return None if q.shape[2] % tensor or k.shape[2] % tensor else "tensor"


def _on_tpu(
    q: Array, k: Array, v: Array, mask: Rule | None, interpret: bool = False
) -> Array | None:
    """JAX's splash kernel, long sequences that attend to themselves alone; `q` is scaled."""
    n, axis = q.shape[1], _heads_axis(q, k)
    if k.shape[1] != n:
        return None
    valid = mask.valid if mask is not None else jnp.ones(q.shape[:2], bool)
    valid = jnp.broadcast_to(valid, q.shape[:2])
    # Padding attends to padding: with nothing to attend to a row would be no number.
    padded = -(-n // LANES) * LANES
    pad = ((0, 0), (0, padded - n))
    ids = jnp.pad(valid, pad).astype(jnp.int32)
    q, k, v = (jnp.pad(x, (*pad, (0, 0), (0, 0))).swapaxes(1, 2) for x in (q, k, v))
    heads = PartitionSpec(ROWS, axis)
    kernel = functools.partial(_splash, mask is not None and mask.causal, interpret)
    # A Pallas call is opaque to the partitioner, so each device is told to run its own rows.
    run = jax.shard_map(
        kernel, in_specs=(heads,) * 3 + (PartitionSpec(ROWS),), out_specs=heads, check_vma=False
    )
    return run(q, k, v, ids).swapaxes(1, 2)[:, :n]


def _splash(causal: bool, interpret: bool, q: Array, k: Array, v: Array, ids: Array) -> Array:
    """The kernel over the rows [b, h, n, k] of one device."""
    # Only here: it takes a second to load, and most machines never need it.
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel,
        splash_attention_mask,
    )

    heads, n = q.shape[1:3]
    # The kernel wants blocks that divide the length.
    block = next(size for size in (BLOCK, 384, 256, LANES) if n % size == 0)
    shape = (n, n)
    rule: Any = splash_attention_mask.CausalMask if causal else splash_attention_mask.FullMask
    names = ("q", "kv", "q_dkv", "kv_dkv", "q_dq", "kv_dq")
    sizes: dict[str, Any] = {f"block_{name}": block for name in names}
    kernel = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([rule(shape)] * heads),
        block_sizes=splash_attention_kernel.BlockSizes(**sizes),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    segments = splash_attention_kernel.SegmentIds(ids, ids)
    attended: Any = jax.vmap(kernel)(q, k, v, segments)
    return attended
