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

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vla_jax.config import StructureConfig
from vla_jax.models import weights as w
from vla_jax.models.backbones.base import Layout, Tokens, merge_arch
from vla_jax.models.image import ImageSpec
from vla_jax.models.towers import vision_families
from vla_jax.models.towers.decoder import Cache, Decoder, bidirectional_mask, empty_cache
from vla_jax.models.towers.decoder_spec import DecoderSpec
from vla_jax.models.towers.layers import Dense
from vla_jax.models.towers.text_families import LANGUAGES
from vla_jax.models.towers.vit import VisionTransformer

DEFAULT_CONFIG = "paligemma_ph"

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

# The prompt begins with <eos> and ends with a line break, of which RoboVLMs makes no more than the
# columns that images follow and actions precede.
LAYOUT = Layout(bos=1, eos=1)
PROMPT = "<eos>{instruction}\n"
QUESTION = "<bos>Input: {question}\nOutput:<eos>"
ENDS = ("<bos>", "<eos>")
# The tokenizer's 257152 pieces less 5 special tokens less 10, as RoboVLMs counts.
ACTION_TOKEN_END = 257137
_BACKWARD = "with mask 'full' tokens see those behind them"


def arch(overrides: Mapping[str, Any], strict: bool = True) -> dict[str, Any]:
    """The released architecture with `overrides` applied; see `base.merge_arch`."""
    return complete(ARCH, overrides, strict)


def complete(base: dict[str, Any], overrides: Mapping[str, Any], strict: bool) -> dict[str, Any]:
    """`arch` for either generation.

    Raises:
        ValueError: also for the files of the other generation.
    """
    found, problems = merge_arch(base, overrides, strict), []
    between, inside = found["projection_dim"], found["text_config"]["hidden_size"]
    if between != inside:
        problems.append(f"projection_dim: {between} is not text_config.hidden_size, {inside}")
    if found["mask"] not in MASKS:
        problems.append(f"mask: {found['mask']!r} is none of {list(MASKS)}")
    decoder, ours = (config["text_config"]["model_type"] for config in (found, base))
    if decoder != ours:
        problems.append(
            f"text_config.model_type: {decoder!r}, expected {ours!r}; backbone 'paligemma' has "
            "'gemma', 'paligemma2' has 'gemma2'"
        )
    if problems:
        raise ValueError("backbone architecture:\n  " + "\n  ".join(problems))
    return found


def refusal(config: Mapping[str, Any], structure: StructureConfig) -> str:
    """Why the mask does not go with a structure, or ""."""
    if config["mask"] != "full":
        return ""
    if structure.kind == "discrete":
        return f"{_BACKWARD}, so none could be predicted; mask 'causal' or 'prefix'"
    if structure.kind == "interleaved" and structure.parity.act_insert != "padded_column":
        return (
            f"{_BACKWARD}, and a step those after it, which there are none of when the policy "
            "runs; mask 'causal' or 'prefix', or structure.parity.act_insert 'padded_column' for "
            "what RoboVLMs does"
        )
    return ""


def image_spec(config: Mapping[str, Any]) -> ImageSpec:
    """SigLIP's preprocessing: squash to a square, bicubic, to [-1, 1]."""
    half = (0.5, 0.5, 0.5)
    return ImageSpec(config["vision_config"]["image_size"], half, half, "bicubic")


def width(config: Mapping[str, Any]) -> int:
    """Width of the hidden states the structure works on."""
    return config["text_config"]["hidden_size"]


def token_width(config: Mapping[str, Any]) -> int:
    """Width of the tokens that go in."""
    return width(config)


def text_spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Gemma, or Gemma 2 with or without its cap on attention scores."""
    text = config["text_config"]
    spec = LANGUAGES[text["model_type"]].spec(text)
    if config.get("attention_cap", True):
        return spec
    return dataclasses.replace(spec, block=dataclasses.replace(spec.block, soft_cap=None))


def image_tokens(config: Mapping[str, Any]) -> int:
    """Tokens of one image: its patches."""
    vision = config["vision_config"]
    return (vision["image_size"] // vision["patch_size"]) ** 2


def vocab_size(config: Mapping[str, Any]) -> int:
    """Ids the decoder knows."""
    return config["text_config"]["vocab_size"]


def token_end(config: Mapping[str, Any]) -> int:
    """First id above those that may stand for actions, from the top of the vocabulary."""
    return min(ACTION_TOKEN_END, vocab_size(config))


class PaliGemma(nn.Module):
    """Legend: b batch · h height = width · q image tokens · n sequence · d text width."""

    config: Any
    remat: str = "full"
    dtype: Any = jnp.float32

    def setup(self):
        vision = vision_families.siglip(self.config["vision_config"])
        self.vision = VisionTransformer(vision, self.remat, self.dtype)
        self.projection = Dense((width(self.config),), dtype=self.dtype)
        self.text = Decoder(text_spec(self.config), self.remat, self.dtype)

    def encode_images(self, images: Float[Array, "b h h 3"]) -> Float[Array, "b q d"]:
        """Preprocessed images -> image tokens."""
        return self.projection(self.vision(images)) / math.sqrt(self.config["hidden_size"])

    def embed_text(self, ids: Int[Array, "b n"]) -> Float[Array, "b n d"]:
        """Token ids -> embeddings; no gradient reaches padding's, as torch's padding_idx has it."""
        x = self.text.embed(ids)
        padding = (ids == self.config["text_config"]["pad_token_id"])[..., None]
        return jnp.where(padding, jax.lax.stop_gradient(x), x)

    def __call__(self, tokens: Tokens) -> Float[Array, "b n d"]:
        """Spliced embeddings -> last hidden states (after the final norm)."""
        mask = bidirectional_mask(tokens.valid) if self.config["mask"] == "full" else None
        return self.text.run(
            tokens.embeds, tokens.valid, mask=mask, prefix=self._prefix(tokens)
        ).hidden

    def empty_cache(self, batch: int, slots: int) -> Cache:
        """Before the first token of a sequence of at most `slots`."""
        return empty_cache(text_spec(self.config), batch, slots, self.dtype)

    def extend(self, tokens: Tokens, cache: Cache) -> tuple[Float[Array, "b n d"], Cache]:
        """`__call__` for tokens that follow those in the cache, and the cache with them.

        A step's prefix must come in one call.
        """
        prefix = self._prefix(tokens)
        result = self.text.run(tokens.embeds, tokens.valid, cache=cache, prefix=prefix)
        return result.hidden, result.cache

    def logits(self, hidden: Float[Array, "b n d"]) -> Float[Array, "b n v"]:
        """Hidden states -> vocabulary scores.

        Raises:
            ValueError: they would have been computed from the tokens they are to predict.
        """
        if self.config["mask"] == "full":
            raise ValueError(f"{_BACKWARD}: none can be predicted; mask 'causal' or 'prefix'")
        return self.text.logits(hidden)

    def _prefix(self, tokens: Tokens) -> Array | None:
        return tokens.given if self.config["mask"] == "prefix" else None


def weight_map(config: Mapping[str, Any]) -> list[w.Weight]:
    """Every parameter of the Hugging Face model; targets are relative to `backbone/`."""
    vision = vision_families.siglip(config["vision_config"])
    language = LANGUAGES[config["text_config"]["model_type"]]
    return [
        *vision_families.hugging_face_weights(vision, "vision_tower.vision_model.", "vision/"),
        *w.pair("multi_modal_projector.linear", "projection"),
        *w.prefixed(language.weights(text_spec(config)), "language_model.", "text/"),
    ]


# Names transformers has given since it keeps the decoder's head outside (4.52).
RENAMES = (
    (r"model\.vision_tower\.(?:vision_model\.)?", "vision_tower.vision_model."),
    (r"model\.multi_modal_projector\.", "multi_modal_projector."),
    (r"model\.language_model\.", "language_model.model."),
    (r"lm_head\.", "language_model.lm_head."),
)

# Buffers older dumps contain; they carry nothing.
IGNORE = (r"embeddings\.position_ids$", r"rotary_emb\.inv_freq$")
