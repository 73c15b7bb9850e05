"""PaliGemma: SigLIP, one linear map, Gemma (google/paligemma-3b-pt-224); `paligemma2` uses it too.

Who sees whom is a choice, `mask`, a key of ours beside those of config.json:

    causal: every token sees itself and those before it. What RoboVLMs trains, transformers 4.44.
    prefix: images and prompt up to the action tokens are a prefix that sees all of itself; action
        tokens, written tokens and the prompt's last column, behind them, see what stands before.
        How PaliGemma was pretrained. Where one sequence holds a window, each step has its own.
    full: every token sees every other. What RoboVLMs does under transformers 4.48.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from jaxtyping import Array, Float, Int

from vla_jax.models import weights as w
from vla_jax.models.backbones.base import Backbone, Layout, LooksAhead, Tokens, merge_arch
from vla_jax.models.image import ImageSpec
from vla_jax.models.towers import vision_families
from vla_jax.models.towers.decoder import Cache, Decoder, bidirectional_mask
from vla_jax.models.towers.decoder_spec import DecoderSpec
from vla_jax.models.towers.layers import Dense
from vla_jax.models.towers.text_families import LANGUAGES
from vla_jax.models.towers.vit import VisionTransformer
from vla_jax.moved import names_of

MASKS = ("causal", "prefix", "full")

# config.json of the released model, reduced to what shapes and numbers depend on.
ARCH: dict[str, Any] = {
    "model_type": "paligemma",
    "mask": "causal",
    # Image tokens are divided by its root, so that Gemma's scale gives them back as they were.
    "hidden_size": 2048,
    "projection_dim": 2048,
    "image_token_index": 257152,  # read by transformers alone, of exported folders
    "vision_config": {
        "hidden_size": 1152,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "intermediate_size": 4304,
        "patch_size": 14,
        "image_size": 224,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
        "attention_dropout": 0.0,
        "vision_use_head": False,
    },
    "text_config": {
        "model_type": "gemma",
        "vocab_size": 257216,
        "hidden_size": 2048,
        "num_hidden_layers": 18,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "intermediate_size": 16384,
        "hidden_activation": None,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_parameters": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "pad_token_id": 0,
        "tie_word_embeddings": True,
    },
}

_BACKWARD = "with mask 'full' tokens see those behind them"


class PaliGemma(Backbone):
    """Legend: b batch · h height = width · q image tokens · n sequence · d text width."""

    RELEASED = ARCH
    DEFAULT_CONFIG = "paligemma_ph"
    FOR_EXPERT = True
    # The prompt begins with <eos> and ends with a line break, of which RoboVLMs makes no more than
    # the columns that images follow and actions precede.
    LAYOUT = Layout(bos=1, eos=1)
    PROMPT = "<eos>{instruction}\n"
    QUESTION = "<bos>Input: {question}\nOutput:<eos>"
    ENDS = ("<bos>", "<eos>")
    # The tokenizer's 257152 pieces less 5 special tokens less 10, as RoboVLMs counts.
    ACTION_TOKEN_END = 257137
    # The pieces less the last 128, which stand for segments; images before <bos>, as pretrained.
    FAST_TOKEN_END = 257024
    ANSWER_LAYOUT = Layout(bos=0, eos=0)
    # Names transformers has given since it keeps the decoder's head outside (4.52).
    RENAMES = (
        # transformers 5 leaves `vision_model` out, with `model.` in front or without.
        (r"(?:model\.)?vision_tower\.(?:vision_model\.)?", "vision_tower.vision_model."),
        (r"model\.multi_modal_projector\.", "multi_modal_projector."),
        (r"model\.language_model\.", "language_model.model."),
        (r"lm_head\.", "language_model.lm_head."),
    )
    # Buffers older dumps contain; they carry nothing.
    IGNORE = (r"embeddings\.position_ids$", r"rotary_emb\.inv_freq$")

    @classmethod
    def arch(cls, overrides: Mapping[str, Any], strict: bool = True) -> dict[str, Any]:
        """The released architecture with `overrides` applied; see `base.merge_arch`.

        Raises:
            ValueError: also for the files of the other generation.
        """
        merged, problems = merge_arch(cls.RELEASED, overrides, strict), []
        between, inside = merged["projection_dim"], merged["text_config"]["hidden_size"]
        if between != inside:
            problems.append(f"projection_dim: {between} is not text_config.hidden_size, {inside}")
        if merged["mask"] not in MASKS:
            problems.append(f"mask: {merged['mask']!r} is none of {list(MASKS)}")
        decoder, ours = (arch["text_config"]["model_type"] for arch in (merged, cls.RELEASED))
        if decoder != ours:
            problems.append(
                f"text_config.model_type: {decoder!r}, expected {ours!r}; backbone 'paligemma' has "
                "'gemma', 'paligemma2' has 'gemma2'"
            )
        if problems:
            raise ValueError("backbone architecture:\n  " + "\n  ".join(problems))
        return merged

    @property
    def looks_ahead(self) -> LooksAhead | None:
        """The setting that lets tokens see those behind them, if the mask does so."""
        if self.config["mask"] != "full":
            return None
        return LooksAhead(_BACKWARD, "mask 'causal' or 'prefix'")

    @property
    def image_spec(self) -> ImageSpec:
        """SigLIP's preprocessing: squash to a square, bicubic, to [-1, 1]."""
        half = (0.5, 0.5, 0.5)
        return ImageSpec(self.config["vision_config"]["image_size"], half, half, "bicubic")

    @property
    def text_spec(self) -> DecoderSpec:
        """Gemma, or Gemma 2 with or without its cap on attention scores."""
        text = self.config["text_config"]
        spec = LANGUAGES[text["model_type"]].spec(text)
        if self.config.get("attention_cap", True):
            return spec
        # sdpa attention, with which RoboVLMs trains, has no cap.
        return dataclasses.replace(spec, block=dataclasses.replace(spec.block, soft_cap=None))

    @property
    def image_tokens(self) -> int:
        """Tokens of one image: its patches."""
        vision = self.config["vision_config"]
        return (vision["image_size"] // vision["patch_size"]) ** 2

    @property
    def padding_id(self) -> int:
        """Id whose embedding no gradient reaches."""
        return self.config["text_config"]["pad_token_id"]

    def setup(self):
        vision = vision_families.siglip(self.config["vision_config"])
        self.vision = VisionTransformer(vision, self.remat, self.dtype)
        self.projection = Dense((self.width,), dtype=self.dtype)
        self.text = Decoder(self.text_spec, self.remat, self.dtype)

    def encode_images(self, images: Float[Array, "b h h 3"]) -> Float[Array, "b q d"]:
        """Preprocessed images -> image tokens."""
        # The decoder multiplies all embeddings by the root of its width.
        tokens = self.vision(images).tokens
        return self.projection(tokens) / math.sqrt(self.config["hidden_size"])

    def __call__(
        self, tokens: Tokens, for_head: bool = False, columns: Int[Array, "b c"] | None = None
    ) -> Float[Array, "b _ d"]:
        """Spliced embeddings -> last hidden states (after the final norm)."""
        mask = bidirectional_mask(tokens.valid) if self.config["mask"] == "full" else None
        return self.text.run(
            tokens.embeds,
            tokens.valid,
            mask=mask,
            prefix=self._prefix(tokens),
            columns=columns,
        ).hidden

    def extend(
        self, tokens: Tokens, cache: Cache, shift: int = 0
    ) -> tuple[Float[Array, "b n d"], Cache]:
        """`__call__` for tokens that follow those in the cache, and the cache with them.

        A step's prefix must come in one call. `shift` is added to the tokens' positions.
        """
        prefix = self._prefix(tokens)
        result = self.text.run(tokens.embeds, tokens.valid, cache=cache, prefix=prefix, shift=shift)
        return result.hidden, result.cache

    def logits(
        self, hidden: Float[Array, "b n d"], ids: tuple[int, int] | None = None
    ) -> Float[Array, "b n v"]:
        """Hidden states -> vocabulary scores; see `Backbone.logits`.

        Raises:
            ValueError: they would have been computed from the tokens they are to predict.
        """
        if self.config["mask"] == "full":
            raise ValueError(f"{_BACKWARD}: none can be predicted; mask 'causal' or 'prefix'")
        return self.text.logits(hidden, ids)

    def _prefix(self, tokens: Tokens) -> Array | None:
        return tokens.given if self.config["mask"] == "prefix" else None

    def weight_map(self) -> list[w.Weight]:
        """Every parameter of the Hugging Face model; targets are relative to `backbone/`."""
        vision = vision_families.siglip(self.config["vision_config"])
        language = LANGUAGES[self.config["text_config"]["model_type"]]
        return [
            *vision_families.hugging_face_weights(vision, "vision_tower.vision_model.", "vision/"),
            *w.pair("multi_modal_projector.linear", "projection"),
            *w.prefixed(language.weights(self.text_spec), "language_model.", "text/"),
        ]


__getattr__ = names_of(__name__)
