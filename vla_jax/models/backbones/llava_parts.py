"""The parts the LLaVAs share: CLIP's tower, a projector, a decoder, and their assembly."""

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vla_jax.models import weights as w
from vla_jax.models.backbones.base import Backbone
from vla_jax.models.image import ImageSpec
from vla_jax.models.towers import vision_families
from vla_jax.models.towers.decoder import Decoder
from vla_jax.models.towers.decoder_spec import DecoderSpec
from vla_jax.models.towers.layers import ACTIVATIONS, Dense
from vla_jax.models.towers.vit import VisionSpec, VisionTransformer

# openai/clip-vit-large-patch14-336, the tower of LLaVA-1.5; -patch14 takes 224 pixels.
CLIP: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "patch_size": 14,
    "image_size": 336,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "attention_dropout": 0.0,
}


@dataclass(frozen=True)
class Parts:
    """The parts a LLaVA is put together from.

    Attributes:
        vision: the image tower.
        text: the decoder.
        depth: linear layers from the one's width to the other's.
        activation: between them.
    """

    vision: VisionSpec
    text: DecoderSpec
    depth: int
    activation: str = "gelu"


def tower_of(name: str) -> dict[str, Any]:
    """`vision_config` of one of OpenAI's two CLIP ViT-L/14, by the name or path of its folder.

    Raises:
        ValueError: it is neither.
    """
    # The name may be the path of a local folder, so only its end counts.
    match = re.search(r"clip-vit-large-patch14(-336)?/?$", name)
    if not match:
        raise ValueError(
            f"mm_vision_tower: {name!r} is neither openai/clip-vit-large-patch14 nor "
            "openai/clip-vit-large-patch14-336; give its sizes as vision_config"
        )
    return {**CLIP, "image_size": 336 if match[1] else 224}


def check(config: dict[str, Any], legal: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """`config`, if it is supported.

    Args:
        config: a complete architecture.
        legal: dotted key -> values it may have.

    Raises:
        ValueError: naming every key with another, and an unknown `mm_projector_type`.
    """
    problems = []
    for path, values in legal.items():
        value: Any = functools.reduce(lambda group, key: group[key], path.split("."), config)
        if value not in values:
            problems.append(f"{path}: {value!r} is none of {list(values)}")
    # This key follows a pattern and has no list of legal values.
    if not _depth(config["mm_projector_type"]):
        kind = config["mm_projector_type"]
        problems.append(
            f"mm_projector_type: {kind!r} is none of linear, mlp2x_gelu, mlp3x_gelu ..."
        )
    if problems:
        raise ValueError("backbone architecture:\n  " + "\n  ".join(problems))
    return config


def _depth(projector: str) -> int:
    """Linear layers of a projector; 0 for an unknown one."""
    match = re.fullmatch(r"mlp([2-9])x_gelu", projector)
    return 1 if projector == "linear" else int(match[1]) if match else 0


def assemble(
    config: Mapping[str, Any], text: DecoderSpec, take: int, keep_class: bool, **facts: Any
) -> Parts:
    """Parts of a config with `vision_config` and `mm_projector_type`.

    Args:
        config: the complete architecture.
        text: the decoder.
        take: which hidden states of the tower are read; see `VisionSpec`.
        keep_class: whether the class token is.
        facts: further fields.
    """
    # The norm behind the last layer belongs to the checkpoint though nothing reads it.
    vision = vision_families.clip(
        config["vision_config"], take=take, keep_class=keep_class, post_norm=True
    )
    return Parts(vision, text, _depth(config["mm_projector_type"]), **facts)


class Projector(nn.Module):
    """Linear layers from the tower's width to the decoder's."""

    width: int
    depth: int
    activation: str
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b k v"]) -> Float[Array, "b k d"]:
        x = Dense((self.width,), dtype=self.dtype, name="fc1")(x)
        for i in range(1, self.depth):
            x = ACTIVATIONS[self.activation](x)
            x = Dense((self.width,), dtype=self.dtype, name=f"fc{i + 1}")(x)
        return x


class LlavaFamily(Backbone):
    """A subclass says of which `parts` it is made.

    Legend: b batch · h height = width · k image tokens · d text width
    """

    @property
    def parts(self) -> Parts:
        """Sizes of the tower, the projector and the decoder."""
        raise NotImplementedError

    @property
    def image_spec(self) -> ImageSpec:
        """RoboVLMs' preprocessing: squash to a square, bicubic, CLIP mean and deviation.

        LLaVA itself pads to a square (its package) or crops (Hugging Face).
        """
        return ImageSpec.clip(self.config["vision_config"]["image_size"])

    @property
    def image_tokens(self) -> int:
        """Tokens of one image."""
        return self.parts.vision.tokens

    @property
    def text_spec(self) -> DecoderSpec:
        """The decoder's sizes."""
        return self.parts.text

    def setup(self):
        p = self.parts
        self.vision = VisionTransformer(p.vision, self.remat, self.dtype)
        self.projection = Projector(p.text.width, p.depth, p.activation, self.dtype)
        self.text = Decoder(p.text, self.remat, self.dtype)

    def encode_images(self, images: Float[Array, "b h h 3"]) -> Float[Array, "b k d"]:
        """Preprocessed images -> image tokens."""
        return self.projection(self.vision(images).tokens)


def rows(
    p: Parts, vision: str, projector: Sequence[str], text: Sequence[w.Weight]
) -> list[w.Weight]:
    """Weight map of a LLaVA.

    Args:
        p: what it is made of.
        vision: their prefix of the tower.
        projector: their names of its linear layers.
        text: rows of the decoder, targets relative to it.
    """
    linear = [w.pair(name, f"projection/fc{i}") for i, name in enumerate(projector, 1)]
    return [
        *vision_families.hugging_face_weights(p.vision, vision, "vision/"),
        *(row for pair in linear for row in pair),
        *w.prefixed(text, "", "text/"),
    ]


def mm_projector(depth: int, prefix: str) -> list[str]:
    """The llava package's names of a projector's linear layers: alone, or every other of a list."""
    # torch's Sequential numbers the activations in between, too, which hold nothing.
    return [prefix] if depth == 1 else [f"{prefix}.{2 * i}" for i in range(depth)]
