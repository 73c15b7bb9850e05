"""The base class of the backbones, and the helpers they share.

Legend: b batch · h, x image height and width · n sequence · k image tokens · t prompt columns
d hidden width · e token width (`token_width`; of "crossed" images another than the sequence's)
v vocabulary
"""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vla_jax.models import weights as w
from vla_jax.models.image import ImageSpec
from vla_jax.models.towers import decoder


@dataclass(frozen=True)
class Layout:
    """Where images and actions enter the prompt.

    Attributes:
        bos: text columns before the images (1 if the tokenizer has a start token, else 0; more
            where a chat begins with several).
        eos: text columns after the action tokens (1 if it has an end token, else 0).
        images: "spliced", they stand in the sequence; "crossed", it attends to them from between
            its layers; "encoded", an encoder reads them and the prompt, and the sequence is what
            the decoder writes after the prompt's first column.
    """

    bos: int
    eos: int
    images: str = "spliced"


class LooksAhead(NamedTuple):
    """A setting that shows tokens those behind them, so that none can be predicted.

    Attributes:
        what: the setting that does it, as the beginning of a sentence.
        remedy: what to set instead.
    """

    what: str
    remedy: str


class Tokens(NamedTuple):
    """The input of a VLM.

    Attributes:
        embeds: the sequence, of `encode_images` and `embed_text`.
        valid: False on padding.
        place: which of its image's tokens (0, 1, ...) a column is; -1 for text and all else.
        images: tokens that are not in the sequence ("crossed", "encoded"); of `extend`, only the
            first call for a sequence gets them.
        seen: which of them exist.
        prompt: the text an encoder reads ("encoded"), like `images`.
        prompt_valid: False on its padding.
        image_place: `place` of the images ("encoded"), the same in all rows.
        given: True on images and prompt up to the action tokens, False on those, on what is written
            and on what stands behind: the prefix of a prefix-LM. None: nothing of it is prefix.
    """

    embeds: Float[Array, "b n e"]
    valid: Bool[Array, "b n"]
    place: Int[Array, "b n"]
    images: Float[Array, "b k e"] | None = None
    seen: Bool[Array, "b k"] | None = None
    prompt: Float[Array, "b t e"] | None = None
    prompt_valid: Bool[Array, "b t"] | None = None
    image_place: Int[Array, " k"] | None = None
    given: Bool[Array, "b n"] | None = None


class Backbone(nn.Module):
    """Base class of the backbones; one is a subclass in its own file and a line in `BACKBONES`.

    A pretrained VLM in two views: what can be said of it from its architecture alone (the
    properties and weight maps of `Backbone(config)`), and the Linen module. The methods here suit a
    decoder that is one `towers.decoder.Decoder`, made in `setup` as `self.text` from `text_spec`;
    others override them.

    Attributes:
        config: the complete architecture, as `arch` gives it.
        remat: which activations the towers keep, see `towers.block.remat`.
        dtype: type of the computation.
        RELEASED: config.json of the released model, reduced to what shapes and numbers depend on.
        DEFAULT_CONFIG: the shipped config a VLM of this kind is trained with, without ".py".
        LAYOUT: where images and actions enter the prompt.
        ORIGINAL_LAYOUT: where RoboVLMs puts them, if elsewhere.
        PROMPT: template of the text, with {instruction}.
        QUESTION: how it is asked a {question} that it answers in tokens.
        ENDS: what captions begin and end with, in which case the tokenizer adds nothing to any
            text, and PROMPT and QUESTION spell out all they need.
        ADDED_TOKENS: special tokens its tokenizer gets if it lacks them, in the order of their ids.
        MARKS: how many of an image's tokens, on either side, are no part of it; no resampler sees
            them.
        ACTION_TOKEN_END: first id above those that may stand for actions; None if all ids may.
        FAST_TOKEN_END: first id above those that may stand for FAST tokens; None if all ids may.
        ANSWER_LAYOUT: where images and written FAST tokens enter, if elsewhere.
        IGNORE: regexes of names in checkpoints that carry nothing.
        RENAMES: (pattern, replacement) pairs that turn names other versions of transformers write
            into those of the weight map.
        PARTS: further files of weights in its Hugging Face folder; they come before the model's
            own.
        SIZES_FROM_WEIGHTS: whether `from_shapes` reads sizes that its config.json leaves out.
        ROBOVLMS_ROOT: what stands before the names of `robovlms_map`.
        FRESH: regexes of parameters that a pretrained checkpoint may lack, which then start anew.
        FOR_EXPERT: whether it has `read_prefix`, which gives an expert keys and values: the decoder
            of `text_spec` has rotary positions and no local layers.
    """

    config: Any
    remat: str = "full"
    dtype: Any = jnp.float32

    # ClassVar keeps Linen from taking these for fields of the module.
    RELEASED: ClassVar[dict[str, Any]] = {}
    DEFAULT_CONFIG: ClassVar[str] = ""
    LAYOUT: ClassVar[Layout] = Layout(bos=1, eos=0)
    ORIGINAL_LAYOUT: ClassVar[Layout | None] = None
    PROMPT: ClassVar[str] = "{instruction}"
    QUESTION: ClassVar[str] = "Input: {question}\nOutput:"
    ENDS: ClassVar[tuple[str, str]] = ("", "")
    ADDED_TOKENS: ClassVar[tuple[str, ...]] = ()
    MARKS: ClassVar[int] = 0
    ACTION_TOKEN_END: ClassVar[int | None] = None
    FAST_TOKEN_END: ClassVar[int | None] = None
    ANSWER_LAYOUT: ClassVar[Layout | None] = None
    IGNORE: ClassVar[tuple[str, ...]] = ()
    RENAMES: ClassVar[tuple[tuple[str, str], ...]] = ()
    PARTS: ClassVar[tuple[str, ...]] = ()
    SIZES_FROM_WEIGHTS: ClassVar[bool] = False
    ROBOVLMS_ROOT: ClassVar[str] = "backbone."
    FRESH: ClassVar[tuple[str, ...]] = ()
    FOR_EXPERT: ClassVar[bool] = False

    @classmethod
    def arch(cls, overrides: Mapping[str, Any], strict: bool = True) -> dict[str, Any]:
        """The released architecture with `overrides` applied.

        Args:
            overrides: see `merge_arch`.
            strict: see `merge_arch`.

        Raises:
            ValueError: as `merge_arch`; of some backbones also for sizes that do not go together.
        """
        return merge_arch(cls.RELEASED, overrides, strict)

    @classmethod
    def prompt_form(cls, arch: Mapping[str, Any]) -> str:
        """Name of the form of the prompt where a template does not do; "" where it does."""
        del arch
        return ""

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """The sizes that follow from the shapes of the weights, by their names in the weight map.

        Returns:
            Part of an architecture; {} if the weights are not of this backbone.
        """
        # Only backbones with SIZES_FROM_WEIGHTS look at them.
        del shapes
        return {}

    @property
    def image_spec(self) -> ImageSpec:
        """The preprocessing of the tower's images."""
        raise NotImplementedError

    @property
    def image_tokens(self) -> int:
        """Tokens of one image, its marks included."""
        raise NotImplementedError

    @property
    def width(self) -> int:
        """Width of the hidden states the structure works on."""
        return self.config["text_config"]["hidden_size"]

    @property
    def token_width(self) -> int:
        """Width of the tokens that go in."""
        return self.width

    @property
    def vocab_size(self) -> int:
        """Ids the decoder knows."""
        return self.config["text_config"]["vocab_size"]

    @property
    def token_end(self) -> int:
        """First id above those that may stand for actions, from the top of the vocabulary."""
        # A small vocabulary, as tests have, may end below the released model's bound.
        return min(self.ACTION_TOKEN_END or self.vocab_size, self.vocab_size)

    @property
    def fast_token_end(self) -> int:
        """First id above those that may stand for FAST tokens, likewise."""
        return min(self.FAST_TOKEN_END or self.vocab_size, self.vocab_size)

    @property
    def text_spec(self) -> Any:
        """The decoder's sizes."""
        raise NotImplementedError

    @property
    def padding_id(self) -> int | None:
        """Id whose embedding no gradient reaches, as torch's padding_idx has it."""
        return None

    @property
    def follows_language(self) -> bool:
        """Whether `encode_images` takes the instruction too, as a vector [b, d] of each image."""
        return False

    @property
    def looks_ahead(self) -> LooksAhead | None:
        """The setting that lets tokens see those behind them; None if there is none."""
        return None

    def weight_map(self) -> list[w.Weight]:
        """Every parameter of the released model; targets are relative to `backbone/`."""
        raise NotImplementedError

    def robovlms_map(self) -> list[w.Weight]:
        """The same for RoboVLMs' checkpoints, where their names differ."""
        return self.weight_map()

    def encode_images(self, images: Float[Array, "b h x 3"]) -> Float[Array, "b k e"]:
        """Preprocessed images -> image tokens."""
        raise NotImplementedError

    def embed_text(self, ids: Int[Array, "b n"]) -> Float[Array, "b n e"]:
        """Token ids -> embeddings."""
        x = self.text.embed(ids)
        if self.padding_id is None:
            return x
        # torch's padding_idx stops the gradient of that row; its value still counts.
        return jnp.where((ids == self.padding_id)[..., None], jax.lax.stop_gradient(x), x)

    def __call__(
        self, tokens: Tokens, for_head: bool = False, columns: Int[Array, "b c"] | None = None
    ) -> Float[Array, "b _ d"]:
        """Spliced embeddings -> last hidden states.

        Args:
            tokens: the sequence.
            for_head: the states that heads read, where these are others than `logits` takes.
            columns: the tokens whose states are wanted; None = all. The work of the last layer that
                only the others would need is spared.
        """
        return self.text.run(tokens.embeds, tokens.valid, columns=columns).hidden

    def logits(
        self, hidden: Float[Array, "b n d"], ids: tuple[int, int] | None = None
    ) -> Float[Array, "b n v"]:
        """Hidden states -> vocabulary scores.

        Args:
            hidden: of `__call__` or `extend`.
            ids: score only those from the first up to the second.
        """
        return self.text.logits(hidden, ids)

    def empty_cache(self, batch: int, slots: int) -> Any:
        """The cache before the first token of a sequence of at most `slots`."""
        return decoder.empty_cache(self.text_spec, batch, slots, self.dtype)

    def read_prefix(
        self,
        embeds: Float[Array, "b n d"],
        valid: Bool[Array, "b n"],
        mask: Bool[Array, "b n n"],
        columns: Int[Array, "b c"] | None = None,
    ) -> Any:
        """A prefix -> a decoder's `Result` with the keys and values of all layers, for an expert.

        Args:
            embeds: of `encode_images` and `embed_text`.
            valid: False on padding, which positions do not count.
            mask: which token sees which.
            columns: whose hidden states are wanted, as in `__call__`.
        """
        # Positions count valid columns only, so that padding in between leaves no gap.
        positions = jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1
        return self.text.run(embeds, valid, positions, mask, export=True, columns=columns)

    def extend(
        self, tokens: Tokens, cache: Any, shift: int = 0
    ) -> tuple[Float[Array, "b n d"], Any]:
        """`__call__` for tokens that follow those in the cache, and the cache with them.

        `shift` is added to their positions.
        """
        result = self.text.run(tokens.embeds, tokens.valid, cache=cache, shift=shift)
        return result.hidden, result.cache


def merge_arch(
    base: Mapping[str, Any], overrides: Mapping[str, Any], strict: bool
) -> dict[str, Any]:
    """`base` with the values of `overrides`.

    Args:
        base: every key the backbone reads, with the released model's values.
        overrides: same nesting; a whole config.json or a user's changes.
        strict: refuse keys `base` lacks. Off for a config.json, which carries many keys that
            neither shapes nor numbers depend on.

    Raises:
        ValueError: listing every unknown key, wrong nesting and a foreign model_type.
    """
    # All problems are collected, so that a config is repaired in one round.
    problems: list[str] = []
    merged = _merge(base, overrides, "", strict, problems)
    if problems:
        raise ValueError("backbone architecture:\n  " + "\n  ".join(problems))
    return merged


def count_layers(names: Iterable[str], prefix: str) -> int:
    """Layers among the names `<prefix>0.…`, `<prefix>1.…`, ...

    Raises:
        ValueError: there is none.
    """
    numbers = {name[len(prefix) :].split(".")[0] for name in names if name.startswith(prefix)}
    # Layers are numbered from 0, and their names come in any order.
    return 1 + max(int(number) for number in numbers)


def _merge(
    base: Mapping[str, Any],
    overrides: Mapping[str, Any],
    path: str,
    strict: bool,
    problems: list[str],
) -> dict[str, Any]:
    # The groups are copied because the released architectures are module constants.
    merged = {k: dict(v) if isinstance(v, Mapping) else v for k, v in base.items()}
    for key, value in overrides.items():
        if key not in base:
            if strict:
                near = difflib.get_close_matches(key, base, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]!r}?" if near else f"legal keys: {sorted(base)}"
                problems.append(f"{path}{key}: unknown key; {hint}")
        elif isinstance(base[key], Mapping):
            if isinstance(value, Mapping):
                merged[key] = _merge(base[key], value, f"{path}{key}.", strict, problems)
            else:
                problems.append(f"{path}{key}: expected a group of keys, not {value!r}")
        # Groups have a model_type of their own, which the backbone's `arch` judges.
        elif key == "model_type" and not path and value != base[key]:
            problems.append(f"model_type: the files are of {value!r}, expected {base[key]!r}")
        else:
            merged[key] = value
    return merged
