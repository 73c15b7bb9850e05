"""How history and action meet the VLM: what one sequence holds, and which columns are read.

Legend: b batch · w window · r sequences (b or b w) · t text columns · k tokens before the text
m tokens after it · n sequence · c columns read, or width of images · d width
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vla_jax.config import ModelConfig, StructureConfig
from vla_jax.models.backbones.base import Layout, Tokens
from vla_jax.types import Observation


class Sequence(NamedTuple):
    """Input of the VLM and what is read of its output.

    Attributes:
        tokens: of r sequences.
        columns: whose hidden states are the features.
        read: False where a column holds padding and must not count.
    """

    tokens: Tokens
    columns: Int[Array, "r c"]
    read: Bool[Array, "r c"]


def is_padded(config: ModelConfig) -> bool:
    """Whether actions stand where RoboVLMs puts them, behind the padded prompt."""
    return config.structure.parity.act_insert == "padded_column"


def step_mask(observation: Observation) -> Bool[Array, "b w"]:
    """True where at least one camera has a real frame."""
    masks = list(observation.image_mask.values())
    return jnp.stack(masks).any(axis=0)


def places(config: StructureConfig, k: int) -> Int[Array, " k"]:
    """`Tokens.place` of the k tokens of a step."""
    # The state, if any, is the last of a step's tokens and belongs to no image.
    images = k - int(config.proprio > 0)
    # Places start anew in each camera's image.
    each = jnp.arange(images) % (images // len(config.cameras))
    # What a resampler makes of an image has no place in it.
    place = jnp.full(images, -1) if config.resampler else each
    return jnp.append(place, jnp.full(k - images, -1))


def splice(
    text: Float[Array, "r t d"],
    mask: Bool[Array, "r t"],
    images: Float[Array, "r k c"],
    visible: Bool[Array, "r k"],
    place: Int[Array, "r k"],
    inserted: Float[Array, "r m d"],
    layout: Layout,
    padded: bool,
) -> tuple[Tokens, Int[Array, "r 1"]]:
    """`<s> · images · instruction · inserted · </s>`, n = t + k + m.

    Where the layout keeps the images out of the sequence, k = 0 in it; where it also keeps the
    prompt out, the sequence is `<s> · inserted`.

    Args:
        text: embedded prompt, padded on the right.
        mask: its real columns.
        images: go behind the prompt's first `layout.bos` columns; of any width where the layout
            keeps them out.
        visible: which of them may be attended to.
        place: see `Tokens`.
        inserted: go before the prompt's last `layout.eos` columns.
        layout: of the backbone's tokenizer.
        padded: take the last columns of the padded prompt, as the original does, instead of the
            last real ones.

    Returns:
        The sequences and the column of the first inserted token.
    """
    (rows, t), m, start = mask.shape, inserted.shape[1], layout.bos
    if layout.images == "encoded":
        # The encoder reads images and prompt; the decoder starts with `<s>` alone.
        embeds = jnp.concatenate([text[:, :1], inserted], axis=1)
        valid = jnp.ones(embeds.shape[:2], bool)
        none = jnp.full(valid.shape, -1)
        tokens = Tokens(embeds, valid, none, images, visible, text, mask, place[0])
        return tokens, jnp.ones((rows, 1), int)
    # Padded prompts all end at the same column, whatever the length of their text.
    length = jnp.full((rows, 1), t) if padded else mask.sum(axis=1, keepdims=True)
    first = length - layout.eos
    is_given = jnp.arange(t + m) < first
    if m:
        # Column j comes from text j before the inserted, from text j - m after them; the inserted
        # themselves stand behind the text in the source, at t, t + 1, ...
        j = jnp.arange(t + m)[None]
        source = jnp.where(j < first, j, jnp.where(j < first + m, t + j - first, j - m))
        text = take(jnp.concatenate([text, inserted], axis=1), source)
        mask = jnp.concatenate([mask, jnp.ones((rows, m), bool)], axis=1)
        mask = jnp.take_along_axis(mask, source, axis=1)
    none = jnp.full(mask.shape, -1)
    if layout.images == "crossed":
        return Tokens(text, mask, none, images, visible), first
    # Images are always given, never predicted.
    image_given = jnp.ones(visible.shape, bool)
    embeds, valid, place, is_given = (
        jnp.concatenate([around[:, :start], inner, around[:, start:]], axis=1)
        for around, inner in (
            (text, images),
            (mask, visible),
            (none, place),
            (is_given, image_given),
        )
    )
    return Tokens(embeds, valid, place, given=is_given), first + images.shape[1]


def shortened(sequence: Sequence, layout: Layout) -> Sequence:
    """The same without the last columns: end tokens behind the action tokens, or padding.

    Nothing before them sees them, so no feature depends on them but by rounding. The layers have
    less to do, and lengths become rounder: 160 instead of 161 in Kosmos-2 with two cameras. Only
    in the steps that run on a mesh: what is served stays equal to the last digit.
    """
    written = layout.images == "encoded"  # ... which has no end token
    if not layout.eos or written or jax.sharding.get_abstract_mesh().empty:
        return sequence
    tokens, cut = sequence.tokens, slice(None, -layout.eos)
    is_given = None if tokens.given is None else tokens.given[:, cut]
    embeds, valid, place = (x[:, cut] for x in (tokens.embeds, tokens.valid, tokens.place))
    tokens = tokens._replace(embeds=embeds, valid=valid, place=place, given=is_given)
    return sequence._replace(tokens=tokens)


def widen(x: Float[Array, "*b d"], width: int) -> Float[Array, "*b e"]:
    """Tokens of the hidden width -> the token width of backbones whose images carry more."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])])


def last_tokens(text: Int[Array, "r t"], mask: Bool[Array, "r t"], count: int) -> Int[Array, "r c"]:
    """The last real token of every prompt, which stands behind what is inserted; c is 1 or 0."""
    # The real prompt ends with the tokenizer's end tokens; behind them is padding.
    at = mask.sum(axis=1, keepdims=True) - count
    return jnp.take_along_axis(text, at, axis=1)[:, :count]


def take(x: Float[Array, "r n d"], columns: Int[Array, "r c"]) -> Float[Array, "r c d"]:
    """Some columns of every sequence."""
    return jnp.take_along_axis(x, columns[..., None], axis=1)


def columns_of(
    readout: str, valid: Bool[Array, "r n"], first: Int[Array, "r 1"], k: int, layout: Layout
) -> tuple[Int[Array, "r c"], Bool[Array, "r c"]]:
    """Columns of a sequence's own tokens, nothing inserted.

    Args:
        readout: text (without `<s>` and `</s>`), vision, all.
        valid: of `splice`.
        first: of `splice`; with nothing inserted, the column of `</s>`.
        k: tokens before the text.
        layout: of the backbone's tokenizer.

    Returns:
        Columns, and which of them hold a token.
    """
    rows, n = valid.shape
    # The sequence is `<s> · images · text · </s>`, and the images shift the text by k.
    spans = {"text": (layout.bos + k, n - layout.eos), "vision": (layout.bos, layout.bos + k)}
    begin, end = spans.get(readout, (0, n))
    columns = jnp.broadcast_to(jnp.arange(begin, end), (rows, end - begin))
    read = valid[:, begin:end]
    # In shorter prompts `</s>` stands before the last column of the span and is no text.
    return columns, read & (columns < first) if readout == "text" else read


def read_count(readout: str, t: int, k: int, layout: Layout) -> int:
    """Columns of a step that `columns_of` names."""
    return {"text": t - layout.bos - layout.eos, "vision": k}.get(readout, t + k)


def join(steps: Sequence, keep: Bool[Array, "b w"], padded: bool) -> Sequence:
    """The sequences of a window, one after another, as one.

    Columns that are left out are moved behind all others, where causal attention does not reach:
    positions count what the window holds, however many steps or pads stand before it.

    Args:
        steps: r = b w sequences, batch-major.
        keep: steps that exist; the rest is left out.
        padded: keep the steps' padding in place, as the original does.
    """
    (b, w), (_, n, d) = keep.shape, steps.tokens.embeds.shape
    valid = steps.tokens.valid.reshape(b, w, n) & keep[..., None]
    stays = jnp.broadcast_to(keep[..., None], valid.shape) if padded else valid
    stays, valid = stays.reshape(b, w * n), valid.reshape(b, w * n)
    # Columns of a step become columns of the window before anything is moved.
    columns = steps.columns.reshape(b, w, -1) + n * jnp.arange(w)[:, None]
    # Stable, so that columns that stay keep their order in time.
    order = jnp.argsort(~stays, axis=1, stable=True)
    place = jnp.argsort(order, axis=1)  # old column -> new column

    def moved(x: Array) -> Array:
        return jnp.take_along_axis(x.reshape(b, w * n), order, axis=1)

    is_given = steps.tokens.given
    tokens = Tokens(
        embeds=take(steps.tokens.embeds.reshape(b, w * n, d), order),
        valid=moved(valid),
        place=moved(steps.tokens.place),
        given=None if is_given is None else moved(is_given),
    )
    return Sequence(
        tokens,
        columns=jnp.take_along_axis(place, columns.reshape(b, -1), axis=1),
        read=steps.read.reshape(b, -1),
    )
