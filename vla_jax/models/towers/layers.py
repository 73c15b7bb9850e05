"""Building blocks shared by every tower.

Legend: b batch · n query tokens · m key tokens · d width · h query heads · g key heads
k head width · r half of a head's rotated features

Dropout is on exactly when the caller passes an rng named "dropout" to `apply`; nothing else
switches between training and inference.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from vla_jax.models import sharding
from vla_jax.models.towers import fused
from vla_jax.models.towers.norms import NORMS, LayerNorm
from vla_jax.models.towers.softmax import softmax
from vla_jax.models.whole_numbers import brought_back


@jax.custom_vjp
def _gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    return jax.nn.gelu(x, approximate=False)


# Written out: differentiated by itself it shares the error function with the forward pass, which a
# compiler then brings to memory as one more array of the widest shape there is.
def _gelu_backward(x: Float[Array, "..."], gradient: Float[Array, "..."]) -> tuple[Array]:
    wide = x.astype(jnp.float32)
    below = 0.5 + 0.5 * jax.lax.erf(wide * 0.5**0.5)
    density = jnp.exp(-0.5 * wide * wide) / math.sqrt(2 * math.pi)
    return ((gradient * (below + wide * density)).astype(x.dtype),)


_gelu.defvjp(lambda x: (_gelu(x), x), _gelu_backward)

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": _gelu,
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),  # GPT-2's name of the same
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
}


class Dense(nn.Module):
    """Linear map from the last `contract` axes to `features`; kernel [*in, *features].

    Attributes:
        features: output axes, e.g. (heads, head_width).
        contract: how many trailing input axes are summed over.
        use_bias: whether to add a bias of shape `features`.
        dtype: of the product; parameters stay float32.
        init: initializer, by default truncated normal with variance 1 / fan-in.
    """

    features: Sequence[int]
    contract: int = 1
    use_bias: bool = True
    dtype: Any = jnp.float32
    init: Callable | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """[..., *in] -> [..., *features]."""
        inputs = x.shape[x.ndim - self.contract :]
        shape = (*inputs, *self.features)
        init = self.init or nn.initializers.variance_scaling(
            1.0,
            "fan_in",
            "truncated_normal",
            in_axis=tuple(range(self.contract)),
            out_axis=tuple(range(self.contract, len(shape))),
        )
        # The cast is part of the program, so gradients and optimizer stay in float32.
        kernel = self.param("kernel", init, shape).astype(self.dtype)
        lead = x.shape[: x.ndim - self.contract]
        width = math.prod(inputs)
        x = x.reshape(*lead, width).astype(self.dtype)
        low_rank = self._low_rank(x)  # before `x` becomes the product
        x = brought_back(self, sharding.product(x, kernel.reshape(width, -1)), "kernel")
        x = x if low_rank is None else x + low_rank
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, tuple(self.features))
            # Before the axes are told apart: GPU products add a vector themselves, not an array.
            x = x + bias.reshape(-1).astype(self.dtype)
        return x.reshape(*lead, *self.features)

    def kernels(self) -> dict[str, int]:
        """The names of the kernels -> how many of their axes are inputs."""
        return {"kernel": self.contract}

    def _low_rank(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"] | None:
        """LoRA: dropout(x) @ a @ b, when factors stand beside the kernel (see train/lora.py)."""
        if not self.has_variable("params", "lora_a"):
            return None
        a, b = (self.get_variable("params", f"lora_{m}").astype(self.dtype) for m in "ab")
        if self.has_variable("params", "lora_rate") and self.has_rng("dropout"):
            keep = 1.0 - self.get_variable("params", "lora_rate")
            mask = jax.random.bernoulli(self.make_rng("dropout"), keep, x.shape)
            x = jnp.where(mask, x / keep.astype(x.dtype), jnp.zeros_like(x))
        return sharding.product(sharding.product(x, a), b)


class Dropout(nn.Module):
    """Zero a share `rate` of the entries when an rng named "dropout" was passed to `apply`."""

    rate: float

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Same shape; kept entries are divided by 1 - rate."""
        if self.rate == 0.0 or not self.has_rng("dropout"):
            return x
        return _dropped(self.rate, x, self.keep(x.shape))

    def keep(self, shape: tuple[int, ...]) -> Bool[Array, "..."]:
        """Which entries stay; the first call draws what `__call__` would draw."""
        return jax.random.bernoulli(self.make_rng("dropout"), 1.0 - self.rate, shape)

    def seed(self) -> UInt32[Array, "2"]:
        """Random words, for kernels that draw for themselves."""
        return jax.random.bits(self.make_rng("dropout"), (2,), "uint32")


# Differentiated by itself, a choice keeps the zeros it chooses from: under a scan over layers one
# array of the whole shape, held through the loop although it never changes. So the gradients of
# the two choices here are written out.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dropped(rate: float, x: Float[Array, "..."], keep: Bool[Array, "..."]) -> Float[Array, "..."]:
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))


_dropped.defvjp(
    lambda rate, x, keep: (_dropped(rate, x, keep), keep),
    lambda rate, keep, gradient: (_dropped(rate, gradient, keep), None),
)


@dataclass(frozen=True)
class Rope:
    """Rotary positions: feature i and i + r of a head turn together, by position * frequency i.

    Attributes:
        theta: base of the frequencies theta^(-i / r).
        width: features of a head that turn, its first ones; the rest stay (partial rotation).
        stretch: positions are divided by this ("linear" scaling).
        sections: M-RoPE: how many of the r frequencies follow each row of the positions (time,
            height, width); empty for plain RoPE.
        interleaved: M-RoPE: frequencies go round the rows (Qwen3-VL) instead of in one run a row.
        rounded: type to whose precision cosines and sines are rounded, if any.
    """

    theta: float
    width: int
    stretch: float = 1.0
    sections: tuple[int, ...] = ()
    interleaved: bool = False
    rounded: str | None = None

    def __post_init__(self):
        if self.sections and sum(self.sections) != self.width // 2:
            raise ValueError(
                f"rope: sections {self.sections} must sum to {self.width // 2}, half of the "
                f"{self.width} rotated features"
            )

    def rows(self) -> tuple[int, ...]:
        """The row of the positions that each frequency follows."""
        half = self.width // 2
        if not self.sections:
            return (0,) * half
        if not self.interleaved:
            return tuple(i for i, count in enumerate(self.sections) for _ in range(count))
        period = len(self.sections)
        return tuple(
            i % period if i < period * self.sections[i % period] else 0 for i in range(half)
        )

    def __call__(self, positions: Int[Array, "*s b n"]) -> tuple[Array, Array]:
        """Positions -> cosines and sines, float32 [b, n, r].

        Args:
            positions: [b, n]; with `sections` also [s, b, n], one row a section. One row serves
                all sections (text).
        """
        half = self.width // 2
        exponent = jnp.arange(half, dtype=jnp.float32) * (2.0 / self.width)
        frequency = 1.0 / (self.theta**exponent * self.stretch)
        if positions.ndim == 3:
            positions = jnp.moveaxis(positions[jnp.array(self.rows())], 0, -1)
        else:
            positions = positions[..., None]
        # Whole numbers above 256 are no longer all different in bfloat16.
        angle = positions.astype(jnp.float32) * frequency
        cosine, sine = jnp.cos(angle), jnp.sin(angle)
        if self.rounded is None:
            return cosine, sine
        # A pair of casts would be compiled away.
        kind = jnp.finfo(self.rounded)
        cosine, sine = (jax.lax.reduce_precision(x, kind.nexp, kind.nmant) for x in (cosine, sine))
        return cosine, sine


def rotate(
    x: Float[Array, "b n h k"], cos: Float[Array, "#b n r"], sin: Float[Array, "#b n r"]
) -> Float[Array, "b n h k"]:
    """Turn the pairs (i, i + r) of every head's first 2 r features; computed in float32."""
    half = cos.shape[-1]
    cos, sin = cos[:, :, None], sin[:, :, None]
    a, b = (x[..., i : i + half].astype(jnp.float32) for i in (0, half))
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
    if 2 * half == x.shape[-1]:
        return turned
    return jnp.concatenate([turned, x[..., 2 * half :]], axis=-1)


class Attention(nn.Module):
    """Attention with separate q, k, v, o projections.

    Attributes:
        heads: query heads.
        kv_heads: key and value heads, each shared by heads / kv_heads query heads; None = heads.
        head_width: None = width of the queries / heads.
        qkv_bias, out_bias: whether those projections have biases.
        qk_norm: a key of NORMS: queries and keys are normalized after projection.
        qk_norm_over: "head": each head by itself; "all": the concatenated heads.
        sub_norm: LayerNorm on the concatenated heads before the output projection (Kosmos-2).
        head_scale: a learned factor on each head's output (NormFormer).
        scale: of the scores; None = head_width ** -0.5.
        clip: projected q, k, v are clipped to +- this (MPT).
        soft_cap: scores are squashed to +- this by tanh (Gemma-2).
        dropout: rate on the attention probabilities.
        eps: of the norms.
        dtype: of the activations; softmax is float32.
    """

    heads: int
    sub_norm: bool = False
    dropout: float = 0.0
    eps: float = 1e-5
    dtype: Any = jnp.float32
    kv_heads: int | None = None
    head_width: int | None = None
    qkv_bias: bool = True
    out_bias: bool = True
    qk_norm: str | None = None
    qk_norm_over: str = "head"
    scale: float | None = None
    clip: float | None = None
    soft_cap: float | None = None
    head_scale: bool = False

    @nn.compact
    def __call__(
        self,
        queries: Float[Array, "b n d"],
        keys: Float[Array, "b m c"],
        mask: fused.Mask = None,
        rope: tuple[Array, Array] | None = None,
        bias: Float[Array, "#b #h #n s"] | None = None,
        memory: Callable[[Array, Array], tuple[Array, Array]] | None = None,
        gain: Float[Array, "#b n"] | None = None,
        values: Float[Array, "b m c"] | None = None,
        turned: tuple[Array, Array] | None = None,
    ) -> Float[Array, "b n d"]:
        """Attend from `queries` to `keys`.

        Args:
            queries: what attends.
            keys: what is attended to; the queries themselves in self-attention.
            mask: True where attention is allowed.
            rope: cosines and sines of `Rope`, for queries and keys; keys that come with `values`
                of their own are of a cache, and turned already.
            bias: added to the scores (ALiBi).
            memory: (k, v) [b, m, g, k] of these tokens -> (k, v) [b, s, g, k] to attend to: how
                a cache enters. Without it s = m.
            gain: factor on each token's queries (Qwen-VL's, which grow with the logarithm of the
                position).
            values: what the values are made of; None = the keys.
            turned: `rope` for the queries where it is of the keys alone.
        """
        width = queries.shape[-1]
        k_width = self.head_width or width // self.heads
        groups = self.kv_heads or self.heads
        project = functools.partial(Dense, use_bias=self.qkv_bias, dtype=self.dtype)
        q = self._clip(project((self.heads, k_width), name="q")(queries))
        k = self._clip(project((groups, k_width), name="k")(keys))
        v = self._clip(project((groups, k_width), name="v")(keys if values is None else values))
        if self.qk_norm:
            q, k = self._normalize(q, "q_norm"), self._normalize(k, "k_norm")
        if rope is not None:
            q, k = rotate(q, *(turned or rope)), rotate(k, *rope) if values is None else k
        scale = k_width**-0.5 if self.scale is None else self.scale
        # The kernels take one factor for all tokens, and this one differs from token to token.
        if gain is not None:
            q, scale = q * scale * gain[..., None, None].astype(self.dtype), 1.0
        if memory is not None:
            k, v = memory(k, v)
        dropout, drop = Dropout(self.dropout), None
        if self.dropout > 0 and self.has_rng("dropout"):
            shape = (q.shape[0], self.heads, q.shape[1], k.shape[1])
            drop = fused.Drop(self.dropout, functools.partial(dropout.keep, shape), dropout.seed)
        # The fused kernels know neither biases nor capped scores.
        special = bias is not None or self.soft_cap is not None
        x = None if special else fused.attend(q, k, v, mask, scale, drop)
        if x is None:
            x = self._plainly(q * scale, k, v, mask, bias, dropout)
        if self.head_scale:
            factor = self.param("head_scale", nn.initializers.ones, (self.heads,))
            x = x * factor[:, None].astype(self.dtype)
        if self.sub_norm:
            flat = LayerNorm(self.eps, self.dtype, name="norm")(x.reshape(*x.shape[:2], -1))
            x = flat.reshape(x.shape)
        return Dense((width,), 2, self.out_bias, self.dtype, name="o")(x)

    def _plainly(
        self,
        q: Float[Array, "b n h k"],
        k: Float[Array, "b s g k"],
        v: Float[Array, "b s g k"],
        mask: fused.Mask,
        bias: Float[Array, "#b #h #n s"] | None,
        dropout: Dropout,
    ) -> Float[Array, "b n h k"]:
        """Scores, softmax in float32, their mean of the values."""
        (b, n, _, k_width), (s, groups) = q.shape, k.shape[1:3]
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
        # Query heads that share a key head line up behind each other as further query tokens.
        q = q.reshape(b, groups, -1, k_width)
        scores = jnp.einsum("bgnk,bgsk->bgns", q, k).astype(jnp.float32)
        scores = scores.reshape(b, self.heads, n, s)
        # Ahead of the mask: the cap would bring what is forbidden back to a score that counts.
        if self.soft_cap is not None:
            scores = self.soft_cap * jnp.tanh(scores / self.soft_cap)
        if bias is not None:
            scores = scores + bias
        if isinstance(mask, fused.Rule):
            mask = mask.dense()
        mask = None if mask is None else mask[:, None]
        weights = dropout(softmax(jnp.dtype(self.dtype), scores, mask))
        x = jnp.einsum("bgns,bgsk->bgnk", weights.reshape(b, groups, -1, s), v)
        return x.reshape(b, self.heads, n, k_width).swapaxes(1, 2)

    def _clip(self, x: Array) -> Array:
        return x if self.clip is None else jnp.clip(x, -self.clip, self.clip)

    def _normalize(self, x: Float[Array, "b n h k"], name: str) -> Float[Array, "b n h k"]:
        norm = NORMS[self.qk_norm or ""](self.eps, self.dtype, name=name)
        if self.qk_norm_over == "head":
            return norm(x)
        return norm(x.reshape(*x.shape[:2], -1)).reshape(x.shape)


class MLP(nn.Module):
    """fc2(norm?(act(fc1(x)))), or down(act(gate(x)) * up(x)) where gated.

    Attributes:
        width: of the result; 0 = that of the input.
    """

    hidden: int
    activation: str
    sub_norm: bool = False
    eps: float = 1e-5
    dtype: Any = jnp.float32
    gated: bool = False
    use_bias: bool = True
    width: int = 0

    @nn.compact
    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... _"]:
        """Perceptron of two layers."""
        dense = functools.partial(Dense, use_bias=self.use_bias, dtype=self.dtype)
        act, width = ACTIVATIONS[self.activation], self.width or x.shape[-1]
        if self.gated:
            x = act(dense((self.hidden,), name="gate")(x)) * dense((self.hidden,), name="up")(x)
        else:
            x = act(dense((self.hidden,), name="fc1")(x))
        if self.sub_norm:
            x = LayerNorm(self.eps, self.dtype, name="norm")(x)
        return dense((width,), name="down" if self.gated else "fc2")(x)
