"""What the layers of `towers.decoder.Decoder` get, the groups they may form, and all in a scan.

Legend: b batch · c tokens that are read · l layers
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from vla_jax.models import sharding
from vla_jax.models.towers.block import Block, BlockSpec, at, remat
from vla_jax.models.towers.decoder_spec import Insert
from vla_jax.models.towers.fused import Mask, Rule


class Group(nn.Module):
    """The layers from one insert to the next; the insert stands before the last of them."""

    spec: BlockSpec
    insert: Insert
    dtype: Any = jnp.float32

    def setup(self):
        self.blocks = [Block(self.spec, self.dtype) for _ in range(self.insert.every)]
        self.extra = self.insert.make()


class Shared(NamedTuple):
    """What all layers get; for the fields see `Decoder.run`."""

    mask: Mask
    near: Array | None  # narrows the mask of local layers
    rope: tuple[Array, Array] | None
    bias: Array | None
    gain: Array | None
    deep: Array | None
    context: Any
    slots: tuple[Array, Array]  # (row, column) of these tokens in a cache
    collect: bool
    export: bool

    def at(self, columns: Int[Array, "b c"]) -> "Shared":
        """The same for a layer of which only these tokens go on."""
        mask = self.mask
        # Kernels that work by a rule want whole sequences; for some of its tokens it is written
        # out.
        if isinstance(mask, Rule):
            reached = jnp.arange(mask.valid.shape[1]) <= columns[..., None]
            mask = mask.valid[:, None] & (reached if mask.causal else True)
        else:
            mask = None if mask is None else at(mask, columns)
        bias = self.bias
        if bias is not None:
            bias = at(bias.swapaxes(1, 2), columns).swapaxes(1, 2)  # heads come before tokens
        near, gain = (x if x is None else at(x, columns) for x in (self.near, self.gain))
        # Deep features have an axis of layers in front of the rows.
        deep = None if self.deep is None else jax.vmap(at, (0, None))(self.deep, columns)
        return self._replace(mask=mask, bias=bias, near=near, gain=gain, deep=deep)


def grouped(per_layer: Any, insert: Insert | None) -> Any:
    """[l, ...] -> [groups, layers of a group, ...] where the layers are scanned in groups."""
    if insert is None:
        return per_layer
    return jax.tree.map(lambda x: x.reshape(-1, insert.every, *x.shape[1:]), per_layer)


def ungrouped(out: Any, insert: Insert | None) -> Any:
    """Inverse of `grouped`."""
    return out if insert is None else jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), out)


def scanned(layer: Callable, length: int, kind: str) -> Any:
    """All layers as one function of (module, x, what differs between the layers).

    Args:
        layer: the same of one, or of a group.
        length: how many of them there are.
        kind: see `block.remat`.
    """
    return nn.scan(
        remat(layer, kind),
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        length=length,
        unroll=sharding.unroll(length),
    )
