"""The layers of `towers.decoder.Decoder`: one by itself, and all of them in a scan.

Legend: b batch · n tokens of this call · s slots, the tokens that can be attended to (n, or a
cache's) · c read of these n · d width · l layers
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vla_jax.models import sharding
from vla_jax.models.towers import stacked
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
        if isinstance(mask, Rule):
            reached = jnp.arange(mask.valid.shape[1]) <= columns[..., None]
            mask = mask.valid[:, None] & (reached if mask.causal else True)
        else:
            mask = None if mask is None else at(mask, columns)
        bias = self.bias
        if bias is not None:
            bias = at(bias.swapaxes(1, 2), columns).swapaxes(1, 2)  # heads come before tokens
        near, gain = (x if x is None else at(x, columns) for x in (self.near, self.gain))
        deep = None if self.deep is None else jax.vmap(at, (0, None))(self.deep, columns)
        return self._replace(mask=mask, bias=bias, near=near, gain=gain, deep=deep)


def _layer(
    block: Block,
    x: Array,
    per_layer: dict[str, Any],
    shared: Shared,
    insert: nn.Module | None = None,
    columns: Array | None = None,
) -> tuple[Array, dict[str, Any]]:
    """One layer.

    Args:
        block: its module.
        x: [b, n, d].
        per_layer: what differs between layers, as far as there is any: "local", "number", "skip",
            and "keys" and "values" of the cache.
        shared: what does not differ.
        insert: runs before the layer.
        columns: see `Block`; `shared` is then of these.

    Returns:
        x and what is stacked over the layers: the new "keys" and "values", the "state" before.
    """
    before = x if columns is None else at(x, columns)
    # The state is taken before the insert, which counts as part of the layer.
    out = {"state": x} if shared.collect else {}

    def memory(k: Array, v: Array) -> tuple[Array, Array]:
        for name, new in (("keys", k), ("values", v)):
            out[name] = per_layer[name].at[shared.slots].set(new) if name in per_layer else new
        return out["keys"], out["values"]

    if insert is not None:
        x = insert(x, shared.context)
    mask = shared.mask
    if shared.near is not None:
        mask = mask & (shared.near | ~per_layer["local"])
    cached = memory if "keys" in per_layer or shared.export else None
    x, _ = block(x, mask, shared.rope, shared.bias, cached, shared.gain, columns=columns)
    if shared.deep is not None:
        last = shared.deep.shape[0] - 1  # later layers look here too, and add 0
        deep = shared.deep[jnp.minimum(per_layer["number"], last)].astype(x.dtype)
        x = x + jnp.where(per_layer["number"] <= last, deep, 0)
    if "skip" in per_layer:
        x = jnp.where(per_layer["skip"], before, x)  # the scan runs every layer
    return x, out


def _group(
    group: Group,
    x: Array,
    per_layer: dict[str, Any],
    shared: Shared,
    columns: Array | None = None,
) -> tuple[Array, dict[str, Any]]:
    """`_layer` for every layer of a group; with `columns` only these go on from the last."""
    outs = []
    for i, block in enumerate(group.blocks):
        each = jax.tree.map(lambda leaf, i=i: leaf[i], per_layer)
        if i < len(group.blocks) - 1:
            x, out = _layer(block, x, each, shared)
        else:
            last = shared if columns is None else shared.at(columns)
            x, out = _layer(block, x, each, last, group.extra, columns)
        outs.append(out)
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outs)


def grouped(per_layer: Any, insert: Insert | None) -> Any:
    """[l, ...] -> [groups, layers of a group, ...] where the layers are scanned in groups."""
    if insert is None:
        return per_layer
    return jax.tree.map(lambda x: x.reshape(-1, insert.every, *x.shape[1:]), per_layer)


def ungrouped(out: Any, insert: Insert | None) -> Any:
    """Inverse of `grouped`."""
    return out if insert is None else jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), out)


def scanned(shared: Shared, layers: int, insert: Insert | None, kind: str) -> Any:
    """All layers as one function of (module, x, what differs between the layers).

    Args:
        shared: what does not differ.
        layers: depth.
        insert: of the decoder.
        kind: see `block.remat`.
    """
    step, group_size = (_layer, 1) if insert is None else (_group, insert.every)
    length = layers // group_size
    return nn.scan(
        remat(functools.partial(step, shared=shared), kind),
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        length=length,
        unroll=sharding.unroll(length),
    )


def to_columns(
    module: Block | Group,
    x: Float[Array, "b n d"],
    per_layer: dict[str, Any],
    shared: Shared,
    columns: Int[Array, "b c"],
    kind: str,
) -> tuple[Float[Array, "b c d"], dict[str, Any]]:
    """All layers, of which the last one gives some tokens alone.

    The others are attended to in the last layer and no more: its queries, feed-forward and norms
    are of the tokens that are read. It is not recomputed for its gradients, which come next.

    Args:
        module: of a layer or a group, with the parameters of all.
        x: tokens.
        per_layer: see `_layer`; what has its layers in groups too.
        shared: of all tokens.
        columns: that are read.
        kind: see `block.remat`.
    """
    is_group = isinstance(module, Group)
    params = module.variables["params"]
    count = len(jax.tree.leaves(params)[0])
    # A module applied on its own sees none of its parent's keys.
    apart, keys = module.clone(parent=None), {}
    if module.has_rng("dropout"):
        keys = {"dropout": jax.random.split(module.make_rng("dropout"), count)}

    def step(params: Any, x: Array, own: Any, columns: Array | None = None) -> tuple[Array, Any]:
        per_layer, keys = own

        def one(module: Any) -> tuple[Array, Any]:
            if is_group:
                return _group(module, x, per_layer, shared, columns)
            last = shared if columns is None else shared.at(columns)
            return _layer(module, x, per_layer, last, columns=columns)

        return nn.apply(one, apart)({"params": params}, rngs=keys)

    own = per_layer, keys
    stack = stacked.Stack.of(params, module.dtype)
    x, stack, out = stacked.run(step, stack, x, own, (0, count - 1), kind)
    x, last = stacked.run_last(functools.partial(step, columns=columns), stack, x, own)
    return x, jax.tree.map(lambda some, one: jnp.concatenate([some, one[None]]), out, last)
