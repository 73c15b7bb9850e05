"""SmolVLM: SigLIP, pixel shuffle, a linear map, Llama (HuggingFaceTB/SmolVLM2-500M-Video-Instruct).

An image is the one view that its processor makes without splitting, as SmolVLA uses it too: 64
tokens, and none of the marks that tell tiles apart.
"""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Array, Float

from vla_jax.models import weights as w
from vla_jax.models.backbones.base import Backbone, Layout, merge_arch
from vla_jax.models.image import ImageSpec
from vla_jax.models.towers import vision_families
from vla_jax.models.towers.decoder import Decoder
from vla_jax.models.towers.decoder_spec import DecoderSpec
from vla_jax.models.towers.layers import Dense
from vla_jax.models.towers.text_families import LANGUAGES
from vla_jax.models.towers.vit import VisionTransformer

_VISION = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
_VISION |= {"intermediate_size": 3072, "patch_size": 16, "image_size": 512}
_VISION |= {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "attention_dropout": 0.0}
_TEXT = {"model_type": "llama", "vocab_size": 49280, "hidden_size": 960, "intermediate_size": 2560}
_TEXT |= {"num_hidden_layers": 32, "num_attention_heads": 15, "num_key_value_heads": 5}
_TEXT |= {"head_dim": 64, "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 100000.0}
_TEXT |= {"rope_parameters": None, "attention_bias": False, "mlp_bias": False}
# config.json of the released model, reduced to what shapes and numbers depend on.
ARCH: dict[str, Any] = {
    "model_type": "smolvlm",
    "scale_factor": 4,  # patches of a token's side
    "image_token_id": 49190,  # read by transformers alone, of exported folders
    "tie_word_embeddings": False,
    "vision_config": _VISION,
    "text_config": {**_TEXT, "attention_dropout": 0.0},
}

_USER, _ASSISTANT = "<|im_start|>User:", "<end_of_utterance>\nAssistant:"
# With it as `data.cotrain.prompt` a text with one answer is a chat too.
ASKED = "{question}" + _ASSISTANT


class SmolVLM(Backbone):
    """Legend: b batch · h height = width · q image tokens · n sequence · d text width."""

    RELEASED = ARCH
    DEFAULT_CONFIG = "smolvlm_ph"
    FOR_EXPERT = True
    # The model's chat: images stand behind the three tokens of the first part.
    LAYOUT = Layout(bos=3, eos=0)
    PROMPT, QUESTION = (_USER + slot + _ASSISTANT for slot in ("{instruction}", "{question}"))
    ENDS = (_USER, "<end_of_utterance>")
    ACTION_TOKEN_END = 49152  # SmolLM2's words; marks of images and speakers follow

    @classmethod
    def arch(cls, overrides: Mapping[str, Any], strict: bool = True) -> dict[str, Any]:
        """The released architecture with `overrides` applied.

        Raises:
            ValueError: as `merge_arch`, and for an image whose patches do not make whole tokens.
        """
        merged = merge_arch(ARCH, overrides, strict)
        size = merged["vision_config"]["image_size"]
        side = merged["vision_config"]["patch_size"] * merged["scale_factor"]
        # A remainder would make the pixel shuffle's reshape fail far from here.
        if size % side:
            problem = f"{size} pixels are no multiple of {side}, patch_size x scale_factor"
            raise ValueError(f"backbone architecture:\n  vision_config.image_size: {problem}")
        return merged

    @property
    def image_spec(self) -> ImageSpec:
        """Squash to a square, Lanczos, to [-1, 1]."""
        half = (0.5, 0.5, 0.5)
        return ImageSpec(self.config["vision_config"]["image_size"], half, half, "lanczos")

    @property
    def image_tokens(self) -> int:
        """Tokens of one image."""
        vision = self.config["vision_config"]
        return (vision["image_size"] // vision["patch_size"] // self.config["scale_factor"]) ** 2

    @property
    def text_spec(self) -> DecoderSpec:
        """Sizes of the language model."""
        tied = {"tie_word_embeddings": self.config["tie_word_embeddings"]}
        return LANGUAGES["llama"].spec({**self.config["text_config"], **tied})

    def setup(self):
        vision = vision_families.siglip(self.config["vision_config"])
        self.vision = VisionTransformer(vision, self.remat, self.dtype)
        self.projection = Dense((self.width,), use_bias=False, dtype=self.dtype)
        self.text = Decoder(self.text_spec, self.remat, self.dtype)

    def encode_images(self, images: Float[Array, "b h h 3"]) -> Float[Array, "b q d"]:
        """Preprocessed images -> a token for each square of patches, row by row."""
        patches, s = self.vision(images).tokens, self.config["scale_factor"]
        side = round(patches.shape[1] ** 0.5) // s
        # The projection's weights fix this order: rows, then columns of the square, then channels.
        squares = patches.reshape(len(patches), side, s, side, s, -1).swapaxes(2, 3)
        return self.projection(squares.reshape(len(patches), side * side, -1))

    def weight_map(self) -> list[w.Weight]:
        """Every parameter of the Hugging Face model; targets are relative to `backbone/`."""
        vision = vision_families.siglip(self.config["vision_config"])
        text = LANGUAGES["llama"].weights(self.text_spec)
        return [
            *vision_families.hugging_face_weights(vision, "model.vision_model.", "vision/"),
            *w.pair("model.connector.modality_projection.proj", "projection", bias=False),
            *w.prefixed(w.moved(text, "model.", "model.text_model."), "", "text/"),
        ]
