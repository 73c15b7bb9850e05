"""A second stack of layers beside a language model, which reads that model's keys and values.

In a layer the expert's tokens attend to one another and to the language model's tokens of the same
layer (pi0); or to these alone, whose rotated keys and values it projects anew (every other layer of
SmolVLA). The language model never sees the expert, so that it runs once, and first, whatever the
expert is asked afterwards: all training targets and all denoising steps read the same cache.

Sources: openpi 15a9616 `models/gemma.py`, lerobot 7427f31 `smolvlm_with_expert.py`.

Legend: b batch · n expert tokens · p tokens of the language model · d width · c condition
g key heads · k head width · l layers of the expert
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vla_jax.models import sharding
from vla_jax.models.towers.adaptive import AdaptiveRMSNorm, Modulation
from vla_jax.models.towers.block import Block, BlockSpec, remat
from vla_jax.models.towers.decoder import Cache
from vla_jax.models.towers.decoder_spec import DecoderSpec
from vla_jax.models.towers.layers import NORMS, Dense, Rope


@dataclass(frozen=True)
class ExpertSpec:
    """The structural facts of an expert.

    Attributes:
        width: of its residual stream.
        layers: depth.
        block: what a layer is made of; heads as the language model's.
        rope: rotary positions, the language model's.
        every: of the language model's layers, each that many has a layer of the expert.
        joint_every: of the language model's layers, each that many is attended to jointly with the
            expert's own tokens, the others alone; 1 = all jointly.
    """

    width: int
    layers: int
    block: BlockSpec
    rope: Rope
    every: int = 1
    joint_every: int = 1

    @property
    def crosses(self) -> tuple[bool, ...]:
        """The repeating pattern of layers: True where one attends to the language model alone.

        Where the depth is no multiple of the pattern, it is written out for all layers.
        """
        # After this many expert layers the pattern repeats, so that a scan can run over whole
        # periods.
        period = self.joint_every // math.gcd(self.every, self.joint_every)
        period = self.layers if self.layers % period else period
        return tuple(j * self.every % self.joint_every != 0 for j in range(period))


def expert_spec(
    text: DecoderSpec,
    width: int,
    hidden: int,
    adaptive: bool = False,
    layers: int = 0,
    joint_every: int = 1,
) -> ExpertSpec:
    """An expert for a language model: its heads and its kind of layer, another width.

    Args:
        text: of the language model.
        width: of the expert.
        hidden: width of its MLP.
        adaptive: its norms follow a condition.
        layers: depth; 0 = as deep as the language model.
        joint_every: see `ExpertSpec`.

    Raises:
        ValueError: the language model has no plain rotary positions or local layers, or is not a
            multiple as deep.
    """
    layers, problems = layers or text.layers, []
    if text.rope is None or text.rope.sections or text.alibi or text.positions != "none":
        problems.append("the language model must have plain rotary positions")
    if text.window is not None:
        problems.append("the language model must have no local layers")
    if text.layers % layers:
        problems.append(f"{layers} layers do not divide the language model's {text.layers}")
    if problems:
        raise ValueError("expert: " + "; ".join(problems))
    # Keys and values of both are joined in one attention, so the heads must be the same.
    block = replace(
        text.block,
        hidden=hidden,
        head_width=text.head_width,
        adaptive=adaptive,
        norm=text.block.norm,
    )
    assert text.rope is not None
    return ExpertSpec(width, layers, block, text.rope, text.layers // layers, joint_every)


class Modulations(NamedTuple):
    """What all adaptive norms of an expert make of a condition.

    Attributes:
        layers: of the two norms of every kind of block, by its name; values [l, b, 3 d].
        last: of the last norm.
    """

    layers: Mapping[str, tuple[Modulation, Modulation]]
    last: Modulation


class _Layers(nn.Module):
    """The layers of one step of the scan."""

    spec: ExpertSpec
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n d"],
        memory: tuple[Array, Array],
        valid: Bool[Array, "b p"],
        mask: Bool[Array, "b n n"],
        ropes: tuple[Any, Any],
        level: Float[Array, "b c"] | None,
        made: Mapping[str, tuple[Modulation, Modulation]] | None,
    ) -> tuple[Float[Array, "b n d"], None]:
        """In the (carry, output) form of `nn.scan`; `memory` and `made` are of these layers."""
        n, s = x.shape[1], self.spec
        # The expert comes last, so it may see all valid tokens of the language model.
        visible = jnp.broadcast_to(valid[:, None], (*valid.shape[:1], n, valid.shape[1]))
        crosses = s.crosses
        for i, cross in enumerate(crosses):
            keys, values = (part[i] for part in memory)

            # Defaults bind the arrays of this layer, as closures in a loop share their variables.
            def joined(k: Array, v: Array, keys: Any = keys, values: Any = values) -> Any:
                return jnp.concatenate([keys, k], axis=1), jnp.concatenate([values, v], axis=1)

            name = "block" if len(crosses) == 1 else f"block{i}"
            block = Block(s.block, self.dtype, name=name)
            levels = level if made is None else made[name]
            if cross:
                # SmolVLA projects the language model's keys and values anew, with its heads joined.
                flat = [part.reshape(*part.shape[:2], -1) for part in (keys, values)]
                source = flat[0], flat[1]
                x, _ = block(x, visible, ropes[1], level=levels, source=source)
            else:
                both = jnp.concatenate([visible, mask], axis=-1)
                x, _ = block(x, both, ropes[0], memory=joined, level=levels)
        return x, None


class Expert(nn.Module):
    """The stack; parameters lie in `layers/block`, or one `layers/block<i>` each where kinds vary.

    Attributes:
        spec: the structural facts.
        remat: see `block.remat`.
        dtype: of the activations.
    """

    spec: ExpertSpec
    remat: str = "full"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n d"],
        cache: Cache,
        mask: Bool[Array, "#b n n"],
        positions: Int[Array, "b n"],
        level: Float[Array, "b c"] | Modulations | None = None,
    ) -> Float[Array, "b n d"]:
        """Tokens -> hidden states after the final norm.

        Args:
            x: the expert's tokens.
            cache: of the language model, whose tokens are all that is in it.
            mask: which of the expert's tokens see which.
            positions: of the expert's tokens, behind the language model's.
            level: the condition of adaptive norms, or what `modulations` made of it.
        """
        s, period = self.spec, len(self.spec.crosses)
        # The layers of the cache that have an expert layer, one period for each step of the scan.
        memory = jax.tree.map(
            lambda leaf: leaf[:: s.every].reshape(-1, period, *leaf.shape[1:]),
            (cache.keys, cache.values),
        )
        # In layers that attend to the language model alone, SmolVLA counts queries from 0.
        restarted = positions - positions.min(axis=1, keepdims=True)
        ropes = s.rope(positions), s.rope(restarted)
        # It is joined to a mask that differs from row to row.
        mask = jnp.broadcast_to(mask, (x.shape[0], *mask.shape[1:]))
        scanned = nn.scan(
            remat(_Layers, self.remat),
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast, 0),  # type: ignore[arg-type]
            length=s.layers // period,
            unroll=sharding.unroll(s.layers // period),
        )
        level, made, last = (
            (None, level.layers, level.last)
            if isinstance(level, Modulations)
            else (level, None, level)
        )
        layers = scanned(s, self.dtype, name="layers")
        x, _ = layers(x, memory, cache.valid, mask, ropes, level, made)
        if s.block.adaptive:
            assert last is not None
            return AdaptiveRMSNorm(s.block.eps, self.dtype, name="norm")(x, last)[0]
        return NORMS[s.block.norm](s.block.eps, self.dtype, name="norm")(x)

    def modulations(self, levels: Float[Array, "s c"]) -> Modulations:
        """What the adaptive norms make of several conditions that all rows share.

        A quarter of pi0.5's expert are these maps. In a loop over times they would be read anew at
        each.

        Returns:
            of every condition, on a first axis of its own.
        """
        params = self.variables["params"]

        def made(kernel: Any) -> Array:
            # Without a parent, as the parameters are there and no new ones are to be made.
            dense = Dense((kernel["kernel"].shape[-1],), dtype=self.dtype, parent=None)
            return dense.apply({"params": kernel}, levels)  # type: ignore[return-value]

        def of_layers(norm: Any) -> Modulation:
            return Modulation(jax.vmap(made, out_axes=1)(norm["modulation"])[:, :, None])

        blocks = params["layers"]
        return Modulations(
            {k: (of_layers(b["norm1"]), of_layers(b["norm2"])) for k, b in blocks.items()},
            Modulation(made(params["norm"]["modulation"])[:, None]),
        )


def positions_after(valid: Bool[Array, "b p"], n: int) -> Int[Array, "b n"]:
    """Positions of n tokens behind the valid ones, which alone count."""
    return valid.sum(axis=1, keepdims=True, dtype=jnp.int32) + jnp.arange(n)


def blocks_mask(starts: Bool[Array, "n"]) -> Bool[Array, "1 n n"]:
    """Tokens see those of their own block and of all before.

    Args:
        starts: True where a token begins a new block.
    """
    number = jnp.cumsum(starts.astype(jnp.int32))
    return (number[None] <= number[:, None])[None]
