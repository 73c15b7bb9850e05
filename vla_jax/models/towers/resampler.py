"""Modules that turn a vision tower's tokens into a fixed number of VLM tokens.

Legend: b batch · n image tokens · c their width · q queries · d width of the result
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vla_jax.models import sharding
from vla_jax.models import weights as w
from vla_jax.models.towers import layers, positions
from vla_jax.models.towers.block import remat

_NORMAL = nn.initializers.normal


def _repeat(x: Float[Array, "q d"], batch: int) -> Float[Array, "b q d"]:
    return jnp.broadcast_to(x, (batch, *x.shape))


class LatentQueryProjection(nn.Module):
    """Kosmos-2: project, then let learned queries attend to [projected tokens, queries]."""

    queries: int
    width: int
    heads: int
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b q d"]:
        """Image tokens -> text-width tokens."""
        # The tokens are unit vectors, so unit weights give outputs of the queries' own size; with
        # the usual 1 / sqrt(c) a model trained from scratch would hardly see its images.
        unit = _NORMAL(1.0)
        x = layers.Dense((self.width,), dtype=self.dtype, init=unit, name="dense")(x)
        queries = self.param("queries", unit, (self.queries, self.width)).astype(self.dtype)
        queries = _repeat(queries, len(x))
        # As in the original, the queries attend to themselves too.
        keys = jnp.concatenate([x, queries], axis=1)
        return layers.Attention(self.heads, dropout=self.dropout, dtype=self.dtype, name="attn")(
            queries, keys
        )


class PositionedQueries(nn.Module):
    """Qwen-VL: queries with positions attend once to projected tokens with positions.

    Source: Resampler of the released visual.py. Positions begin as MAE's sines and cosines over
    the queries' grid; over the tokens' grid they are resampled, and they enter the keys, not the
    values. The original stores and never trained them; RoboVLMs trains them with the rest of the
    tower, if it does. The norm and the product after the attention stand in the original's tower.

    Attributes:
        queries: grid of the queries.
        grid: of the image tokens.
    """

    queries: positions.Grid
    grid: positions.Grid
    width: int
    heads: int
    eps: float = 1e-6
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b q d"]:
        """Patch tokens -> text-width tokens."""

        def norm(name: str) -> Any:
            return layers.LayerNorm(self.eps, self.dtype, name=name)

        shape = (self.queries[0] * self.queries[1], self.width)
        table = positions.sincos(self.queries, self.width)
        stored = self.param("positions", lambda _: jnp.asarray(table)).astype(self.dtype)
        queries = self.param("queries", _NORMAL(0.02), shape).astype(self.dtype)
        dense = layers.Dense((self.width,), use_bias=False, dtype=self.dtype, name="dense")
        x = norm("key_norm")(dense(x))
        # The table is stored over the queries' grid alone.
        place = positions.resample(stored, self.queries, self.grid, "bicubic")
        queries = _repeat(norm("query_norm")(queries) + stored, len(x))
        attention = layers.Attention(self.heads, dtype=self.dtype, name="attn")
        x = norm("norm")(attention(queries, x + place, values=x))
        product = layers.Dense((self.width,), use_bias=False, dtype=self.dtype, name="project")
        return product(x)


class _PerceiverLayer(nn.Module):
    heads: int
    head_width: int
    hidden: int
    dtype: Any

    @nn.compact
    def __call__(
        self,
        latents: Float[Array, "b q d"],
        x: Float[Array, "b n d"],
        mask: Bool[Array, "b 1 m"] | None,
    ):
        latents, norm = sharding.rows(latents), {"dtype": self.dtype}
        q = layers.LayerNorm(name="latent_norm", **norm)(latents)
        # Flamingo's latents see themselves as well as the image.
        keys = jnp.concatenate([layers.LayerNorm(name="image_norm", **norm)(x), q], axis=1)
        attention = layers.Attention(
            self.heads,
            head_width=self.head_width,
            qkv_bias=False,
            out_bias=False,
            dtype=self.dtype,
            name="attn",
        )
        latents = latents + attention(q, keys, mask)
        mlp = layers.MLP(self.hidden, "gelu", use_bias=False, dtype=self.dtype, name="mlp")
        y = mlp(layers.LayerNorm(name="mlp_norm", **norm)(latents))
        return sharding.rows(latents + y), None


class Perceiver(nn.Module):
    """Flamingo's resampler: latents attend to [image tokens, latents], layer after layer.

    Source: Alayrac et al. 2022, as in open_flamingo's PerceiverResampler without time embeddings
    and in RoboVLMs' own vision resampler, which are the same.

    Attributes:
        queries: latents; the originals have 64.
        depth: layers.
    """

    queries: int = 64
    depth: int = 6
    heads: int = 8
    head_width: int = 64
    widen: int = 4
    remat: str = "full"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"], mask: Bool[Array, "b n"] | None = None
    ) -> Float[Array, "b q d"]:
        """Tokens -> as many tokens as there are latents, of the same width.

        Args:
            x: tokens, of an image as a rule.
            mask: False on padding.
        """
        width = x.shape[-1]
        # Both originals draw them at unit size, and not at the 0.02 that is usual for embeddings.
        latents = self.param("queries", _NORMAL(1.0), (self.queries, width)).astype(self.dtype)
        scanned = nn.scan(
            remat(_PerceiverLayer, self.remat),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,  # type: ignore[arg-type]
            length=self.depth,
            unroll=sharding.unroll(self.depth),
        )
        run = scanned(self.heads, self.head_width, self.widen * width, self.dtype, name="layers")
        if mask is not None:
            # The latents behind the tokens are always visible.
            mask = jnp.pad(mask, ((0, 0), (0, self.queries)), constant_values=True)[:, None]
        latents, _ = run(_repeat(latents, len(x)), x, mask)
        return layers.LayerNorm(dtype=self.dtype, name="norm")(latents)


class LatentDecoder(nn.Module):
    """UForm-Gen's pooler: one decoder layer over learned latents with the image as its memory.

    Source: torch's TransformerDecoderLayer with norms first. The first generation projects the
    image tokens to the text's width before the layer, the second the latents after it.

    Attributes:
        queries: latents.
        width: of the text decoder.
        hidden: of the MLP.
        project_first: see above.
        dropout: torch's default, at its four places.
    """

    queries: int
    width: int
    heads: int
    hidden: int
    project_first: bool
    activation: str = "silu"
    dropout: float = 0.1
    eps: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b q d"]:
        """Image tokens -> latents of the text's width."""

        def norm(name: str) -> Any:
            return layers.LayerNorm(self.eps, self.dtype, name=name)

        def attend(name: str) -> Any:
            return layers.Attention(self.heads, dropout=self.dropout, dtype=self.dtype, name=name)

        drop = layers.Dropout(self.dropout)
        project = layers.Dense((self.width,), dtype=self.dtype, name="dense")
        if self.project_first:
            x = project(x)
        shape = (self.queries, x.shape[-1])
        latents = self.param("queries", _NORMAL(0.02**0.5), shape).astype(self.dtype)
        latents = _repeat(latents, len(x))
        y = norm("norm1")(latents)
        latents = latents + drop(attend("self_attn")(y, y))
        latents = latents + drop(attend("cross_attn")(norm("norm2")(latents), x))
        act = layers.ACTIVATIONS[self.activation]
        y = layers.Dense((self.hidden,), dtype=self.dtype, name="fc1")(norm("norm3")(latents))
        y = layers.Dense(shape[1:], dtype=self.dtype, name="fc2")(drop(act(y)))
        latents = latents + drop(y)
        return latents if self.project_first else project(latents)


class PatchMerger(nn.Module):
    """Qwen2-VL and later: squares of neighboring patches become one token, by a two-layer MLP.

    Attributes:
        grid: rows and columns of patches; tokens come row by row, in and out.
        side: of a square, patches.
        width: of the result.
        norm: a key of `layers.NORMS`.
        norm_merged: the norm sees the concatenated square, not each patch (Qwen3-VL's deepstack).
    """

    grid: positions.Grid
    side: int
    width: int
    norm: str = "layer"
    norm_merged: bool = False
    eps: float = 1e-6
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b q d"]:
        """Patch tokens -> 1 / side^2 as many.

        Raises:
            ValueError: if the squares do not fill the grid.
        """
        (rows, columns), m, c = self.grid, self.side, x.shape[-1]
        if rows % m or columns % m:
            raise ValueError(f"{rows} x {columns} patches cannot be merged in squares of {m}")
        norm = layers.NORMS[self.norm](self.eps, self.dtype, name="norm")
        if not self.norm_merged:
            x = norm(x)
        # After the swap the patches of one square lie side by side.
        x = x.reshape(-1, rows // m, m, columns // m, m, c).swapaxes(2, 3)
        x = x.reshape(len(x), rows * columns // m**2, m * m * c)
        if self.norm_merged:
            x = norm(x)
        x = layers.Dense((m * m * c,), dtype=self.dtype, name="fc1")(x)
        x = layers.ACTIVATIONS["gelu"](x)
        return layers.Dense((self.width,), dtype=self.dtype, name="fc2")(x)


class AttentionPool(nn.Module):
    """SigLIP's head: one learned query attends to all tokens, then a residual MLP."""

    heads: int
    hidden: int
    activation: str
    eps: float = 1e-6
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b d"]:
        """Tokens after the tower's last norm -> one vector."""
        probe = self.param("queries", _NORMAL(1.0), (1, x.shape[-1])).astype(self.dtype)
        attention = layers.Attention(self.heads, dtype=self.dtype, name="attn")
        x = attention(_repeat(probe, len(x)), x)
        y = layers.LayerNorm(self.eps, self.dtype, name="norm")(x)
        y = layers.MLP(self.hidden, self.activation, dtype=self.dtype, name="mlp")(y)
        return (x + y)[:, 0]


def timm_pool_weights() -> list[w.Weight]:
    """SigLIP's head under timm's names."""
    return [
        # Theirs has a batch axis of 1 in front.
        w.Weight("latent", "queries", "leading_1"),
        *w.pair("q", "attn/q"),
        *w.pair("kv", "attn/{k,v}"),
        *w.pair("proj", "attn/o", "linear_from_heads"),
        *w.norm("norm", "norm"),
        *w.pair("mlp.fc1", "mlp/fc1"),
        *w.pair("mlp.fc2", "mlp/fc2"),
    ]


def attention_pool_weights() -> list[w.Weight]:
    """SigLIP's head under Hugging Face's names."""
    return [
        # Theirs has a batch axis of 1 in front.
        w.Weight("probe", "queries", "leading_1"),
        *w.multihead("attention", "attn"),
        *w.norm("layernorm", "norm"),
        *w.pair("mlp.fc1", "mlp/fc1"),
        *w.pair("mlp.fc2", "mlp/fc2"),
    ]


def positioned_queries_weights() -> list[w.Weight]:
    """Qwen-VL's resampler, norm and product; names from the tower's root."""
    pool = "attn_pool."
    return [
        w.Weight(pool + "query", "queries"),
        w.Weight(pool + "pos_embed", "positions"),
        w.Weight(pool + "kv_proj.weight", "dense/kernel", "linear"),
        *w.multihead(pool + "attn", "attn"),
        *w.norm(pool + "ln_q", "query_norm"),
        *w.norm(pool + "ln_kv", "key_norm"),
        # Norm and product stand in the tower, outside its `attn_pool`.
        *w.norm("ln_post", "norm"),
        w.Weight("proj", "project/kernel"),
    ]


def perceiver_weights() -> list[w.Weight]:
    """The perceiver under open_flamingo's names, which are RoboVLMs' vision resampler's too."""
    attention, mlp = "layers.{}.0.", "layers.{}.1."
    return [
        w.Weight("latents", "queries"),
        *w.norm(attention + "norm_media", "layers/image_norm"),
        *w.norm(attention + "norm_latents", "layers/latent_norm"),
        w.Weight(attention + "to_q.weight", "layers/attn/q/kernel", "linear"),
        # One matrix of theirs makes keys and values.
        w.Weight(attention + "to_kv.weight", "layers/attn/{k,v}/kernel", "linear"),
        w.Weight(attention + "to_out.weight", "layers/attn/o/kernel", "linear_from_heads"),
        # Their MLP is a Sequential: norm, linear, GELU, linear.
        *w.norm(mlp + "0", "layers/mlp_norm"),
        w.Weight(mlp + "1.weight", "layers/mlp/fc1/kernel", "linear"),
        w.Weight(mlp + "3.weight", "layers/mlp/fc2/kernel", "linear"),
        *w.norm("norm", "norm"),
    ]


def latent_decoder_weights() -> list[w.Weight]:
    """UForm-Gen's pooler, either generation."""
    rows = [
        # Theirs has a batch axis of 1 in front.
        w.Weight("image_latents", "queries", "leading_1"),
        *w.pair("projection", "dense"),
        *w.pair("pooler.linear1", "fc1"),
        *w.pair("pooler.linear2", "fc2"),
    ]
    for i in "123":
        rows += w.norm(f"pooler.norm{i}", f"norm{i}")
    for name, path in (("self_attn", "self_attn"), ("multihead_attn", "cross_attn")):
        rows += w.multihead(f"pooler.{name}", path)
    return rows
