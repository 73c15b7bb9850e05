"""Building blocks shared by every tower.

Legend: b batch · n query tokens · m key tokens · d width · h heads · k head width · f hidden width

Dropout is on exactly when the caller passes an rng named "dropout" to `apply`; nothing else
switches between training and inference.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
}

REMAT_POLICIES = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Dense(nn.Module):
    """Linear map from the last `contract` axes to `features`; kernel [*in, *features].

    Attributes:
        features: output axes, e.g. (heads, head_width).
        contract: how many trailing input axes are summed over.
        use_bias: whether to add a bias of shape `features`.
        dtype: of the product; parameters stay float32.
        init: initialiser, by default truncated normal with variance 1 / fan-in.
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
        kernel = self.param("kernel", init, shape).astype(self.dtype)
        # One plain matrix product: with several batch axes XLA's CPU backward pass is 1.7x slower.
        lead = x.shape[: x.ndim - self.contract]
        width = math.prod(inputs)
        x = x.reshape(-1, width).astype(self.dtype)
        low_rank = self._low_rank(x)
        x = x @ kernel.reshape(width, -1)
        x = (x if low_rank is None else x + low_rank).reshape(*lead, *self.features)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, tuple(self.features))
            x = x + bias.astype(self.dtype)
        return x

    def _low_rank(self, x: Float[Array, "n i"]) -> Float[Array, "n o"] | None:
        """LoRA: dropout(x) @ a @ b, when factors stand beside the kernel (see train/lora.py)."""
        if not self.has_variable("params", "lora_a"):
            return None
        a, b = (self.get_variable("params", f"lora_{m}").astype(self.dtype) for m in "ab")
        if self.has_variable("params", "lora_rate") and self.has_rng("dropout"):
            keep = 1.0 - self.get_variable("params", "lora_rate")
            kept = jax.random.bernoulli(self.make_rng("dropout"), keep, x.shape)
            x = jnp.where(kept, x / keep.astype(x.dtype), jnp.zeros_like(x))
        return x @ a @ b


class LayerNorm(nn.Module):
    """Layer normalisation with statistics in float32 (torch's two-pass variance)."""

    eps: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        """Normalise the last axis, then scale and shift."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        x = x.astype(jnp.float32)
        x = x - x.mean(-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + self.eps)
        return (x * scale + bias).astype(self.dtype)


class Dropout(nn.Module):
    """Zero a share `rate` of the entries when an rng named "dropout" was passed to `apply`."""

    rate: float

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Same shape; kept entries are divided by 1 - rate."""
        if self.rate == 0.0 or not self.has_rng("dropout"):
            return x
        keep = jax.random.bernoulli(self.make_rng("dropout"), 1.0 - self.rate, x.shape)
        return jnp.where(keep, x / (1.0 - self.rate), jnp.zeros_like(x))


class Attention(nn.Module):
    """Multi-head attention with separate q, k, v, o projections and an optional inner norm.

    Attributes:
        heads: number of heads; must divide the width of the queries.
        sub_norm: LayerNorm on the concatenated heads before the output projection (Kosmos-2).
        dropout: rate on the attention probabilities.
    """

    heads: int
    sub_norm: bool = False
    dropout: float = 0.0
    eps: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        queries: Float[Array, "b n d"],
        keys: Float[Array, "b m d"],
        mask: Bool[Array, "#b #n m"] | None = None,
    ) -> Float[Array, "b n d"]:
        """Attend from `queries` to `keys`; mask is True where attention is allowed."""
        width = queries.shape[-1]
        per_head = (self.heads, width // self.heads)
        q = Dense(per_head, dtype=self.dtype, name="q")(queries) * per_head[1] ** -0.5
        k = Dense(per_head, dtype=self.dtype, name="k")(keys)
        v = Dense(per_head, dtype=self.dtype, name="v")(keys)
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
        scores = jnp.einsum("bhnk,bhmk->bhnm", q, k).astype(jnp.float32)
        if mask is not None:
            scores = jnp.where(mask[:, None], scores, jnp.finfo(jnp.float32).min)
        weights = Dropout(self.dropout)(jax.nn.softmax(scores, axis=-1)).astype(self.dtype)
        x = jnp.einsum("bhnm,bhmk->bhnk", weights, v).swapaxes(1, 2)
        if self.sub_norm:
            flat = LayerNorm(self.eps, self.dtype, name="norm")(x.reshape(*x.shape[:2], width))
            x = flat.reshape(x.shape)
        return Dense((width,), contract=2, dtype=self.dtype, name="o")(x)


class MLP(nn.Module):
    """fc2(norm?(act(fc1(x))))."""

    hidden: int
    activation: str
    sub_norm: bool = False
    eps: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        """Two-layer perceptron of the same output width."""
        width = x.shape[-1]
        x = ACTIVATIONS[self.activation](Dense((self.hidden,), dtype=self.dtype, name="fc1")(x))
        if self.sub_norm:
            x = LayerNorm(self.eps, self.dtype, name="norm")(x)
        return Dense((width,), dtype=self.dtype, name="fc2")(x)


class Block(nn.Module):
    """Pre-norm transformer block: x + attn(norm(x)), then x + mlp(norm(x))."""

    heads: int
    hidden: int
    activation: str
    sub_norm: bool = False
    dropout: float = 0.0
    attention_dropout: float = 0.0
    eps: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"], mask: Bool[Array, "#b n n"] | None
    ) -> tuple[Float[Array, "b n d"], None]:
        """One layer, in the (carry, output) form that `nn.scan` wants."""
        y = LayerNorm(self.eps, self.dtype, name="norm1")(x)
        attention = Attention(
            self.heads, self.sub_norm, self.attention_dropout, self.eps, self.dtype, name="attn"
        )
        x = x + Dropout(self.dropout)(attention(y, y, mask))
        y = LayerNorm(self.eps, self.dtype, name="norm2")(x)
        mlp = MLP(self.hidden, self.activation, self.sub_norm, self.eps, self.dtype, name="mlp")
        return x + Dropout(self.dropout)(mlp(y)), None


def stack(layers: int, remat: str, name: str, **block: Any) -> nn.Module:
    """`layers` Blocks as one scan over stacked parameters [layers, ...].

    Args:
        layers: depth.
        remat: what the backward pass recomputes: full | dots | none.
        name: of the parameter group.
        **block: fields of `Block`.

    Returns:
        A module to call as `x, _ = stack(...)(x, mask)`.
    """
    layer = Block
    if remat != "none":
        layer = nn.remat(Block, prevent_cse=False, policy=REMAT_POLICIES[remat])
    scanned = nn.scan(
        layer,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=nn.broadcast,  # type: ignore[arg-type]
        length=layers,
    )
    return scanned(name=name, **block)
