"""Qwen-VL: open_clip ViT, 256 positioned queries, rotary causal decoder (Qwen/Qwen-VL)."""

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vla_jax.models import weights as w
from vla_jax.models.backbones.base import Backbone, Layout, Tokens
from vla_jax.models.image import ImageSpec
from vla_jax.models.towers import vision_families
from vla_jax.models.towers.block import BlockSpec
from vla_jax.models.towers.decoder import Cache, Decoder, Result
from vla_jax.models.towers.decoder_spec import DecoderSpec
from vla_jax.models.towers.layers import Rope
from vla_jax.models.towers.resampler import positioned_queries_weights
from vla_jax.models.towers.vit import VisionTransformer

# config.json of the released model, reduced to what shapes and numbers depend on.
ARCH: dict[str, Any] = {
    "model_type": "qwen",
    "vocab_size": 151936,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 22016,  # of both halves of the gated MLP together
    "no_bias": True,  # but for q, k and v, which always have one
    "layer_norm_epsilon": 1e-6,
    "rotary_emb_base": 10000.0,
    "rotary_pct": 1.0,
    "seq_length": 2048,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "emb_dropout_prob": 0.0,
    "attn_dropout_prob": 0.0,
    "visual": {
        "image_size": 448,
        "patch_size": 14,
        "width": 1664,
        "layers": 48,
        "heads": 16,
        "mlp_ratio": 4.9231,
        "n_queries": 256,
        "image_start_id": 151857,  # <img>; the next one is </img>
    },
}


def far(
    config: Mapping[str, Any], length: int, columns: Int[Array, "#b n"]
) -> tuple[tuple[Array, Array], Float[Array, "#b n"] | None]:
    """Rotation and gain of the queries, both stretched beyond `seq_length` columns.

    Dynamic NTK raises the rotation's base for the whole sequence, the more the longer it is;
    log-n makes the queries beyond `seq_length` larger. The original does so only outside training
    and counts the columns of its first pass. Here the number of columns of the sequence or, with a
    cache, of its slots decides, in training too: a policy is trained with the numbers it is
    served with, and written token by token it is what it is in one pass. Up to 2048 columns
    nothing changes; `use_dynamic_ntk` and `use_logn_attn` switch them off.

    Args:
        config: the architecture.
        length: columns a sequence may come to have.
        columns: of these tokens.

    Returns:
        Cosines and sines [#b, n, r], and the gain, None where there is none.
    """
    limit, base = config["seq_length"], config["rotary_emb_base"]
    head_width = config["hidden_size"] // config["num_attention_heads"]
    turned = int(head_width * config["rotary_pct"])
    if config["use_dynamic_ntk"]:
        # The original's get_ntk_alpha: 1 up to `seq_length`, 3, 7, 15 ... beyond.
        alpha = max(2 ** math.ceil(math.log(length / limit, 2) + 1) - 1, 1)
        # With this base fast rotations hardly change and the slowest is stretched by alpha.
        base = base * alpha ** (turned / (turned - 2))
    gain = None
    if config["use_logn_attn"] and length > limit:
        # Columns count from 0, so the first one with a gain above 1 is column `limit`.
        gain = jnp.maximum(jnp.log(columns + 1.0) / math.log(limit), 1.0)
    return Rope(base, turned)(columns), gain


class QwenVL(Backbone):
    """Legend: b batch · h height = width · q image tokens · n sequence · d text width."""

    RELEASED = ARCH
    DEFAULT_CONFIG = "qwen_vl_ph"
    # The tokenizer has neither start nor end token.
    LAYOUT = Layout(bos=0, eos=0)
    # <img> and </img> around the tokens of an image.
    MARKS = 1
    # The tokenizer's 151860 pieces less its one special role (padding) less 10, as RoboVLMs counts.
    ACTION_TOKEN_END = 151849
    # The checkpoint holds parameters only.
    IGNORE: tuple[str, ...] = ()

    @property
    def image_spec(self) -> ImageSpec:
        """OpenAI-CLIP preprocessing: squash to a square, bicubic, CLIP mean and deviation."""
        return ImageSpec.clip(self.config["visual"]["image_size"])

    @property
    def width(self) -> int:
        """Width of the hidden states the structure works on."""
        return self.config["hidden_size"]

    @property
    def image_tokens(self) -> int:
        """Tokens of one image, its marks included."""
        return self.config["visual"]["n_queries"] + 2 * self.MARKS

    @property
    def vocab_size(self) -> int:
        """Ids the decoder knows."""
        return self.config["vocab_size"]

    @property
    def text_spec(self) -> DecoderSpec:
        """RMS norms, gated MLP, untied head; `far` makes the rotation."""
        return DecoderSpec(
            vocab=self.config["vocab_size"],
            width=self.config["hidden_size"],
            layers=self.config["num_hidden_layers"],
            block=BlockSpec(
                heads=self.config["num_attention_heads"],
                hidden=self.config["intermediate_size"] // 2,
                activation="silu",
                norm="rms",
                eps=self.config["layer_norm_epsilon"],
                out_bias=not self.config["no_bias"],
                mlp_bias=not self.config["no_bias"],
                gated=True,
                attention_dropout=self.config["attn_dropout_prob"],
            ),
            embed_dropout=(self.config["emb_dropout_prob"],),
            tied=False,
        )

    def setup(self):
        visual = self.config["visual"]
        spec = vision_families.qwen_vl(visual)
        self.vision = VisionTransformer(spec, self.remat, self.dtype)
        self.vision_pool = vision_families.qwen_vl_resampler(
            spec, visual["n_queries"], self.width, self.dtype
        )
        self.text = Decoder(self.text_spec, self.remat, self.dtype)

    def encode_images(self, images: Float[Array, "b h h 3"]) -> Float[Array, "b q d"]:
        """Preprocessed images -> <img>, image tokens, </img>."""
        x = self.vision_pool(self.vision(images).tokens)
        start = self.config["visual"]["image_start_id"]
        marks = self.embed_text(jnp.broadcast_to(jnp.array([start, start + 1]), (len(x), 2)))
        return jnp.concatenate([marks[:, : self.MARKS], x, marks[:, self.MARKS :]], axis=1)

    def __call__(
        self, tokens: Tokens, for_head: bool = False, columns: Int[Array, "b c"] | None = None
    ) -> Float[Array, "b _ d"]:
        """Spliced embeddings -> last hidden states (after the final norm)."""
        return self.run(tokens, columns=columns).hidden

    def extend(self, tokens: Tokens, cache: Cache) -> tuple[Float[Array, "b n d"], Cache]:
        """`__call__` for tokens that follow those in the cache, and the cache with them."""
        result = self.run(tokens, cache)
        return result.hidden, result.cache

    def run(
        self,
        tokens: Tokens,
        cache: Cache | None = None,
        collect: bool = False,
        columns: Int[Array, "b c"] | None = None,
    ) -> Result:
        """The decoder; see `Decoder.run`."""
        length = tokens.valid.shape[1]
        places = jnp.arange(length)[None]
        if cache is not None:
            # All slots count, so that a token is rotated alike in every call.
            length, places = cache.valid.shape[1], places + cache.length[:, None]
        rope, gain = far(self.config, length, places)
        return self.text.run(
            tokens.embeds,
            tokens.valid,
            rope=rope,
            gain=gain,
            cache=cache,
            collect=collect,
            columns=columns,
        )

    def weight_map(self) -> list[w.Weight]:
        """Every parameter of the released model; targets are relative to `backbone/`."""
        visual, layer, bias = "transformer.visual.", "h.{}.", not self.config["no_bias"]
        spec = vision_families.qwen_vl(self.config["visual"])
        text = [
            w.Weight("wte.weight", "embedding"),
            *w.norm("ln_f", "norm", bias=False),
            *w.norm(layer + "ln_1", "layers/norm1", bias=False),
            *w.norm(layer + "ln_2", "layers/norm2", bias=False),
            *w.pair(layer + "attn.c_attn", "layers/attn/{q,k,v}"),
            *w.pair(layer + "attn.c_proj", "layers/attn/o", "linear_from_heads", bias),
            # The original activates what w2 gives, so w2 is the gate.
            *w.pair(layer + "mlp.w1", "layers/mlp/up", bias=bias),
            *w.pair(layer + "mlp.w2", "layers/mlp/gate", bias=bias),
            *w.pair(layer + "mlp.c_proj", "layers/mlp/down", bias=bias),
        ]
        return [
            *vision_families.open_clip_weights(spec, visual, "vision/", by_head=True),
            *w.prefixed(positioned_queries_weights(), visual, "vision_pool/"),
            *w.prefixed(text, "transformer.", "text/"),
            w.Weight("lm_head.weight", "text/unembedding"),
        ]
