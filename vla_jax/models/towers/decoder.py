"""Text decoder: one tower for every backbone, shaped by a `DecoderSpec`.

Legend: b batch · n tokens of this call · s slots, the tokens that can be attended to (n, or a
cache's) · d width · h query heads · g key heads · k head width · l layers · v vocabulary
"""

import functools
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vla_jax.models import sharding
from vla_jax.models.towers import positions as tables
from vla_jax.models.towers.block import Block, Stack, at, remat
from vla_jax.models.towers.decoder_layers import Group, Shared, grouped, scanned, ungrouped
from vla_jax.models.towers.decoder_spec import DecoderSpec, Insert
from vla_jax.models.towers.fused import Mask, Rule
from vla_jax.models.towers.layers import NORMS, Dropout
from vla_jax.models.towers.order import lookup


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens seen so far; a row's tokens fill its slots from the left.

    Attributes:
        keys, values: [l, b, s, g, k].
        valid: bool [b, s]; False on empty slots and padding.
        length: int32 [b], slots taken. The next token goes there, so what pads a row on the right
            is overwritten and leaves no gap. Tokens past the last slot are lost: make it large
            enough.
    """

    keys: Any
    values: Any
    valid: Any
    length: Any


def empty_cache(spec: DecoderSpec, batch: int, slots: int, dtype: Any = jnp.float32) -> Cache:
    """A cache before the first token."""
    heads = spec.block.kv_heads or spec.block.heads
    return zeros((spec.layers, batch, slots, heads, spec.head_width), dtype)


def zeros(shape: tuple[int, int, int, int, int], dtype: Any) -> Cache:
    """An empty cache for keys of this shape; see `Cache`."""
    return Cache(
        keys=jnp.zeros(shape, dtype),
        values=jnp.zeros(shape, dtype),
        valid=jnp.zeros(shape[1:3], bool),
        length=jnp.zeros(shape[1:2], jnp.int32),
    )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Result:
    """What a run of the decoder gives.

    Attributes:
        hidden: [b, n, d], or [b, c, d] of c columns; what `Decoder.logits` takes.
        states: [l, b, n, d], the input of every layer, if asked for.
        cache: with these tokens in it, if one was given.
    """

    hidden: Any
    states: Any = None
    cache: Any = None


def causal_mask(valid: Bool[Array, "b n"]) -> Bool[Array, "b n n"]:
    """Each token sees the valid ones at or before it."""
    n = valid.shape[1]
    return jnp.tril(jnp.ones((n, n), bool)) & valid[:, None, :]


def bidirectional_mask(valid: Bool[Array, "b n"]) -> Bool[Array, "b n n"]:
    """Each token sees all valid ones."""
    return jnp.broadcast_to(valid[:, None, :], (*valid.shape, valid.shape[1]))


def runs(marked: Bool[Array, "b n"]) -> Int[Array, "b n"]:
    """The number, from 1, of the unbroken run that each marked token is in; 0 for others."""
    begins = marked & ~jnp.pad(marked, ((0, 0), (1, 0)))[:, :-1]
    return jnp.where(marked, jnp.cumsum(begins, axis=1, dtype=jnp.int32), 0)


class Decoder(nn.Module):
    """Pre-norm decoder.

    Attributes:
        spec: the structural facts.
        remat: see `block.remat`.
        dtype: of the activations.
        insert: extra modules between the layers. Parameters of the layers then lie in
            `layers/blocks_i`, of the inserts in `layers/extra`, stacked over the groups.
    """

    spec: DecoderSpec
    remat: str = "full"
    dtype: Any = jnp.float32
    insert: Insert | None = None

    def setup(self):
        s = self.spec
        table = nn.initializers.normal(s.width**-0.5)  # unit hidden states give logits of unit size
        self.embedding = self.param("embedding", table, (s.vocab, s.width))
        if s.positions == "learned":
            shape = (s.max_positions, s.width)
            self.positions = self.param("positions", nn.initializers.normal(0.02), shape)
        if self.insert is None:
            self.layers = Block(s.block, self.dtype)
        elif s.layers % self.insert.every:
            raise ValueError(f"insert: every {self.insert.every} does not divide {s.layers} layers")
        else:
            self.layers = Group(s.block, self.insert, self.dtype)
        self.norm = NORMS[s.block.norm](s.block.eps, self.dtype)
        if not s.tied:
            self.unembedding = self.param("unembedding", table, (s.vocab, s.width))
        if s.head_bias:
            self.head_bias = self.param("head_bias", nn.initializers.zeros, (s.vocab,))
        self.drops = [Dropout(rate) for rate in s.embed_dropout]

    def embed(self, ids: Int[Array, "b n"]) -> Float[Array, "b n d"]:
        """Plain lookup; scaling happens in `run`, for images and actions alike."""
        return lookup(self.embedding, ids).astype(self.dtype)

    def __call__(
        self,
        embeds: Float[Array, "b n d"],
        valid: Bool[Array, "b n"],
        positions: Int[Array, "*p n"] | None = None,
        mask: Bool[Array, "#b n n"] | None = None,
        context: Any = None,
    ) -> Float[Array, "b n d"]:
        """Embeddings -> hidden states; see `run`."""
        return self.run(embeds, valid, positions, mask, context).hidden

    def run(
        self,
        embeds: Float[Array, "b n d"],
        valid: Bool[Array, "b n"],
        positions: Int[Array, "*p n"] | None = None,
        mask: Bool[Array, "#b n s"] | None = None,
        context: Any = None,
        deep: Float[Array, "j b n d"] | None = None,
        rope: tuple[Array, Array] | None = None,
        gain: Float[Array, "#b n"] | None = None,
        cache: Cache | None = None,
        collect: bool = False,
        skip_last: bool = False,
        prefix: Bool[Array, "b n"] | None = None,
        export: bool = False,
        shift: int = 0,
        columns: Int[Array, "b c"] | None = None,
    ) -> Result:
        """Embeddings -> hidden states, and on request a cache or the states between the layers.

        Args:
            embeds: text, image and action embeddings in sequence order.
            valid: False on padding.
            positions: rows of the position table, or rotary positions: [b, n] or [1, n]; for
                M-RoPE [sections, b, n]. By default see `DecoderSpec`.
            mask: True where a token may attend; complete, padding included. By default causal.
                Local layers narrow it further.
            context: handed to the inserts.
            deep: added to the outputs of the first j layers (Qwen3-VL's visual features).
            rope: cosines and sines [b, n, r] in place of those of `DecoderSpec.rope` (a backbone
                whose frequencies depend on the length).
            gain: factor on every token's queries, the same in all layers.
            cache: tokens already seen; these are added.
            collect: also return the input of every layer.
            skip_last: return the input of the last layer as it is, without the final norm.
            prefix: an unbroken run of tokens marked here sees all of itself, also those behind and
                those a local layer would not reach (prefix-LM); without `mask` only.
            export: without a cache, return one of just these tokens, for another tower to read.
            shift: added to the positions that are not given.
            columns: whose hidden states are wanted; None = all. Of the last layer only these are
                computed.
        """
        s = self.spec
        batch, n = valid.shape
        rows, slots, slot_valid = jnp.arange(batch)[:, None], jnp.arange(n)[None], valid
        if cache is not None:
            slots = cache.length[:, None] + slots
            slot_valid = cache.valid.at[rows, slots].set(valid)
        behind = slots[..., None] - jnp.arange(slot_valid.shape[1])
        reached, near = behind >= 0, None if s.window is None else behind < s.window
        if prefix is not None:
            number = runs(prefix)
            slot_runs = jnp.zeros(slot_valid.shape, jnp.int32).at[rows, slots].set(number)
            together = prefix[..., None] & (number[..., None] == slot_runs[:, None])
            reached, near = reached | together, None if near is None else near | together
        if positions is None:
            positions = self._default_positions(slot_valid, valid, slots) + shift
        if rope is None and s.rope is not None:
            rope = s.rope(positions)
        bias = None
        if s.alibi is not None:
            slopes = jnp.array(tables.alibi_slopes(s.block.heads, s.alibi))
            bias = -slopes[:, None, None] * behind[:, None]  # 0 at the token itself
        rule: Mask = mask
        if mask is None:
            # Fused kernels that take no dense mask can still run by a rule.
            usual = cache is None and prefix is None and near is None
            rule = Rule(valid) if usual else reached & slot_valid[:, None]
        shared = Shared(
            mask=rule,
            near=near,
            rope=rope,
            bias=bias,
            gain=gain,
            deep=deep,
            context=context,
            slots=(rows, slots),
            collect=collect,
            export=export,
        )
        per_layer: dict[str, Any] = {}
        if s.window is not None:
            per_layer["local"] = jnp.array(s.local)
        if deep is not None:
            per_layer["number"] = jnp.arange(s.layers)
        if skip_last:
            per_layer["skip"] = jnp.arange(s.layers) == s.layers - 1
        if cache is not None:
            per_layer |= {"keys": cache.keys, "values": cache.values}
        run = functools.partial(layer if self.insert is None else layers_of_group, shared=shared)
        # Recomputed like the layers: what dropout keeps takes as much as half the tokens.
        enter = Decoder._enter
        enter = remat(enter, self.remat, in_scan=False) if s.embed_dropout else enter
        x, per_layer = enter(self, embeds, positions), grouped(per_layer, self.insert)
        # Few tokens pay for a last layer apart; and only a scan over all makes parameters.
        are_few = columns is not None and 2 * columns.shape[1] <= n
        if columns is None or not are_few or self.is_initializing():
            length = s.layers // (1 if self.insert is None else self.insert.every)
            x, out = scanned(run, length, self.remat)(self.layers, x, per_layer)
            x = x if columns is None else at(x, columns)
        else:
            # In the last layer the other tokens are attended to and no more: its queries,
            # feed-forward and norms are of the tokens that are read.
            stack, own = Stack.of(self.layers), {"per_layer": per_layer}
            module, items = self.layers.clone(parent=None), stack.items(slice(-1), own)
            loops = sharding.unroll(len(items[0])) or 1  # of no layers where there is but one
            turn = stack.turn(nn.apply(run, module), self.remat)
            carry, out = jax.lax.scan(turn, (x, stack.sink), items, unroll=loops)
            # Not recomputed for its gradients, which come next.
            turn = stack.turn(nn.apply(functools.partial(run, columns=columns), module), "none")
            (x, _), last = turn(carry, stack.items(-1, own))
            out = jax.tree.map(lambda some, one: jnp.concatenate([some, one[None]]), out, last)
        out = ungrouped(out, self.insert)
        if cache is not None:
            # Padding on the right takes no slots, so that the next token overwrites it.
            end = jnp.max(jnp.where(valid, jnp.arange(n) + 1, 0), axis=1)
            cache = Cache(out["keys"], out["values"], slot_valid, cache.length + end)
        elif export:
            cache = Cache(out["keys"], out["values"], valid, valid.sum(1, dtype=jnp.int32))
        normed = self.norm(x)  # in any case, or parameters that are made would lack it
        raw = s.norm_in_head or skip_last
        return Result(x if raw else normed, out.get("state"), cache)

    def logits(
        self, hidden: Float[Array, "b n d"], ids: tuple[int, int] | None = None
    ) -> Float[Array, "b n v"]:
        """Hidden states -> scores over the vocabulary, or of the ids from one up to another."""
        s, rows = self.spec, slice(*ids) if ids else slice(None)
        if s.norm_in_head:
            hidden = self.norm(hidden)
        table = self.embedding if s.tied else self.unembedding
        scores = jnp.einsum("bnd,vd->bnv", hidden, table[rows].astype(self.dtype))
        if s.head_bias:
            scores = scores + self.head_bias[rows].astype(self.dtype)
        return scores if s.logit_cap is None else s.logit_cap * jnp.tanh(scores / s.logit_cap)

    def _default_positions(
        self, slot_valid: Bool[Array, "b s"], valid: Bool[Array, "b n"], columns: Int[Array, "#b n"]
    ) -> Int[Array, "#b n"]:
        if self.spec.count_padding:
            return columns + self.spec.first_position
        # Positions count the valid tokens, so that padding in a row moves nothing.
        count = jnp.cumsum(slot_valid, axis=1, dtype=jnp.int32)
        count = jnp.take_along_axis(count, jnp.broadcast_to(columns, valid.shape), axis=1)
        return jnp.where(valid, count, 0) - 1 + self.spec.first_position

    def _enter(
        self, embeds: Float[Array, "b n d"], positions: Int[Array, "*p n"]
    ) -> Float[Array, "b n d"]:
        s = self.spec
        x = embeds.astype(self.dtype)
        if s.round_scale:
            # Gemma rounds the factor itself to the type of the activations.
            x = x * jnp.asarray(s.embed_scale, self.dtype)
        elif s.embed_scale != 1.0:
            x = (x.astype(jnp.float32) * s.embed_scale).astype(self.dtype)
        if s.positions == "sinusoid":
            x = x + tables.sinusoid(positions, s.width, s.first_position - 1).astype(self.dtype)
        elif s.positions == "learned":
            x = x + jnp.take(self.positions, positions, axis=0).astype(self.dtype)
        for drop in self.drops:
            x = drop(x)
        return sharding.rows(x)


def layer(
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
        shared: what does not differ, of all tokens.
        insert: runs before the layer.
        columns: the tokens that go on, see `Block`.

    Returns:
        x and what is stacked over the layers: the new "keys" and "values", the "state" before.
    """
    before = x
    if columns is not None:
        before, shared = at(x, columns), shared.at(columns)
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


def layers_of_group(
    group: Group,
    x: Array,
    per_layer: dict[str, Any],
    shared: Shared,
    columns: Array | None = None,
) -> tuple[Array, dict[str, Any]]:
    """`layer` for every layer of a group; with `columns` only these go on from the last."""
    outs = []
    for i, block in enumerate(group.blocks):
        each = jax.tree.map(lambda leaf, i=i: leaf[i], per_layer)
        if i < len(group.blocks) - 1:
            x, out = layer(block, x, each, shared)
        else:
            x, out = layer(block, x, each, shared, group.extra, columns)
        outs.append(out)
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outs)
