"""OFA: ResNet, encoder over image and prompt, decoder that writes (OFA-Sys/OFA, base)."""

import math
from collections.abc import Mapping
from typing import Any

from jaxtyping import Array, Float, Int

from vla_jax.models import weights as w
from vla_jax.models.backbones.base import Backbone, Layout, Tokens, merge_arch
from vla_jax.models.image import ImageSpec
from vla_jax.models.towers import encoder_decoder, resnet
from vla_jax.models.towers.block import at
from vla_jax.models.towers.layers import Dense
from vla_jax.models.towers.normformer import EncoderDecoderSpec, StackSpec

# config.json of the released base model, reduced to what shapes and numbers depend on.
ARCH: dict[str, Any] = {
    "model_type": "ofa",
    "vocab_size": 59457,
    "d_model": 768,
    "encoder_layers": 6,
    "encoder_attention_heads": 12,
    "encoder_ffn_dim": 3072,
    "decoder_layers": 6,
    "decoder_attention_heads": 12,
    "decoder_ffn_dim": 3072,
    "max_position_embeddings": 1024,
    "activation_function": "gelu",
    "dropout": 0.1,
    "attention_dropout": 0.0,
    "scale_embedding": False,
    "attn_scale_factor": 2.0,
    "token_bucket_size": 256,
    "image_bucket_size": 42,
    "resnet_type": "resnet101",
    # Not in config.json: the size it was trained at (tiny and medium 256, large and huge 480). Any
    # size does whose sixteenth is at most image_bucket_size.
    "image_size": 384,
    # Nor is this: channels of the ResNet's first stage, 64 in all released models.
    "stem": 64,
    # The same in all released models; nothing else is implemented.
    "encoder_normalize_before": True,
    "decoder_normalize_before": True,
    "normformer": True,
    "layernorm_embedding": True,
    "patch_layernorm_embedding": True,
    "code_layernorm_embedding": True,
    "add_type_embedding": True,
    "share_decoder_input_output_embed": True,
    "entangle_position_embedding": False,
}
_FIXED = list(ARCH)[list(ARCH).index("encoder_normalize_before") :]
STRIDE = 16  # pixels from one feature of the ResNet to the next


def _side(config: Mapping[str, Any]) -> int:
    # The ResNet's convolutions pad, so remaining pixels make one more feature.
    return math.ceil(config["image_size"] / STRIDE)


class OFA(Backbone):
    """Every camera's tokens stand at the same places of the grid, as OFA's images do.

    Legend: b batch · h height = width · k image tokens · n sequence · d width
    """

    RELEASED = ARCH
    DEFAULT_CONFIG = "ofa_ph"
    # The prompt is for the encoder. The decoder starts with <s>; its actions stand where answers
    # do.
    LAYOUT = Layout(bos=1, eos=1, images="encoded")
    # RoboVLMs has no OFA; this is the form of OFA's own questions: lower case, a blank before.
    PROMPT = " what should the robot do to {instruction}?"
    # No ACTION_TOKEN_END: the last 1000 ids are OFA's own bins, of image coordinates.
    # Buffers: tables of indices, which are computed here, and counters of batches.
    IGNORE = (r"_rp_bucket$", r"image_position_idx$", r"num_batches_tracked$")

    @classmethod
    def arch(cls, overrides: Mapping[str, Any], strict: bool = True) -> dict[str, Any]:
        """The released architecture with `overrides` applied; see `base.merge_arch`.

        Raises:
            ValueError: also for what no released OFA has, and for images larger than the grid.
        """
        merged = merge_arch(ARCH, overrides, strict)
        # A file with another value describes a network that is not implemented.
        problems = [
            f"{key}: {merged[key]!r}, only {ARCH[key]!r} is implemented"
            for key in _FIXED
            if merged[key] != ARCH[key]
        ]
        if merged["resnet_type"] not in resnet.DEPTHS:
            problems.append(
                f"resnet_type: {merged['resnet_type']!r} is none of {list(resnet.DEPTHS)}"
            )
        if _side(merged) > merged["image_bucket_size"]:
            problems.append(
                f"image_size: {merged['image_size']} pixels are more than the model's grid of "
                f"{merged['image_bucket_size']} x {STRIDE}"
            )
        if problems:
            raise ValueError("backbone architecture:\n  " + "\n  ".join(problems))
        return merged

    @property
    def image_spec(self) -> ImageSpec:
        """Squash to a square, bicubic, pixels in [-1, 1]."""
        return ImageSpec(self.config["image_size"], (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

    @property
    def width(self) -> int:
        """Width of the hidden states the structure works on."""
        return self.config["d_model"]

    @property
    def image_tokens(self) -> int:
        """Tokens of one image: a grid, row by row."""
        return _side(self.config) ** 2

    @property
    def vocab_size(self) -> int:
        """Ids the decoder knows."""
        return self.config["vocab_size"]

    @property
    def text_spec(self) -> EncoderDecoderSpec:
        """Sizes of the encoder and the decoder."""
        keys = ("layers", "attention_heads", "ffn_dim")
        encoder, decoder = (
            StackSpec(*(self.config[f"{part}_{key}"] for key in keys))
            for part in ("encoder", "decoder")
        )
        return EncoderDecoderSpec(
            vocab=self.config["vocab_size"],
            width=self.config["d_model"],
            encoder=encoder,
            decoder=decoder,
            activation=self.config["activation_function"],
            # The original's table has two rows more than its config says.
            max_positions=self.config["max_position_embeddings"] + 2,
            token_buckets=self.config["token_bucket_size"],
            image_buckets=self.config["image_bucket_size"],
            side=_side(self.config),
            position_scale=self.config["attn_scale_factor"],
            embed_scale=math.sqrt(self.width) if self.config["scale_embedding"] else 1.0,
            dropout=self.config["dropout"],
            attention_dropout=self.config["attention_dropout"],
        )

    @property
    def vision_spec(self) -> resnet.ResNetSpec:
        """Sizes of the ResNet."""
        return resnet.ResNetSpec(resnet.DEPTHS[self.config["resnet_type"]], self.config["stem"])

    def setup(self):
        self.vision = resnet.ResNet(self.vision_spec, self.remat, self.dtype)
        self.projection = Dense((self.config["d_model"],), dtype=self.dtype)
        self.text = encoder_decoder.EncoderDecoder(self.text_spec, self.remat, self.dtype)

    def encode_images(self, images: Float[Array, "b h h 3"]) -> Float[Array, "b k d"]:
        """Preprocessed images -> image tokens."""
        x = self.vision(images)
        # Row by row, as `image_place` numbers the grid.
        return self.projection(x.reshape(len(x), -1, x.shape[-1]))

    def encode(self, tokens: Any, collect: bool = False) -> encoder_decoder.Encoded:
        """The encoder's reading of the images and the prompt of `Tokens`."""
        images, prompt = (tokens.images, tokens.seen), (tokens.prompt, tokens.prompt_valid)
        return self.text.encoder(*images, tokens.image_place, *prompt, collect)

    def __call__(
        self, tokens: Tokens, for_head: bool = False, columns: Int[Array, "b c"] | None = None
    ) -> Float[Array, "b _ d"]:
        """Images, prompt and what is written -> the decoder's last hidden states."""
        hidden = self.text.decoder(tokens.embeds, tokens.valid, self.encode(tokens)).hidden
        # Its sequence is the action tokens, so nothing could be spared.
        return hidden if columns is None else at(hidden, columns)

    def empty_cache(self, batch: int, slots: int) -> encoder_decoder.Cache:
        """The cache before the first token of a sequence of at most `slots`."""
        return encoder_decoder.empty_cache(self.text_spec, batch, slots, self.dtype)

    def extend(
        self, tokens: Tokens, cache: encoder_decoder.Cache
    ) -> tuple[Float[Array, "b n d"], encoder_decoder.Cache]:
        """`__call__` for tokens that follow those in the cache, and the cache with them."""
        # Later calls find what the encoder made in the cache.
        encoded = None if tokens.images is None else self.encode(tokens)
        result = self.text.decoder(tokens.embeds, tokens.valid, encoded, cache)
        return result.hidden, result.cache

    def weight_map(self) -> list[w.Weight]:
        """Every parameter of the released model; targets are relative to `backbone/`."""
        rows = resnet.weight_map(self.vision_spec, "encoder.embed_images.", "vision/")
        rows += w.pair("encoder.image_proj", "projection")
        rows.append(w.Weight("encoder.embed_tokens.weight", "text/embedding"))
        rows += [
            # One matrix under three names: encoder, decoder and output scores share it.
            w.Weight(f"decoder.{name}.weight", "text/embedding", alias=True)
            for name in ("embed_tokens", "output_projection")
        ]
        encoder = [
            w.Weight("type_embedding.weight", "types"),
            *w.norm("layernorm_embedding", "text_norm"),
            *w.norm("patch_layernorm_embedding", "image_norm"),
            *_places("pos", "scores"),
        ]
        decoder = [
            *w.norm("layernorm_embedding", "entry_norm"),
            *w.norm("code_layernorm_embedding", "code_norm"),
            *_places("self_pos", "scores"),
            *_places("cross_pos", "cross_scores"),
            *_attention("cross_attn", "cross", "norm_cross", "post_cross"),
        ]
        for part, stack_rows in (("encoder", encoder), ("decoder", decoder)):
            rows += w.prefixed([*stack_rows, *_tower()], f"{part}.", f"text/{part}/")
        return rows


def _tower() -> list[w.Weight]:
    """Weights that the encoder and the decoder both have."""
    layer = "layers.{}."
    return [
        w.Weight("embed_positions.weight", "positions"),
        w.Weight("embed_image_positions.weight", "image_positions"),
        *w.norm("pos_ln", "place_norm"),
        *w.norm("image_pos_ln", "image_place_norm"),
        *_attention("self_attn", "attn", "norm1", "post1"),
        *w.pair(layer + "fc1", "layers/mlp/fc1"),
        *w.norm(layer + "ffn_layer_norm", "layers/mlp/norm"),
        *w.pair(layer + "fc2", "layers/mlp/fc2"),
        *w.norm(layer + "final_layer_norm", "layers/norm2"),
        w.Weight("token_rel_pos_table_list.{}.weight", "layers/token_bias"),
        w.Weight("image_rel_pos_table_list.{}.weight", "layers/image_bias"),
        *w.norm("layer_norm", "norm"),
    ]


def _attention(source: str, target: str, before: str, behind: str) -> list[w.Weight]:
    source = "layers.{}." + source
    return [
        *w.attention(source, "layers/" + target),
        w.Weight(source + ".c_attn", f"layers/{target}/head_scale"),
        *w.norm(source + "_layer_norm", "layers/" + before),
        *w.norm(source + "_mid_layer_norm", "layers/" + behind),
    ]


def _places(source: str, target: str) -> list[w.Weight]:
    return [
        *w.pair(source + "_q_linear", target + "/q"),
        *w.pair(source + "_k_linear", target + "/k"),
    ]
