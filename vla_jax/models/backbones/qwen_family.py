"""What Qwen2-VL, Qwen2.5-VL and Qwen3-VL share: images of any grid, positions in three rows.

Legend: b batch · h, x image height and width · q tokens of an image, its two marks included
n sequence · d text width · e token width: d, and as much again for each of the j layers that get
deep features
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vla_jax.models import weights as w
from vla_jax.models.backbones.base import Backbone, Layout, Tokens, merge_arch
from vla_jax.models.image import ImageSpec
from vla_jax.models.towers import vision_families
from vla_jax.models.towers.decoder import Cache, Decoder, Result, empty_cache
from vla_jax.models.towers.decoder_spec import DecoderSpec
from vla_jax.models.towers.positions import Grid
from vla_jax.models.towers.text_families import LANGUAGES
from vla_jax.models.towers.vit import VisionSpec, VisionTransformer

_USER, _ASSISTANT = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
# With it as `data.cotrain.prompt` a text with one answer is a chat too.
ASKED = "{question}" + _ASSISTANT

# model_type -> (tower, family of the language model)
_PARTS = {
    "qwen2_vl": (vision_families.qwen2_vl, "qwen2"),
    "qwen2_5_vl": (vision_families.qwen2_5_vl, "qwen2"),
    "qwen3_vl": (vision_families.qwen3_vl, "qwen3"),
}


def _of_today(raw_config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json as transformers 5 nests it.

    Before 4.52 the text's keys stood at the top; before 5 the rotation was `rope_scaling` and
    `rope_theta`, and `tie_word_embeddings` could stand in either place. Left out it is false.
    """
    text = dict(raw_config.get("text_config") or raw_config)
    rope = dict(text.get("rope_parameters") or text.get("rope_scaling") or {})
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    if "rope_theta" in text:
        rope.setdefault("rope_theta", text["rope_theta"])
    tied = bool(raw_config.get("tie_word_embeddings") or text.get("tie_word_embeddings"))
    text["rope_parameters"] = rope
    return {**raw_config, "text_config": text, "tie_word_embeddings": tied}


def vision_spec(config: Mapping[str, Any], grid: Grid) -> VisionSpec:
    """Sizes of the image tower for an image of `grid` patches."""
    return _PARTS[config["model_type"]][0](config["vision_config"], grid)


def _merged(config: Mapping[str, Any]) -> Grid:
    """Rows and columns of tokens of an image of the configured size."""
    vision = config["vision_config"]
    # The originals keep an image's shape, and so have grids of any; a compiled step has one.
    side = config["image_size"] // (vision["patch_size"] * vision["spatial_merge_size"])
    return side, side


def positions(
    valid: Bool[Array, "b n"],
    place: Int[Array, "b n"],
    grid: tuple[Any, Any],
    start: Int[Array, " b"] | int = 0,
) -> tuple[Int[Array, "3 b n"], Int[Array, " b"]]:
    """M-RoPE: time, row and column of every token.

    A text token has three equal positions and takes one; the marks of an image are text to this.
    An image stands at a single moment, the next free position: its tokens add their row and
    column of the merged grid, and the text behind it goes on at the image's larger side. Padding
    takes nothing. This is `get_rope_index` of Hugging Face's models for images, which finds the
    images by their ids; here `place` says where they are, so it holds for several in a sequence,
    for windows and for whatever stands between.

    Args:
        valid: False on padding.
        place: see `Tokens`; 0 is the image's first mark, 1 its first patch.
        grid: rows and columns of tokens of the image that a column belongs to: two numbers, or
            two arrays [b, n] where images differ.
        start: position of the first token.

    Returns:
        The positions, and the one that comes next.
    """
    rows, columns = grid
    patch, count = place - 1, rows * columns
    # The marks fall out on both sides: the first is patch -1, the last is `count`.
    inside = (patch >= 0) & (patch < count)
    # All that an image takes is booked on its last patch.
    image = jnp.where(patch == count - 1, jnp.maximum(rows, columns), 0)
    takes = jnp.where(valid, jnp.where(inside, image, 1), 0)
    # The sum excludes the token itself: it stands where all before it ends.
    before = jnp.asarray(start)[..., None] + jnp.cumsum(takes, axis=1) - takes
    offsets = jnp.stack([jnp.zeros_like(patch), patch // columns, patch % columns])
    return before + jnp.where(inside, offsets, 0), start + takes.sum(axis=1)


class Memory(NamedTuple):
    """The state that `extend` goes on from.

    Attributes:
        cache: of the decoder.
        position: of the next token.
    """

    cache: Cache
    position: Int[Array, " b"]


class Vision(nn.Module):
    """Tower and mergers, for images of any number of whole squares of patches."""

    config: Any
    remat: str = "full"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "b *f h x 3"]) -> Float[Array, "b _ e"]:
        """Preprocessed images -> a token for each square, row by row."""
        vision = self.config["vision_config"]
        grid = tuple(side // vision["patch_size"] for side in images.shape[-3:-1])
        spec = vision_spec(self.config, grid)
        tower = VisionTransformer(spec, self.remat, self.dtype, name="tower")
        tokens, taps = tower(images)
        merger = vision_families.qwen2_merger(spec, vision, dtype=self.dtype, name="merger")
        merged = [merger(tokens)]
        for i, tap in enumerate(taps):
            merger = vision_families.qwen2_merger(spec, vision, True, self.dtype, f"deep_{i}")
            merged.append(merger(tap))
        # Deep features travel behind the embedding, as `Tokens` has no field for them.
        return jnp.concatenate(merged, axis=-1)


class QwenFamily(Backbone):
    """The base of the three models; the config says which one it is.

    `grid` of the methods: see `positions`; by default that of images of the configured size.
    """

    # The models' chat without its default system text: the images stand behind the user's three
    # first tokens, action tokens where the assistant would speak.
    LAYOUT = Layout(bos=3, eos=0)
    PROMPT, QUESTION = (_USER + slot + _ASSISTANT for slot in ("{instruction}", "{question}"))
    ENDS = (_USER, "<|im_end|>")
    # <|endoftext|>, the first of the special tokens, behind the rarest words.
    ACTION_TOKEN_END = 151643
    # Buffers older dumps contain; they carry nothing.
    IGNORE = (r"rotary(_pos)?_emb\.inv_freq$",)
    # As current transformers names things; the released files of the first two have earlier names.
    RENAMES = ((r"model\.visual\.", "visual."), (r"model\.language_model\.", "model."))

    @classmethod
    def arch(cls, overrides: Mapping[str, Any], strict: bool = True) -> dict[str, Any]:
        """`RELEASED` with `overrides`, which may be a config.json of any version of transformers.

        Raises:
            ValueError: listing all that is wrong with the keys, or sizes that do not go together.
        """
        config = merge_arch(cls.RELEASED, overrides if strict else _of_today(overrides), strict)
        vision, text, problems = config["vision_config"], config["text_config"], []
        square = vision["patch_size"] * vision["spatial_merge_size"]
        if config["image_size"] <= 0 or config["image_size"] % square:
            problems.append(
                f"image_size: {config['image_size']} pixels are no multiple of {square}, "
                "patch_size x spatial_merge_size"
            )
        # In Qwen2-VL's config hidden_size is the merger's width; the later ones renamed it.
        key = "out_hidden_size" if "out_hidden_size" in vision else "hidden_size"
        if vision[key] != text["hidden_size"]:
            problems.append(
                f"vision_config.{key}: {vision[key]} is not the text's hidden_size, "
                f"{text['hidden_size']}"
            )
        for name in ("vision_start_token_id", "vision_end_token_id"):
            if config[name] >= text["vocab_size"]:
                problems.append(f"{name}: {config[name]} is beyond the {text['vocab_size']} ids")
        if problems:
            raise ValueError("backbone architecture:\n  " + "\n  ".join(problems))
        return config

    @property
    def image_spec(self) -> ImageSpec:
        """Squash to a square, bicubic, CLIP mean and deviation."""
        return ImageSpec.clip(self.config["image_size"])

    def weight_map(self) -> list[w.Weight]:
        """Every parameter of the Hugging Face model; targets are relative to `backbone/`."""
        return self.rows(visual="visual.", model="model.")

    @property
    def token_width(self) -> int:
        """Width of the tokens that go in: deep features stand behind the embedding."""
        deep = self.config["vision_config"].get("deepstack_visual_indexes", ())
        return self.width * (1 + len(deep))

    @property
    def image_tokens(self) -> int:
        """Tokens of one image, <|vision_start|> and <|vision_end|> included."""
        rows, columns = _merged(self.config)
        return rows * columns + 2

    @property
    def text_spec(self) -> DecoderSpec:
        """Sizes of the language model."""
        tied = {"tie_word_embeddings": self.config["tie_word_embeddings"]}
        return self._language.spec({**self.config["text_config"], **tied})

    @property
    def _language(self) -> Any:
        return LANGUAGES[_PARTS[self.config["model_type"]][1]]

    def setup(self):
        self.vision = Vision(self.config, self.remat, self.dtype)
        self.text = Decoder(self.text_spec, self.remat, self.dtype)

    def encode_images(self, images: Float[Array, "b *f h x 3"]) -> Float[Array, "b q e"]:
        """Preprocessed images -> <|vision_start|>, the image's tokens, <|vision_end|>.

        A still image stands for all the frames [b, f, h, x, 3] of a token.
        """
        tokens = self.vision(images)
        marks = [self.config[f"vision_{side}_token_id"] for side in ("start", "end")]
        marks = self.embed_text(jnp.broadcast_to(jnp.array(marks), (len(tokens), 2)))
        return jnp.concatenate([marks[:, :1], tokens, marks[:, 1:]], axis=1)

    def embed_text(self, ids: Int[Array, "b n"]) -> Float[Array, "b n e"]:
        """Token ids -> embeddings, without deep features."""
        deep = self.token_width - self.width
        # Zeros, because the decoder adds deep features to its hidden states.
        return jnp.pad(self.text.embed(ids), ((0, 0), (0, 0), (0, deep)))

    def __call__(
        self,
        tokens: Tokens,
        for_head: bool = False,
        columns: Int[Array, "b c"] | None = None,
        grid: Any = None,
    ) -> Float[Array, "b _ d"]:
        """Spliced embeddings -> last hidden states (after the final norm)."""
        return self._run(tokens, grid, 0, None, columns)[0].hidden

    def empty_cache(self, batch: int, slots: int) -> Memory:
        """The cache before the first token of a sequence of at most `slots`."""
        cache = empty_cache(self.text_spec, batch, slots, self.dtype)
        return Memory(cache, jnp.zeros(batch, jnp.int32))

    def extend(
        self, tokens: Tokens, cache: Memory, grid: Any = None
    ) -> tuple[Float[Array, "b n d"], Memory]:
        """`__call__` for tokens that follow those in the cache, and the cache with them."""
        result, following = self._run(tokens, grid, cache.position, cache.cache)
        return result.hidden, Memory(result.cache, following)

    def _run(
        self,
        tokens: Tokens,
        grid: Any,
        start: Any,
        cache: Cache | None,
        columns: Int[Array, "b c"] | None = None,
    ) -> tuple[Result, Any]:
        d, e = self.width, self.token_width
        rows, following = positions(tokens.valid, tokens.place, grid or _merged(self.config), start)
        deep = None
        if e > d:
            # Where `encode_images` has put them; text and marks have zeros there.
            deep = jnp.stack(jnp.split(tokens.embeds[..., d:], e // d - 1, axis=-1))
        embeds = tokens.embeds[..., :d]
        run = functools.partial(self.text.run, deep=deep, cache=cache, columns=columns)
        result = run(embeds, tokens.valid, rows)
        return result, following

    def rows(self, visual: str, model: str) -> list[w.Weight]:
        """Every parameter; targets are relative to `backbone/`.

        Args:
            visual: prefix of the tower's names.
            model: what the language model's names have for their first `model.`.
        """
        spec = vision_spec(self.config, _merged(self.config))
        merger = vision_families.qwen2_merger_weights(spec)
        rows = w.prefixed(vision_families.qwen2_weights(spec, "", ""), "", "tower/")
        rows += w.prefixed(merger, "merger.", "merger/")
        for i in range(len(spec.taps)):
            rows += w.prefixed(merger, f"deepstack_merger_list.{i}.", f"deep_{i}/")
        language = self._language.weights(self.text_spec)
        return [
            *w.prefixed(rows, visual, "vision/"),
            *w.prefixed(w.moved(language, "model.", model), "", "text/"),
        ]
