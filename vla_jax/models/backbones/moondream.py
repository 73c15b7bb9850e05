"""Moondream2: SigLIP, a projection of two layers, Phi-1.5 (vikhyatk/moondream2).

Three layouts of its weights: one stream of image features (5f520ae), two of them (22565c0; large
images are seen twice, whole and in tiles), and that of 2025 under other names, which cuts tiles
another way and lets the columns of an image see one another. Here those of 2025 run like 22565c0.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jaxtyping import Array, Float

from vla_jax.models import weights as w
from vla_jax.models.backbones.base import Backbone, Layout, count_layers
from vla_jax.models.image import ImageSpec
from vla_jax.models.towers import vision_families
from vla_jax.models.towers.decoder import Decoder
from vla_jax.models.towers.decoder_spec import DecoderSpec
from vla_jax.models.towers.layers import MLP
from vla_jax.models.towers.text_families import LANGUAGES
from vla_jax.models.towers.tiles import two_streams
from vla_jax.models.towers.vit import VisionSpec, VisionTransformer

# The released config.json holds no sizes: the vision side is fixed in the code and the text is
# what that code's PhiConfig has by default. `from_shapes` reads them off other weights.
ARCH: dict[str, Any] = {
    "model_type": "moondream1",
    "vision_config": {
        "hidden_size": 1152,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "intermediate_size": 4304,
        "patch_size": 14,
        "image_size": 378,
        "streams": 2,
        "projection_dim": 8192,
    },
    "text_config": {
        "vocab_size": 51200,
        "hidden_size": 2048,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "intermediate_size": 8192,
        "hidden_act": "gelu_new",
        "layer_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "attention_dropout": 0.0,
    },
}


_VISION = "vision_encoder.encoder.model.visual."
_PROJECTION = "vision_encoder.projection.mlp."
_TEXT = "text_model.transformer."
_HEAD = "text_model.lm_head."
_ROOT = r"(?:model\.)?"  # of the names of 2025


class Moondream(Backbone):
    """Legend: b batch · h, x image height and width · q image tokens · n sequence · d text width.

    v vocabulary.
    """

    RELEASED = ARCH
    DEFAULT_CONFIG = "moondream_ph"
    SIZES_FROM_WEIGHTS = True
    # The prompt starts with the tokenizer's only special token and ends with a word.
    LAYOUT = Layout(bos=1, eos=0)
    # RoboVLMs asks whether there is an end token, not whether the prompt has one: its action tokens
    # stand before the last word.
    ORIGINAL_LAYOUT = Layout(bos=1, eos=1)
    PROMPT = "<|endoftext|>{instruction}"
    # The tokenizer's 50257 pieces, less its special token under four names and 10, as RoboVLMs
    # counts.
    ACTION_TOKEN_END = 50243
    # Buffers older dumps contain, and what finds points and boxes in the models of 2025.
    IGNORE = (r"\.inv_freq$", r"^(model\.)?region\.")
    # The names of 2025 -> those of 2024.
    RENAMES = (
        (_ROOT + r"vision\.patch_emb\.", _VISION + "patch_embed.linear."),
        (_ROOT + r"vision\.pos_emb$", _VISION + "pos_embed"),
        (_ROOT + r"vision\.post_ln\.", _VISION + "norm."),
        (_ROOT + r"vision\.blocks\.(\d+)\.ln([12])\.", _VISION + r"blocks.\1.norm\2."),
        (_ROOT + r"vision\.blocks\.", _VISION + "blocks."),
        (_ROOT + r"vision\.proj_mlp\.", _PROJECTION),
        (_ROOT + r"text\.wte$", _TEXT + "embd.wte.weight"),
        (_ROOT + r"text\.blocks\.(\d+)\.attn\.qkv\.", _TEXT + r"h.\1.mixer.Wqkv."),
        (_ROOT + r"text\.blocks\.(\d+)\.attn\.proj\.", _TEXT + r"h.\1.mixer.out_proj."),
        (_ROOT + r"text\.blocks\.", _TEXT + "h."),
        (_ROOT + r"text\.post_ln\.", _HEAD + "ln."),
        (_ROOT + r"text\.lm_head\.", _HEAD + "linear."),
    )

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """The sizes that the weights tell, with heads as wide as in every released model."""
        # Layer 0 stands for all, as the number of layers is what is to be learned.
        needed = [row.source.format(0) for row in cls(ARCH).weight_map()]
        if any(name not in shapes for name in needed):
            return {}
        hidden, patch = shapes[_VISION + "patch_embed.linear.weight"]
        tokens = shapes[_VISION + "pos_embed"][1]
        projection, features = shapes[_PROJECTION + "fc1.weight"]
        vocab, width = shapes[_TEXT + "embd.wte.weight"]
        # A patch comes flattened: side x side pixels of 3 colors.
        side = round((patch / 3) ** 0.5)
        return {
            "vision_config": {
                "hidden_size": hidden,
                "num_hidden_layers": count_layers(shapes, _VISION + "blocks."),
                # Shapes do not tell the heads apart; SigLIP's are 72 wide (1152 / 16).
                "num_attention_heads": max(hidden // 72, 1),
                "intermediate_size": shapes[_VISION + "blocks.0.mlp.fc1.bias"][0],
                "patch_size": side,
                "image_size": round(tokens**0.5) * side,
                # The projection reads the features of all streams side by side.
                "streams": features // hidden,
                "projection_dim": projection,
            },
            "text_config": {
                "vocab_size": vocab,
                "hidden_size": width,
                "num_hidden_layers": count_layers(shapes, _TEXT + "h."),
                # Phi-1.5's heads are 64 wide (2048 / 32).
                "num_attention_heads": max(width // 64, 1),
                "intermediate_size": shapes[_TEXT + "h.0.mlp.fc1.bias"][0],
            },
        }

    @property
    def image_spec(self) -> ImageSpec:
        """Squashed, bicubic, to [-1, 1]; with two streams, images of 512 pixels may be tiled."""
        vision = self.config["vision_config"]
        side, half = vision["image_size"], (0.5, 0.5, 0.5)
        # The sizes from which the released code chooses for an image that it tiles.
        larger = ((side, 2 * side), (2 * side, side), (2 * side, 2 * side))
        if vision["streams"] == 1:
            return ImageSpec(side, half, half)
        return ImageSpec(side, half, half, larger=larger, larger_from=512)

    @property
    def vision_spec(self) -> VisionSpec:
        """Sizes of the image tower."""
        vision = self.config["vision_config"]
        return vision_families.timm_siglip(
            vision["hidden_size"],
            vision["num_hidden_layers"],
            vision["num_attention_heads"],
            vision["intermediate_size"],
            vision["patch_size"],
            vision["image_size"],
        )

    @property
    def text_spec(self) -> DecoderSpec:
        """Phi, whose last norm is part of the head: hidden states come without it."""
        return replace(LANGUAGES["phi"].spec(self.config["text_config"]), norm_in_head=True)

    @property
    def image_tokens(self) -> int:
        """Tokens of one image."""
        return self.vision_spec.tokens

    def setup(self):
        vision, text = self.config["vision_config"], self.config["text_config"]
        self.vision = VisionTransformer(self.vision_spec, self.remat, self.dtype)
        # Its name makes it freeze with the tower, of which it is a part in the original.
        self.vision_projection = MLP(
            vision["projection_dim"],
            "gelu_pytorch_tanh",
            dtype=self.dtype,
            width=text["hidden_size"],
        )
        self.text = Decoder(self.text_spec, self.remat, self.dtype)

    def encode_images(self, images: Float[Array, "b h x 3"]) -> Float[Array, "b q d"]:
        """Preprocessed images -> image tokens."""
        if self.config["vision_config"]["streams"] == 1:
            return self.vision_projection(self.vision(images).tokens)
        return self.vision_projection(
            two_streams(lambda x: self.vision(x).tokens, images, self.vision.spec)
        )

    def weight_map(self) -> list[w.Weight]:
        """Every parameter of the released models of 2024; targets are relative to `backbone/`."""
        layer = _TEXT + "h.{}."
        return [
            *vision_families.moondream_weights(_VISION, "vision/"),
            *w.pair(_PROJECTION + "fc1", "vision_projection/fc1"),
            *w.pair(_PROJECTION + "fc2", "vision_projection/fc2"),
            w.Weight(_TEXT + "embd.wte.weight", "text/embedding"),
            # Phi's attention and MLP share one norm, as they run side by side.
            *w.norm(layer + "ln", "text/layers/norm1"),
            *w.pair(layer + "mixer.Wqkv", "text/layers/attn/{q,k,v}"),
            *w.pair(layer + "mixer.out_proj", "text/layers/attn/o", "linear_from_heads"),
            *w.pair(layer + "mlp.fc1", "text/layers/mlp/fc1"),
            *w.pair(layer + "mlp.fc2", "text/layers/mlp/fc2"),
            *w.norm(_HEAD + "ln", "text/norm"),
            w.Weight(_HEAD + "linear.weight", "text/unembedding"),
            w.Weight(_HEAD + "linear.bias", "text/head_bias"),
        ]
