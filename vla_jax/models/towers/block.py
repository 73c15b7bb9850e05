"""The transformer layer every tower is stacked from.

Legend: b batch · m tokens · n of these that go on, mostly all · s key tokens · d width
h query heads · g key heads · k head width · l layers
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from vla_jax.models import sharding
from vla_jax.models.towers.adaptive import AdaptiveRMSNorm, Modulation
from vla_jax.models.towers.fused import Mask
from vla_jax.models.towers.layers import (
    ACTIVATIONS,
    MLP,
    NORMS,
    Attention,
    Dense,
    Dropout,
)

REMAT_POLICIES = {
    # Without a policy only the input of a layer is saved.
    "full": None,
    # Products with weights are saved, those of attention are not.
    "dots": jax.checkpoint_policies.save_only_these_names(sharding.PRODUCT),
}

RESIDUALS = ("sequential", "parallel", "parallel_shared")


@dataclass(frozen=True)
class BlockSpec:
    """What one transformer layer is made of; see `Attention` and `MLP` for the details.

    Attributes:
        hidden: width of the MLP.
        norm: kind of norm before attention and MLP, a key of NORMS.
        eps: of all norms.
        layer_scale: outputs of attention and MLP are multiplied by learned vectors (CaiT).
        post_norm: a norm after attention and after the MLP too, before the sum (Gemma-2).
        residual: "sequential": x + attn(norm1(x)), then x + mlp(norm2(x)); "parallel":
            x + attn(norm1(x)) + mlp(norm2(x)) (GPT-NeoX); "parallel_shared": norm1 for both (Phi).
        dropout: on the outputs of attention and MLP.
        adaptive: norms and gates follow a condition (`AdaptiveRMSNorm`); sequential only.
        film: between attention and MLP the tokens are scaled by 1 + a linear map of a condition and
            shifted by another (FiLM, Perez et al. 2018, as in OpenVLA-OFT); sequential only.
    """

    heads: int
    hidden: int
    activation: str
    kv_heads: int | None = None
    head_width: int | None = None
    norm: str = "layer"
    eps: float = 1e-5
    qkv_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    gated: bool = False
    sub_norm: bool = False
    qk_norm: str | None = None
    qk_norm_over: str = "head"
    layer_scale: bool = False
    post_norm: bool = False
    residual: str = "sequential"
    scale: float | None = None
    clip: float | None = None
    soft_cap: float | None = None
    dropout: float = 0.0
    attention_dropout: float = 0.0
    adaptive: bool = False
    film: bool = False

    def __post_init__(self):
        legal = {
            "activation": (self.activation, tuple(ACTIVATIONS)),
            "norm": (self.norm, tuple(NORMS)),
            "qk_norm": (self.qk_norm, (None, *NORMS)),
            "qk_norm_over": (self.qk_norm_over, ("head", "all")),
            "residual": (self.residual, RESIDUALS),
        }
        problems = [f"{k}: {v!r} is none of {list(s)}" for k, (v, s) in legal.items() if v not in s]
        if self.post_norm and self.residual != "sequential":
            problems.append("post_norm: only for sequential residuals")
        if self.adaptive and (self.residual != "sequential" or self.post_norm):
            problems.append("adaptive: only for sequential residuals without post_norm")
        if self.film and (self.residual != "sequential" or self.adaptive):
            problems.append("film: only for sequential residuals without adaptive norms")
        if self.heads % (self.kv_heads or self.heads):
            problems.append(f"kv_heads: {self.kv_heads} does not divide {self.heads} heads")
        if problems:
            raise ValueError("transformer layer:\n  " + "\n  ".join(problems))


class Block(nn.Module):
    """Pre-norm transformer layer."""

    spec: BlockSpec
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b m d"],
        mask: Mask = None,
        rope: tuple[Array, Array] | None = None,
        bias: Float[Array, "#b #h #n s"] | None = None,
        memory: Callable[[Array, Array], tuple[Array, Array]] | None = None,
        gain: Float[Array, "#b n"] | None = None,
        level: Float[Array, "b c"] | tuple[Modulation, Modulation] | None = None,
        source: tuple[Array, Array] | None = None,
        columns: Int[Array, "b n"] | None = None,
    ) -> tuple[Float[Array, "b n d"], None]:
        """One layer, in the (carry, output) form that `nn.scan` wants; see `Attention`.

        Args:
            x: tokens.
            mask: see `Attention`, as are `rope`, `bias`, `memory` and `gain`.
            rope: for queries and, without a `source`, keys.
            bias: on the scores.
            memory: how a cache enters.
            gain: on the queries.
            level: the condition of adaptive norms or of FiLM; or what both norms made of it.
            source: what keys and values are made of, [b, m, c] each, in place of the tokens.
            columns: the tokens that go on; the others are attended to and no more. `mask`, `bias`
                and `gain` are of these, `rope` of all. Not with adaptive norms.
        """
        s = self.spec
        if s.adaptive:
            if level is None:
                raise ValueError("adaptive norms need the condition that they follow, `level`")
            levels = level if isinstance(level, tuple) else (level, level)
            # pi0.5's expert needs neither bias nor dropout nor another source.
            return self._adaptive(x, mask, rope, memory, levels), None
        norm = functools.partial(NORMS[s.norm], s.eps, self.dtype)
        attention, mlp = self._parts()
        x = sharding.rows(x)
        y = norm(name="norm1")(x)
        keys, values = (y, None) if source is None else source
        turned = rope
        # Only behind the norm, as the keys and values of all tokens are made from it.
        if columns is not None:
            x, y = at(x, columns), at(y, columns)
            turned = None if rope is None else (at(rope[0], columns), at(rope[1], columns))
        attended = attention(y, keys, mask, rope, bias, memory, gain, values, turned)
        if s.post_norm:
            attended = norm(name="post1")(attended)
        attended = self._scale(attended, "scale1")
        attended = Dropout(s.dropout)(attended)
        if s.residual == "sequential":
            x = x + attended
            if s.film:
                x = self._film(x, level)
            y = mlp(norm(name="norm2")(x))
            if s.post_norm:
                y = norm(name="post2")(y)
            return sharding.rows(x + Dropout(s.dropout)(self._scale(y, "scale2"))), None
        # Parallel layers feed the MLP from the input, not from the attention's result; Phi's share
        # the norm.
        if s.residual == "parallel":
            y = norm(name="norm2")(x)
        x = x + attended
        return sharding.rows(x + Dropout(s.dropout)(self._scale(mlp(y), "scale2"))), None

    def _parts(self) -> tuple[Attention, MLP]:
        s = self.spec
        attention = Attention(
            s.heads,
            s.sub_norm,
            s.attention_dropout,
            s.eps,
            self.dtype,
            kv_heads=s.kv_heads,
            head_width=s.head_width,
            qkv_bias=s.qkv_bias,
            out_bias=s.out_bias,
            qk_norm=s.qk_norm,
            qk_norm_over=s.qk_norm_over,
            scale=s.scale,
            clip=s.clip,
            soft_cap=s.soft_cap,
            name="attn",
        )
        mlp = MLP(
            s.hidden, s.activation, s.sub_norm, s.eps, self.dtype, s.gated, s.mlp_bias, name="mlp"
        )
        return attention, mlp

    def _adaptive(
        self,
        x: Float[Array, "b n d"],
        mask: Mask,
        rope: tuple[Array, Array] | None,
        memory: Callable[[Array, Array], tuple[Array, Array]] | None,
        levels: tuple[Any, Any],
    ) -> Float[Array, "b n d"]:
        """The layer with norms that follow one of `levels` each (pi0.5)."""
        attention, mlp = self._parts()
        norm = functools.partial(AdaptiveRMSNorm, self.spec.eps, self.dtype)
        x = sharding.rows(x)
        y, gate = norm(name="norm1")(x, levels[0])
        x = x + gate * attention(y, y, mask, rope, memory=memory)
        y, gate = norm(name="norm2")(x, levels[1])
        return sharding.rows(x + gate * mlp(y))

    def _film(self, x: Float[Array, "b n d"], level: Any) -> Float[Array, "b n d"]:
        if level is None:
            raise ValueError("FiLM needs the condition that it follows, `level`")
        # Zero maps, so that a pretrained tower begins as it was.
        dense = functools.partial(Dense, x.shape[-1:], dtype=self.dtype, init=nn.initializers.zeros)
        scale, shift = dense(name="film_scale")(level), dense(name="film_shift")(level)
        return x * (1 + scale[:, None]) + shift[:, None]

    def _scale(self, x: Float[Array, "b n d"], name: str) -> Float[Array, "b n d"]:
        if not self.spec.layer_scale:
            return x
        # CaiT's starting value: a deep tower begins near the identity.
        scale = self.param(name, nn.initializers.constant(1e-5), x.shape[-1:])
        return x * scale.astype(self.dtype)


def at(x: Shaped[Array, "#b m *_"], columns: Int[Array, "b n"]) -> Shaped[Array, "b n *_"]:
    """Some tokens of every row; one row may stand for all."""
    x = jnp.broadcast_to(x, (len(columns), *x.shape[1:]))
    index = columns.reshape(*columns.shape, *(1,) * (x.ndim - 2))
    return sharding.rows(jnp.take_along_axis(x, index, axis=1))


def remat(target: Any, kind: str, in_scan: bool = True) -> Any:
    """`target` (a module class, or a function of a module) with its inner values recomputed.

    Args:
        target: that is applied.
        kind: what the backward pass recomputes: full | dots | none.
        in_scan: it is the body of a scan.
    """
    if kind == "none":
        return target
    # Inside a scan nothing can be merged with the forward pass, so the guard would only cost time.
    return nn.remat(target, prevent_cse=not in_scan, policy=REMAT_POLICIES[kind])


def recomputed(function: Callable, kind: str, in_scan: bool = True) -> Callable:
    """`remat` for a function of arrays alone."""
    if kind == "none":
        return function
    return jax.checkpoint(function, prevent_cse=not in_scan, policy=REMAT_POLICIES[kind])


def stack(layers: int, kind: str, name: str, dtype: Any = jnp.float32, **facts: Any) -> nn.Module:
    """`layers` Blocks as one scan over stacked parameters [layers, ...].

    Args:
        layers: depth.
        kind: see `remat`.
        name: of the parameter group.
        dtype: of the activations.
        **facts: fields of `BlockSpec`.

    Returns:
        A module to call as `x, _ = stack(...)(x, mask)`, with further arguments of `Block`, the
        same for all layers.
    """
    return _scan(layers, kind)(BlockSpec(**facts), dtype, name=name)


def _scan(layers: int, kind: str) -> Any:
    return nn.scan(
        remat(Block, kind),
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=nn.broadcast,  # type: ignore[arg-type]
        length=layers,
        unroll=sharding.unroll(layers),
    )


class Stack(NamedTuple):
    """Some layers of a stack, each taken once at most, without a copy of them.

    A loop over all layers reads the parameters of each from the stack as it comes to it. A loop
    over a part of them would read from a copy of that part, and the gradients of both parts would
    be joined in one copy more. A `turn` reads any layer from the whole stack, and writes its
    gradients into the whole stack's:

        turn = stack.turn(apply, kind)
        (x, sink), out = jax.lax.scan(turn, (x, stack.sink), stack.items(slice(first, end)))

    Attributes:
        values: parameters of all layers, [l, ...] each, that are read; no gradient goes through.
        sink: the same parameters, for gradients alone: turns hand it on, and each adds its own.
            Kernels are in the type of the products here, as their gradients come.
        rngs: keys of all layers, [l] each, if any are drawn from.
    """

    values: Any
    sink: Any
    rngs: dict[str, Array]

    @classmethod
    def of(cls, layers: nn.Module) -> "Stack":
        """The stack before any layer is taken from it.

        Args:
            layers: a bound module with the parameters of all.
        """

        def sink(path: Any, leaf: Array) -> Array:
            # Nobody computes these values: what counts is the type that gradients are kept in.
            return leaf.astype(layers.dtype) if path[-1].key == "kernel" else leaf

        params, rngs = layers.variables["params"], {}
        # A module applied on its own sees none of its parent's keys.
        if layers.has_rng("dropout"):
            count = len(jax.tree.leaves(params)[0])
            rngs = {"dropout": jax.random.split(layers.make_rng("dropout"), count)}
        sinks = jax.tree_util.tree_map_with_path(sink, params)
        return cls(jax.lax.stop_gradient(params), sinks, rngs)

    def items(self, which: int | slice, own: dict[str, Any] | None = None) -> Any:
        """What turns take beside their carry.

        Args:
            which: of the layers; one, or several in a loop.
            own: keyword arguments of `apply` that differ between layers, [l, ...] each.
        """
        # In numpy numbers are known where a loop is unrolled, as in a control step on a GPU, whose
        # compiler then sees through the stack.
        numbers = np.arange(len(jax.tree.leaves(self.values)[0]), dtype=np.int32)
        return jax.tree.map(lambda leaf: leaf[which], (numbers, own or {}, self.rngs))

    def turn(self, apply: Callable, kind: str) -> Callable:
        """The body of a loop: one layer.

        Args:
            apply: (variables, x, **own, rngs) -> (x, output), as the `apply` of a module; x are
                tokens.
            kind: see `remat`.

        Returns:
            ((x, sink), item) -> ((x, sink), output), to be called with one of `items`.
        """

        def turn(carry: tuple[Array, Any], item: Any) -> tuple[tuple[Array, Any], Any]:
            (x, sink), (number, own, rngs) = carry, item
            # Within what is recomputed, or every layer's parameters would be kept for it.
            taken = jax.tree.map(functools.partial(_take, number), self.values, sink)
            outer, inner = jax.tree.structure(sink), jax.tree.structure((0, 0))
            params, sink = jax.tree.transpose(outer, inner, taken)
            x, out = apply({"params": params}, x, **own, rngs=rngs)
            return (x, sink), out

        return recomputed(turn, kind)


def _take(number: Any, values: Array, sink: Array) -> tuple[Array, Array]:
    value = jax.lax.dynamic_index_in_dim(values, number, keepdims=False)
    return _taken(number, value, sink)


@jax.custom_vjp
def _taken(number: Any, value: Array, sink: Array) -> tuple[Array, Array]:
    """Both, but the value's gradient becomes the layer's in the sink's."""
    del number
    return value, sink


def _taken_backward(number: Any, gradients: tuple[Array, Array]) -> tuple[None, None, Array]:
    layer, stacked = gradients
    # In place: as yet the others hold zeros for this layer.
    layer = layer.astype(stacked.dtype)
    return None, None, jax.lax.dynamic_update_index_in_dim(stacked, layer, number, 0)


_taken.defvjp(lambda number, value, sink: ((value, sink), number), _taken_backward)
