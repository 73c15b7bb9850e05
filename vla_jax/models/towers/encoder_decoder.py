"""Encoder-decoder transformer over image and text tokens, as OFA has it.

Legend: b batch · k image tokens · t prompt columns · m = k + t · n tokens of this call · d width
h heads · c head width · l layers · v vocabulary
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vla_jax.models import sharding
from vla_jax.models.towers import decoder
from vla_jax.models.towers.layers import Dropout, LayerNorm
from vla_jax.models.towers.normformer import (
    EncoderDecoderSpec,
    Layer,
    PlaceScores,
    Scores,
    Shared,
    run,
)
from vla_jax.models.towers.positions import FARTHEST, image_buckets, token_buckets


class Encoded(NamedTuple):
    """What the encoder made of images and prompt.

    Attributes:
        hidden: after the last norm.
        places: normed embeddings of their positions.
        valid: False on padding.
        states: [l + 1, b, m, d], input of every layer and output of the last, if asked for.
    """

    hidden: Float[Array, "b m d"]
    places: Float[Array, "m d"]
    valid: Bool[Array, "b m"]
    states: Any = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Source:
    """`Encoded` as every layer of the decoder attends to it, kept from token to token.

    Attributes:
        keys, values: [l, b, m, h, c].
        places: [m, h, c], keys of the positions.
        valid: bool [b, m].
    """

    keys: Any
    values: Any
    places: Any
    valid: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """What the decoder has written so far, and what it was given; `source` comes first."""

    written: decoder.Cache
    source: Source | None = None


def empty_cache(
    spec: EncoderDecoderSpec, batch: int, slots: int, dtype: Any = jnp.float32
) -> Cache:
    """A cache before the first token."""
    stack = spec.decoder
    shape = (stack.layers, batch, slots, stack.heads, spec.width // stack.heads)
    return Cache(decoder.zeros(shape, dtype))


class Encoder(nn.Module):
    """Reads images and a prompt, each token all others."""

    spec: EncoderDecoderSpec
    remat: str = "full"
    dtype: Any = jnp.float32

    def setup(self):
        s, init = self.spec, self.spec.embedding_init()
        self.types = self.param("types", init, (2, s.width))  # of text, of images
        self.positions = self.param("positions", init, (s.max_positions, s.width))
        shape = (s.image_buckets**2 + 1, s.width)  # the first row is no place
        self.image_positions = self.param("image_positions", init, shape)
        norms = [LayerNorm(s.eps, self.dtype) for _ in range(5)]
        self.text_norm, self.image_norm, self.place_norm, self.image_place_norm, self.norm = norms
        self.scores = PlaceScores(s.encoder.heads, s.width, s.position_scale, self.dtype)
        self.layers = Layer(s, s.encoder, self.dtype)
        self.drop = Dropout(s.dropout)

    def __call__(
        self,
        images: Float[Array, "b k d"],
        seen: Bool[Array, "b k"],
        place: Int[Array, " k"],
        prompt: Float[Array, "b t d"],
        prompt_valid: Bool[Array, "b t"],
        collect: bool = False,
    ) -> Encoded:
        """Image tokens, then text.

        Args:
            images: of all images, one after the other.
            seen: which exist.
            place: which of its image's tokens each is, row by row; -1 if it has no place in one.
            prompt: embedded.
            prompt_valid: False on padding.
            collect: also return the states between the layers.
        """
        s, (k, t) = self.spec, (images.shape[1], prompt.shape[1])
        # A longer text would fail below in a shape error that names no setting.
        _check_length(t, s)
        x = [
            self.drop(norm(sharding.rows(part) * s.embed_scale + kind))
            for norm, part, kind in zip(
                # Types are stored text first, while the sequence has its images first.
                (self.image_norm, self.text_norm),
                (images, prompt),
                self.types[::-1],
                strict=True,
            )
        ]
        valid = jnp.concatenate([seen, prompt_valid], axis=1)
        # fairseq zeroes padding on entry.
        x = jnp.where(valid[..., None], jnp.concatenate(x, axis=1), 0)

        # The table is of the largest grid; smaller images take its upper left corner. Row 0 is "no
        # place".
        at = (place // s.side) * s.image_buckets + place % s.side + 1
        grid = jnp.take(self.image_positions, jnp.where(place < 0, 0, at), axis=0)
        places = jnp.concatenate(
            [self.image_place_norm(grid), self.place_norm(self.positions[:t])], axis=0
        )
        text, image = s.relative
        # Between text and images there is no relative position: this index is past both tables.
        relative = jnp.full((k + t, k + t), text + image)
        relative = relative.at[:k, :k].set(text + image_buckets(place, s.side, s.image_buckets))
        columns = jnp.arange(t)
        relative = relative.at[k:, k:].set(_token_buckets(columns[:, None] - columns, s))
        scores = Scores(valid[:, None], self.scores(places[None], self.scores.keys(places)))
        shared = Shared(scores, relative[None], collect=collect)
        x, out = run(self.layers, x, {}, shared, self.remat)
        states = jnp.concatenate([out["state"], x[None]]) if collect else None
        return Encoded(self.norm(x), places, valid, states)


class Decoder(nn.Module):
    """Writes text, given what an encoder read."""

    spec: EncoderDecoderSpec
    remat: str = "full"
    dtype: Any = jnp.float32

    def setup(self):
        s, init = self.spec, self.spec.embedding_init()
        self.positions = self.param("positions", init, (s.max_positions, s.width))
        norms = [LayerNorm(s.eps, self.dtype) for _ in range(3)]
        self.entry_norm, self.place_norm, self.norm = norms
        heads = s.decoder.heads
        self.scores, self.cross_scores = (
            PlaceScores(heads, s.width, s.position_scale, self.dtype) for _ in range(2)
        )
        self.layers = Layer(s, s.decoder, self.dtype)
        self.drop = Dropout(s.dropout)
        # With these OFA also writes images, as codes. A VLA does not, but a model exports whole.
        shape = (s.image_buckets**2 + 1, s.width)
        self.image_positions = self.param("image_positions", init, shape)
        self.image_place_norm, self.code_norm = LayerNorm(s.eps), LayerNorm(s.eps)

    def __call__(
        self,
        embeds: Float[Array, "b n d"],
        valid: Bool[Array, "b n"],
        encoded: Encoded | None = None,
        cache: Cache | None = None,
        collect: bool = False,
    ) -> decoder.Result:
        """Embeddings -> hidden states; the cache is a `Cache` of this file.

        Args:
            embeds: what is written.
            valid: False on padding.
            encoded: what it is about; with a cache, only the first call gets it.
            cache: what was written before.
            collect: also return the input of every layer and the output of the last.

        Raises:
            ValueError: neither `encoded` nor the cache says what it is about, or there are more
                slots than positions.
        """
        s, (batch, n) = self.spec, valid.shape
        # Both norms are unused otherwise, but an export needs their parameters.
        if self.is_initializing():
            self.image_place_norm(embeds)
            self.code_norm(embeds)
        rows, columns, slot_valid = jnp.arange(batch)[:, None], jnp.arange(n)[None], valid
        per_layer: dict[str, Any] = {}
        if cache is not None:
            columns = cache.written.length[:, None] + columns
            slot_valid = cache.written.valid.at[rows, columns].set(valid)
            per_layer = {"keys": cache.written.keys, "values": cache.written.values}
        if encoded is not None:
            source, source_valid = None, encoded.valid
            places = self.cross_scores.keys(encoded.places)
        elif cache is not None and cache.source is not None:
            source, source_valid, places = cache.source, cache.source.valid, cache.source.places
            per_layer |= {"source_keys": source.keys, "source_values": source.values}
        else:
            raise ValueError("the first tokens of a sequence need what the encoder made")

        slots = jnp.arange(slot_valid.shape[1])
        _check_length(len(slots), s)
        behind = columns[..., None] - slots
        query_places = self.place_norm(jnp.take(self.positions, columns, axis=0))
        # Positions of empty slots are scored too; the mask hides them.
        keys = self.scores.keys(self.place_norm(self.positions[: len(slots)]))
        shared = Shared(
            own=Scores((behind >= 0) & slot_valid[:, None], self.scores(query_places, keys)),
            relative=_token_buckets(behind, s),
            cross=Scores(source_valid[:, None], self.cross_scores(query_places, places)),
            # Once the cache holds its keys, the hidden states of the source are not needed.
            source=None if encoded is None else encoded.hidden,
            slots=None if cache is None else (rows, columns),
            collect=collect,
        )
        x = self.drop(self.entry_norm(embeds * s.embed_scale))
        x, out = run(self.layers, x, per_layer, shared, self.remat)
        states = jnp.concatenate([out["state"], x[None]]) if collect else None
        if cache is not None:
            # Padding on the right takes no slots, so that the next token overwrites it.
            end = cache.written.length + jnp.max(jnp.where(valid, jnp.arange(n) + 1, 0), axis=1)
            written = decoder.Cache(out["keys"], out["values"], slot_valid, end)
            # The first call has made keys and values of the source, which later calls read.
            if source is None:
                source = Source(out["source_keys"], out["source_values"], places, source_valid)
            cache = Cache(written, source)
        return decoder.Result(self.norm(x), states, cache)


class EncoderDecoder(nn.Module):
    """Both towers and the token table they share."""

    spec: EncoderDecoderSpec
    remat: str = "full"
    dtype: Any = jnp.float32

    def setup(self):
        s = self.spec
        self.embedding = self.param("embedding", s.embedding_init(), (s.vocab, s.width))
        self.encoder = Encoder(s, self.remat, self.dtype)
        self.decoder = Decoder(s, self.remat, self.dtype)

    def embed(self, ids: Int[Array, "b n"]) -> Float[Array, "b n d"]:
        """Plain lookup; the towers scale and norm."""
        return jnp.take(self.embedding, ids, axis=0).astype(self.dtype)

    def logits(
        self, hidden: Float[Array, "b n d"], ids: tuple[int, int] | None = None
    ) -> Float[Array, "b n v"]:
        """The decoder's hidden states -> scores; see `decoder.Decoder.logits`."""
        table = self.embedding[slice(*ids)] if ids else self.embedding
        return jnp.einsum("bnd,vd->bnv", hidden, table.astype(self.dtype))


def _token_buckets(distance: Int[Array, "*b n s"], spec: EncoderDecoderSpec) -> Array:
    table = jnp.asarray(token_buckets(spec.token_buckets))
    # Distances are clipped because the table ends at the longest text of the original.
    return table[jnp.clip(distance, -FARTHEST, FARTHEST) + FARTHEST]


def _check_length(columns: int, spec: EncoderDecoderSpec) -> None:
    if columns > spec.max_positions:
        raise ValueError(
            f"{columns} text columns, but the model has {spec.max_positions} positions; lower "
            "model.structure.text_len or data.cotrain.text_len"
        )
