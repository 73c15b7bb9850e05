"""OpenFlamingo: CLIP, a Perceiver, a language model that looks at images between its layers.

The hub's checkpoints (openflamingo/OpenFlamingo-3B-vitl-mpt1b and others) have no config.json; the
keys here are open_flamingo's arguments, open_clip's and those of the language model's config.json.

Legend: b batch · h height = width · k image tokens · c their width · n sequence · d text width
e text width and a mark
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vla_jax.models import weights as w
from vla_jax.models.backbones.base import Backbone, Layout, Tokens, merge_arch
from vla_jax.models.image import ImageSpec
from vla_jax.models.towers import clip_text, decoder, gated, vision_families
from vla_jax.models.towers.decoder import Decoder
from vla_jax.models.towers.decoder_spec import DecoderSpec, Insert
from vla_jax.models.towers.layers import Dense, LayerNorm
from vla_jax.models.towers.resampler import Perceiver, perceiver_weights
from vla_jax.models.towers.text_families import LANGUAGES
from vla_jax.models.towers.vit import VisionSpec, VisionTransformer

# model_type -> layers from one cross-attention to the next, and the language model's config.json,
# both of the released model that has it: 3B, 4B, 9B, 9B of the first version; OPT-1.3B has none.
# Vocabularies hold the tokenizer's words, <|endofchunk|>, <image> and <PAD>.
LANGUAGE: dict[str, tuple[int, dict[str, Any]]] = {
    "mosaic_gpt": (1, {
        "vocab_size": 50280, "d_model": 2048, "n_heads": 16, "n_layers": 24, "mlp_ratio": 4,
        "attn_qk_ln": True, "attn_clip_qkv": None, "softmax_scale": None, "alibi": True,
        "alibi_bias_max": 8, "no_bias": True, "prefix_lm": False, "logit_scale": None,
        "attn_pdrop": 0.0, "resid_pdrop": 0.0, "emb_pdrop": 0.0,
    }),
    "gpt_neox": (2, {
        "vocab_size": 50280, "hidden_size": 2560, "num_hidden_layers": 32,
        "num_attention_heads": 32, "intermediate_size": 10240, "hidden_act": "gelu",
        "layer_norm_eps": 1e-5, "rotary_pct": 1.0, "rotary_emb_base": 10000,
        "rope_parameters": None, "rope_scaling": None, "use_parallel_residual": False,
        "attention_bias": True, "attention_dropout": 0.0, "hidden_dropout": 0.0,
        "tie_word_embeddings": False,
    }),
    "mpt": (4, {
        "vocab_size": 50280, "d_model": 4096, "n_heads": 32, "n_layers": 32,
        "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True, "attn_config": {
            "alibi_bias_max": 8, "attn_pdrop": 0.0, "clip_qkv": None, "softmax_scale": None,
        },
    }),
    "llama": (4, {
        "vocab_size": 32003, "hidden_size": 4096, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": None, "head_dim": None,
        "intermediate_size": 11008, "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0, "rope_parameters": None, "rope_scaling": None,
        "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0,
        "tie_word_embeddings": False,
    }),
    "opt": (1, {
        "vocab_size": 50268, "hidden_size": 2048, "num_hidden_layers": 24,
        "num_attention_heads": 32, "ffn_dim": 8192, "max_position_embeddings": 2048,
        "activation_function": "relu", "dropout": 0.1, "attention_dropout": 0.0,
        "do_layer_norm_before": True, "_remove_final_layer_norm": False,
        "layer_norm_elementwise_affine": True, "word_embed_proj_dim": None, "enable_bias": True,
        "tie_word_embeddings": True,
    }),
}  # fmt: skip
ARCH: dict[str, Any] = {
    "model_type": "flamingo",
    "cross_attn_every_n_layers": 1,
    "media_token_id": 50278,  # of <image>
    "perceiver_config": {"num_latents": 64, "depth": 6},
    "vision_config": {
        "width": 1024,
        "layers": 24,
        "heads": 16,
        "mlp_ratio": 4.0,
        "patch_size": 14,
        "image_size": 224,
        "embed_dim": 768,
        "hidden_act": "quick_gelu",
    },
    # CLIP's text tower, which RoboVLMs' checkpoints carry and nothing uses; 0 layers = none.
    "clip_text_config": {
        "width": 768,
        "layers": 0,
        "heads": 12,
        "vocab_size": 49408,
        "context_length": 77,
    },
    "text_config": {"model_type": "mosaic_gpt", **LANGUAGE["mosaic_gpt"][1]},
}

_LAYERS = r"(transformer\.blocks|gpt_neox\.layers|model\.decoder\.layers|model\.layers)\.(\d+)\."


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Memory:
    """What is kept of a sequence while it is written.

    Attributes:
        text: keys and values of its tokens.
        images: [b, k, c]; None before its first tokens.
        seen: bool [b, k], which of them exist.
        count: int32 [b], <image> tokens so far.
    """

    text: Any
    images: Any = None
    seen: Any = None
    count: Any = None


class _Unused(nn.Module):
    """The parts of CLIP that are not used, kept so that a checkpoint comes out as it went in."""

    config: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b k c"]) -> None:
        text, size = self.config["clip_text_config"], self.config["vision_config"]["embed_dim"]
        Dense((size,), use_bias=False, name="projection")(LayerNorm(name="norm")(x))
        if text["layers"]:
            spec = clip_text.text_spec(
                {
                    "vocab_size": text["vocab_size"],
                    "hidden_size": text["width"],
                    "num_hidden_layers": text["layers"],
                    "num_attention_heads": text["heads"],
                    "intermediate_size": 4 * text["width"],
                    "max_position_embeddings": text["context_length"],
                }
            )
            # Any ids do: the call only makes Linen create the tower's parameters.
            token_ids = jnp.ones((1, 1), int)
            clip_text.ClipText(spec, size, name="text")(token_ids, token_ids == 1)
            self.param("logit_scale", nn.initializers.zeros, ())


class Flamingo(Backbone):
    """Image tokens are no part of the sequence: text attends to them from <image> on."""

    RELEASED = ARCH
    DEFAULT_CONFIG = "flamingo_ph"
    # No start token; the end token is part of the prompt and, as in RoboVLMs, of what is read.
    LAYOUT = Layout(bos=0, eos=0, images="crossed")
    QUESTION = "<image>Input: {question}\nOutput:"
    PROMPT = "<image>{instruction}<|endofchunk|><|endoftext|>"
    ENDS = ("<image>", "<|endofchunk|>")
    ADDED_TOKENS = ("<|endofchunk|>", "<image>")
    # GPT-NeoX's tokenizer has 50254 pieces; less 3 special tokens less 10, as RoboVLMs counts.
    ACTION_TOKEN_END = 50241
    # Language models of which RoboVLMs' features are the last layer's input: the last of the
    # `hidden_states` that their code returns.
    RAW_FEATURES = ("mosaic_gpt",)
    # Buffers older dumps contain, and the other half of CLIP where its own file is read.
    IGNORE = (
        *LANGUAGES["gpt_neox"].ignore,
        r"^(token_embedding|positional_embedding|text_projection|logit_scale|ln_final)(\.|$)",
        r"^transformer\.resblocks\.",
    )
    # The hub's checkpoint holds what was trained: the perceiver, the cross-attention, the token
    # table. It goes into the folder of the language model, and so does CLIP, the file of the hub's
    # timm/vit_large_patch14_clip_224.openai; a tensor is taken from the first file that has it.
    PARTS = (
        "checkpoint.pt",
        "open_clip_model.safetensors",
        "pytorch_model.bin",
    )
    RENAMES = (
        (_LAYERS, r"lang_encoder.\1.\2.decoder_layer."),
        (
            r"(?=(transformer\.(wte|ln_f|norm_f)|gpt_neox|model|embed_out|lm_head)\.)",
            "lang_encoder.",
        ),
        (r"visual\.", "vision_encoder."),
    )
    ROBOVLMS_ROOT = ""

    @classmethod
    def arch(cls, overrides: Mapping[str, Any], strict: bool = True) -> dict[str, Any]:
        """The released architecture with `overrides` applied; see `base.merge_arch`.

        Args:
            overrides: keys of ARCH, or the config.json of a language model alone. `model_type` in
                `text_config` chooses which model's keys and values are the base.
            strict: see `base.merge_arch`.

        Raises:
            ValueError: listing every unknown key; an unknown language model.
        """
        # The hub's checkpoints have no config.json, so a folder may have the language model's.
        if overrides.get("model_type") in LANGUAGE:
            overrides = {"text_config": overrides}
        text = overrides.get("text_config")
        # Without a type the keys are those of the 3B model, which is the default.
        kind = text.get("model_type", "mosaic_gpt") if isinstance(text, Mapping) else "mosaic_gpt"
        if kind not in LANGUAGE:
            raise ValueError(
                "backbone architecture:\n  text_config.model_type: "
                f"{kind!r} is none of {sorted(LANGUAGE)}"
            )
        interval, language = LANGUAGE[kind]
        base = {**ARCH, "cross_attn_every_n_layers": interval}
        return merge_arch(
            {**base, "text_config": {"model_type": kind, **language}}, overrides, strict
        )

    @property
    def image_spec(self) -> ImageSpec:
        """OpenAI-CLIP preprocessing: squash to a square, bicubic, CLIP mean and deviation."""
        return ImageSpec.clip(self.config["vision_config"]["image_size"])

    @property
    def width(self) -> int:
        """Width of the hidden states the structure works on."""
        return self.text_spec.width

    @property
    def token_width(self) -> int:
        """Width of the image tokens."""
        return self.config["vision_config"]["width"]

    @property
    def image_tokens(self) -> int:
        """Tokens of one image."""
        return self.config["perceiver_config"]["num_latents"]

    @property
    def text_spec(self) -> DecoderSpec:
        """Sizes of the language model."""
        text = self.config["text_config"]
        return LANGUAGES[text["model_type"]].spec(text)

    @property
    def vision_spec(self) -> VisionSpec:
        """CLIP's patches after the last layer, without class token and without the norm behind."""
        v = self.config["vision_config"]
        return vision_families.open_clip(
            v["width"], v["layers"], v["heads"], int(v["mlp_ratio"] * v["width"]), v["patch_size"],
            v["image_size"], activation=v["hidden_act"], class_token=True, keep_class=False,
        )  # fmt: skip

    def setup(self):
        c = self.config
        self.vision = VisionTransformer(self.vision_spec, self.remat, self.dtype)
        self.vision_unused = _Unused(c)
        perceiver = c["perceiver_config"]
        self.resampler = Perceiver(
            perceiver["num_latents"], perceiver["depth"], remat=self.remat, dtype=self.dtype
        )
        make = functools.partial(gated.GatedCrossAttention, dtype=self.dtype)
        insert = Insert(c["cross_attn_every_n_layers"], make)
        self.text = Decoder(self.text_spec, self.remat, self.dtype, insert)

    def encode_images(self, images: Float[Array, "b h h 3"]) -> Float[Array, "b k c"]:
        """Preprocessed images -> image tokens."""
        patches = self.vision(images).tokens
        # The parameters must exist to be imported and exported; no result is used.
        if self.is_initializing():
            self.vision_unused(patches)
        return self.resampler(patches)

    def embed_text(self, ids: Int[Array, "b n"]) -> Float[Array, "b n e"]:
        """Token ids -> embeddings, and behind them a mark: 1 at <image>, else 0."""
        x, mark = self.text.embed(ids), ids == self.config["media_token_id"]
        # `Tokens` carries no ids, so the mark travels as one more channel of the embedding.
        return jnp.concatenate([x, mark[..., None].astype(x.dtype)], axis=-1)

    def __call__(
        self, tokens: Tokens, for_head: bool = False, columns: Int[Array, "b c"] | None = None
    ) -> Float[Array, "b _ d"]:
        """Text and the images beside it -> last hidden states; RoboVLMs' heads read raw ones."""
        raw = for_head and self.config["text_config"]["model_type"] in self.RAW_FEATURES
        x, context, _ = self._look(tokens, Memory(None))
        run = functools.partial(self.text.run, context=context, skip_last=raw, columns=columns)
        return run(x, tokens.valid).hidden

    def empty_cache(self, batch: int, slots: int) -> Memory:
        """The cache before the first token of a sequence of at most `slots`."""
        return Memory(decoder.empty_cache(self.text_spec, batch, slots, self.dtype))

    def extend(self, tokens: Tokens, cache: Memory) -> tuple[Float[Array, "b n d"], Memory]:
        """`__call__` for tokens that follow those in the cache, and the cache with them."""
        x, context, memory = self._look(tokens, cache)
        result = self.text.run(x, tokens.valid, context=context, cache=cache.text)
        return result.hidden, Memory(result.cache, memory.images, memory.seen, memory.count)

    def _look(self, tokens: Tokens, past: Memory) -> tuple[Array, gated.Media, Memory]:
        """Embeddings, what each of them may look at, and the images for what comes next.

        A text sees its images from <image> on, one without that token from its start.
        """
        # The mark comes as a float; a half separates 0 from 1 in any type.
        mark = (tokens.embeds[..., -1] > 0.5) & tokens.valid
        images, images_valid, count = past.images, past.seen, past.count
        if tokens.images is not None:
            images, images_valid = tokens.images, tokens.seen
            # A text without <image> counts as standing behind one from its first token.
            count = jnp.where(mark.any(axis=1), 0, 1)
        if images is None or images_valid is None or count is None:
            raise ValueError("the first tokens of a sequence come with its images")
        count = count[:, None] + jnp.cumsum(mark, axis=1)
        reached = (count > 0)[..., None] & images_valid[:, None]
        memory = Memory(past.text, images, images_valid, count[:, -1])
        return tokens.embeds[..., :-1], gated.Media(images, reached), memory

    def weight_map(self) -> list[w.Weight]:
        """Every parameter of open_flamingo's Flamingo; targets are relative to `backbone/`."""
        return self._rows("vision_encoder.", ("lang_encoder.",))

    def robovlms_map(self) -> list[w.Weight]:
        """RoboFlamingo has the whole CLIP, and its language model twice."""
        rows = self._rows("vision_encoder.visual.", ("backbone.", "model."))
        if self.config["clip_text_config"]["layers"]:
            text, ours = clip_text.open_clip_weights(), "vision_unused/"
            rows += w.prefixed(text, "vision_encoder.", ours + "text/")
            rows.append(w.Weight("vision_encoder.logit_scale", ours + "logit_scale"))
        return rows

    def _rows(self, vision: str, roots: tuple[str, ...]) -> list[w.Weight]:
        return [
            *vision_families.open_clip_weights(self.vision_spec, vision, "vision/"),
            *w.norm(vision + "ln_post", "vision_unused/norm"),
            w.Weight(vision + "proj", "vision_unused/projection/kernel"),
            *w.prefixed(perceiver_weights(), "perceiver.", "resampler/"),
            *w.with_aliases(w.prefixed(self._language(), "", "text/"), roots),
        ]

    def _language(self) -> list[w.Weight]:
        """The wrapped language model, which registers its layers a second time by themselves."""
        spec, interval = self.text_spec, self.config["cross_attn_every_n_layers"]
        rows: list[w.Weight] = []
        top = ""
        for row in LANGUAGES[self.config["text_config"]["model_type"]].weights(spec):
            if not row.stacked:
                rows.append(row)
                continue
            # open_flamingo keeps every layer in two lists, so each tensor has two names.
            top, suffix = row.source.split("{}.")
            for i in range(interval):
                # Layers are scanned in groups: block i of a group is every `interval`-th layer from
                # i on.
                target = row.target.replace("layers/", f"layers/blocks_{i}/", 1)
                names = (top + "{}.decoder_layer." + suffix, "old_decoder_blocks.{}." + suffix)
                rows += [
                    w.Weight(name, target, row.kind, alias, first=i, step=interval)
                    for name, alias in zip(names, (False, True), strict=True)
                ]
        # It stands before the last layer of each group.
        for row in gated.weight_map():
            names = (top + "{}.gated_cross_attn_layer.", "gated_cross_attn_layers.{}.")
            target = "layers/extra/" + row.target
            rows += [
                w.Weight(
                    name + row.source, target, row.kind, alias, first=interval - 1, step=interval
                )
                for name, alias in zip(names, (False, True), strict=True)
            ]
        return rows
