"""The layers of OFA's encoder and decoder: a NormFormer whose positions count in the scores.

Pre-norm layers with three additions: a factor on each head, a norm behind each attention and one
inside the MLP. Positions are not added to the tokens but to the scores: as the product of two
projections of their embeddings, the same in all layers, and as a learned number for each relative
position, of one table a layer.

Legend: b batch · n query tokens · s key tokens · m tokens of the source · d width · h heads
c head width
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vla_jax.models import sharding
from vla_jax.models.towers.block import remat
from vla_jax.models.towers.layers import MLP, Attention, Dense, Dropout, LayerNorm

# Content and position scores are added, so each is divided by the root of 2 head widths.
PARTS_OF_SCORE = 2


@dataclass(frozen=True)
class StackSpec:
    """One of the two towers: its depth, its heads, the width of its MLPs."""

    layers: int
    heads: int
    hidden: int


@dataclass(frozen=True)
class EncoderDecoderSpec:
    """The structural facts of both towers.

    Attributes:
        vocab: rows of the token table, which is the output matrix too.
        width: of the residual streams.
        encoder, decoder: see `StackSpec`.
        activation: of the MLPs.
        max_positions: rows of the text's position tables; the longest text.
        token_buckets: relative positions of one sign between text tokens.
        image_buckets: rows and columns of the grid that images stand on.
        side: rows and columns of an image; at most `image_buckets`.
        position_scale: what PARTS_OF_SCORE is for the scores of positions.
        embed_scale: factor on everything that enters.
        dropout: on what enters and on the outputs of attentions and MLPs.
        attention_dropout: on the attention probabilities.
        eps: of the norms.
    """

    vocab: int
    width: int
    encoder: StackSpec
    decoder: StackSpec
    activation: str
    max_positions: int
    token_buckets: int
    image_buckets: int
    side: int
    position_scale: float = 2.0
    embed_scale: float = 1.0
    dropout: float = 0.0
    attention_dropout: float = 0.0
    eps: float = 1e-5

    def __post_init__(self):
        problems = [
            f"{name}.heads: {stack.heads} does not divide width {self.width}"
            for name, stack in (("encoder", self.encoder), ("decoder", self.decoder))
            if self.width % stack.heads
        ]
        if self.side > self.image_buckets:
            problems.append(f"side: images of {self.side} rows on a grid of {self.image_buckets}")
        if problems:
            raise ValueError("encoder-decoder:\n  " + "\n  ".join(problems))

    @property
    def relative(self) -> tuple[int, int]:
        """Relative positions between text tokens, and between image tokens."""
        return 2 * self.token_buckets - 1, (2 * self.image_buckets - 1) ** 2 + 3

    def embedding_init(self) -> Any:
        """The initializer of every table of embeddings."""
        return nn.initializers.normal(self.width**-0.5)


class Scores(NamedTuple):
    """What an attention gets beside its tokens.

    Attributes:
        mask: bool [b, #n, s], True where a token may attend.
        bias: [#b, h, n, s], the scores of positions.
    """

    mask: Array
    bias: Array


class Shared(NamedTuple):
    """What all layers of a stack get.

    Attributes:
        own: of the attention among the stack's tokens.
        relative: [#b, n, s], rows of each layer's tables of relative positions, text's then
            images'; past their end where they have nothing to say.
        cross: of the attention to a source, where there is one.
        source: [b, m, d], if its keys and values are still to be made.
        slots: (row, column) of these tokens in a cache, if there is one.
        collect: return the states between the layers.
    """

    own: Scores
    relative: Array
    cross: Scores | None = None
    source: Array | None = None
    slots: tuple[Array, Array] | None = None
    collect: bool = False


class Layer(nn.Module):
    """Attention among the tokens, in a decoder attention to the source, MLP."""

    spec: EncoderDecoderSpec
    stack: StackSpec
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"], per_layer: dict[str, Any], shared: Shared
    ) -> tuple[Float[Array, "b n d"], dict[str, Any]]:
        """One layer.

        Args:
            x: tokens.
            per_layer: what differs between layers: "keys" and "values" of a cache, "source_keys"
                and "source_values" of its source.
            shared: what does not differ.

        Returns:
            x and what is stacked over the layers: the new ones of `per_layer`, the "state" before.
        """
        x = sharding.rows(x)
        s, out = self.spec, {"state": x} if shared.collect else {}
        zeros, shapes = nn.initializers.zeros, [(rows, self.stack.heads) for rows in s.relative]
        # Joined below, so that one gather reads the numbers of text and images.
        tables = [
            self.param(f"{name}_bias", zeros, shape)
            for name, shape in zip(("token", "image"), shapes, strict=True)
        ]
        # Indices past both tables mean "no relative position" and give 0.
        near = jnp.take(jnp.concatenate(tables), shared.relative, 0, mode="fill", fill_value=0.0)

        def remember(k: Array, v: Array) -> tuple[Array, Array]:
            for name, new in (("keys", k), ("values", v)):
                out[name] = per_layer[name].at[shared.slots].set(new)
            return out["keys"], out["values"]

        def recall(k: Array, v: Array) -> tuple[Array, Array]:
            if "source_keys" in per_layer:
                return per_layer["source_keys"], per_layer["source_values"]
            # The first call with a cache stores the source's keys and values for those that follow.
            if shared.slots is not None:
                out["source_keys"], out["source_values"] = k, v
            return k, v

        y, scores = self._norm("norm1")(x), shared.own
        # `Attention` takes one bias: the scores that all layers share and this layer's own numbers.
        bias = scores.bias + jnp.moveaxis(near, -1, -3)
        memory = remember if shared.slots is not None else None
        y = self._attention("attn")(y, y, scores.mask, None, bias, memory)
        x = x + Dropout(s.dropout)(self._norm("post1")(y))
        if shared.cross is not None:
            y, scores = self._norm("norm_cross")(x), shared.cross
            # Of a source that is remembered nothing is left to project.
            source = y[:, :0] if shared.source is None else shared.source
            y = self._attention("cross")(y, source, scores.mask, None, scores.bias, recall)
            x = x + Dropout(s.dropout)(self._norm("post_cross")(y))
        # True is the norm inside of the MLP, the third of NormFormer's additions.
        mlp = MLP(self.stack.hidden, s.activation, True, s.eps, self.dtype, name="mlp")
        return sharding.rows(x + Dropout(s.dropout)(mlp(self._norm("norm2")(x)))), out

    def _norm(self, name: str) -> LayerNorm:
        return LayerNorm(self.spec.eps, self.dtype, name=name)

    def _attention(self, name: str) -> Attention:
        width = self.spec.width // self.stack.heads
        return Attention(
            self.stack.heads,
            dropout=self.spec.attention_dropout,
            dtype=self.dtype,
            scale=(PARTS_OF_SCORE * width) ** -0.5,
            head_scale=True,
            name=name,
        )


class PlaceScores(nn.Module):
    """Scores of one position for another: the product of their projected embeddings."""

    heads: int
    width: int
    scale: float
    dtype: Any = jnp.float32

    def setup(self):
        each = (self.heads, self.width // self.heads)
        self.q, self.k = Dense(each, dtype=self.dtype), Dense(each, dtype=self.dtype)

    def keys(self, places: Float[Array, "s d"]) -> Float[Array, "s h c"]:
        """The projected embeddings of positions that are attended to."""
        return self.k(places)

    def __call__(
        self, places: Float[Array, "#b n d"], keys: Float[Array, "s h c"]
    ) -> Float[Array, "#b h n s"]:
        """Scores of the positions that attend, for `keys`."""
        # The variance of a sum of two scores is to be that of one.
        factor = (self.scale * self.width / self.heads) ** -0.5
        scores = jnp.einsum("bnhc,shc->bhns", self.q(places) * factor, keys)
        # They are added to scores that are float32 before the softmax.
        return scores.astype(jnp.float32)


def run(
    layer: Layer, x: Float[Array, "b n d"], per_layer: dict[str, Any], shared: Shared, kind: str
) -> tuple[Float[Array, "b n d"], dict[str, Any]]:
    """All layers of a stack, one scan step each."""
    scan = nn.scan(
        remat(functools.partial(Layer.__call__, shared=shared), kind),
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        length=layer.stack.layers,
        unroll=sharding.unroll(layer.stack.layers),
    )
    return scan(layer, x, per_layer)
