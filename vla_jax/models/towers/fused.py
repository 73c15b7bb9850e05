"""Attention in one kernel, where the machine has one: the scores never lie in memory.

Which machine that is the mesh of the step says, not this process: a program may be compiled for
devices that are not here. Without a mesh (serving, tests) there is no fused kernel.

Legend: b batch · n query tokens · s key tokens · h query heads · g key heads, k head width
"""

import functools
import math
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from vla_jax.models.sharding import ROWS

# Shorter sequences are faster as plain products on TPUs: the kernel works on blocks of at least
# LANES tokens, and pads to them.
SHORTEST_ON_TPU = 576
LANES, BLOCK = 128, 512
GRANULE = 8  # GPU products of half precision want multiples of it
WIDEST_HEAD = 128  # of cuDNN's kernel on every GPU that has it


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


def attend(
    q: Float[Array, "b n h k"],
    k: Float[Array, "b s g k"],
    v: Float[Array, "b s g k"],
    mask: Mask,
    scale: float,
) -> Float[Array, "b n h k"] | None:
    """softmax(scale q k^T) v in one kernel, or None where there is none for this case.

    What padding attends to is not defined, and differs from the plain computation.

    Args:
        q: of h heads.
        k: of g heads, each shared by h / g query heads.
        v: see `k`.
        mask: True where attention is allowed; a `Rule` in self-attention only; None = everywhere.
        scale: of the scores.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    # Rows that the devices do not divide cannot be handed out to one kernel each.
    if device is None or not _rows_split(q):
        return None
    if device.platform == "gpu":
        return _on_gpu(q, k, v, mask, scale)
    if device.platform == "tpu":
        return _on_tpu(q * scale, k, v, mask)
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
    """CuDNN's kernel, half precision alone."""
    width = q.shape[-1]
    if q.dtype not in (jnp.bfloat16, jnp.float16) or width % 8 or width > WIDEST_HEAD:
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


def _on_tpu(q: Array, k: Array, v: Array, mask: Mask, interpret: bool = False) -> Array | None:
    """JAX's splash kernel, long sequences that attend to themselves alone; `q` is scaled."""
    n, mesh = q.shape[1], jax.sharding.get_abstract_mesh()
    has_rule = mask is None or isinstance(mask, Rule)
    if n < SHORTEST_ON_TPU or k.shape[1] != n or not has_rule:
        return None
    valid = mask.valid if isinstance(mask, Rule) else jnp.ones(q.shape[:2], bool)
    valid = jnp.broadcast_to(valid, q.shape[:2])
    # Padding attends to padding: with nothing to attend to a row would be no number.
    padded = -(-n // LANES) * LANES
    pad = ((0, 0), (0, padded - n))
    ids = jnp.pad(valid, pad).astype(jnp.int32)
    q, k, v = (jnp.pad(x, (*pad, (0, 0), (0, 0))).swapaxes(1, 2) for x in (q, k, v))
    # Heads are split over the tensor axis only where both counts allow it.
    unsplit = q.shape[1] % mesh.shape["tensor"] or k.shape[1] % mesh.shape["tensor"]
    heads = PartitionSpec(ROWS, None if unsplit else "tensor")
    kernel = functools.partial(_splash, isinstance(mask, Rule) and mask.causal, interpret)
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
