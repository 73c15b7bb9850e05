"""Prismatic: DINOv2 and SigLIP side by side, a perceptron, Llama 2 (openvla/openvla-7b).

Names are those of OpenVLA's Hugging Face folders. The two towers see the same image, each with its
own normalization; the patches of both are joined, DINOv2's numbers first.

Beside the keys of config.json there are some of ours, as it has no sizes of the towers:

    featurizer, fused_featurizer: the towers' sizes, read off the weights as far as they tell.
    means, stds: of both, from preprocessor_config.json, in the same order.
    film: whether the towers follow the instruction (OpenVLA-OFT's FiLM); their names then differ.
    image_filter, image_crop: how images are shrunk, and the share of their area that is kept.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vla_jax.models import weights as w
from vla_jax.models.backbones.base import Backbone, Layout, count_layers, merge_arch
from vla_jax.models.image import ImageSpec
from vla_jax.models.towers import vision_families
from vla_jax.models.towers.decoder import Decoder
from vla_jax.models.towers.decoder_spec import DecoderSpec
from vla_jax.models.towers.layers import ACTIVATIONS, Dense
from vla_jax.models.towers.resampler import AttentionPool, timm_pool_weights
from vla_jax.models.towers.text_families import LANGUAGES
from vla_jax.models.towers.vit import VisionSpec, VisionTransformer

# timm's vit_large_patch14_reg4_dinov2 and vit_so400m_patch14_siglip_224.
_DINO = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
_DINO |= {"intermediate_size": 4096, "patch_size": 14, "image_size": 224, "registers": 4}
_SIGLIP = {"hidden_size": 1152, "num_hidden_layers": 27, "num_attention_heads": 16}
_SIGLIP |= {"intermediate_size": 4304, "patch_size": 14, "image_size": 224, "registers": 0}
# config.json of the released model, reduced to what shapes and numbers depend on.
ARCH: dict[str, Any] = {
    "model_type": "openvla",
    "arch_specifier": "no-align+fused-gelu-mlp",
    "llm_backbone_id": "llama2-7b-pure",
    "use_fused_vision_backbone": True,
    "image_resize_strategy": "resize-naive",
    "pad_to_multiple_of": 64,
    "text_config": {
        "model_type": "llama",
        # Llama's 32000 and a padding token, up to the next multiple of 64.
        "vocab_size": 32064,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "hidden_act": "silu",
        # Of LlamaConfig, which the released files leave at its defaults.
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "pad_token_id": 32000,
        "tie_word_embeddings": False,
    },
    "featurizer": _DINO,
    "fused_featurizer": _SIGLIP,
    # As the release has them: ImageNet's, rounded to bfloat16, and SigLIP's.
    "means": ((0.484375, 0.455078125, 0.40625), (0.5, 0.5, 0.5)),
    "stds": ((0.228515625, 0.2236328125, 0.224609375), (0.5, 0.5, 0.5)),
    "film": False,
    "image_filter": "bicubic",
    "image_crop": 1.0,
}
TOWERS = ("featurizer", "fused_featurizer")
# Their `image_resize_strategy` -> our fit.
FITS = {"resize-naive": "squash", "letterbox": "pad", "resize-crop": "crop"}
LEGAL = {
    "arch_specifier": ("no-align+fused-gelu-mlp", "fused-gelu-mlp"),
    # There are Prismatic models with one tower too; this file builds two.
    "use_fused_vision_backbone": (True,),
    "image_resize_strategy": tuple(FITS),
    "image_filter": ("bicubic", "lanczos3"),
}
_VISION = "vision_backbone."


class Towers(nn.Module):
    """Both towers, and SigLIP's pooling head, which a checkpoint has and nothing reads."""

    specs: tuple[VisionSpec, VisionSpec]
    remat: str = "full"
    dtype: Any = jnp.float32

    def setup(self):
        dino, siglip = self.specs
        self.dino = VisionTransformer(dino, self.remat, self.dtype)
        self.siglip = VisionTransformer(siglip, self.remat, self.dtype)
        block = siglip.block
        self.pool = AttentionPool(block.heads, block.hidden, block.activation, dtype=self.dtype)

    def __call__(
        self,
        first: Float[Array, "b h h 3"],
        second: Float[Array, "b h h 3"],
        language: Float[Array, "b d"] | None,
    ) -> Float[Array, "b k v"]:
        """The image in the units of either tower -> joined patches."""
        patches = [self.dino(first, language).tokens, self.siglip(second, language).tokens]
        # Called once for its parameters, so that a checkpoint goes out as whole as it came in.
        if self.is_initializing():
            self.pool(patches[1])
        return jnp.concatenate(patches, axis=-1)


class Projector(nn.Module):
    """Three linear layers to the decoder's width, the first to four times the towers'."""

    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b k v"]) -> Float[Array, "b k d"]:
        for i, size in enumerate((4 * x.shape[-1], self.width, self.width), 1):
            x = x if i == 1 else ACTIVATIONS["gelu"](x)
            x = Dense((size,), dtype=self.dtype, name=f"fc{i}")(x)
        return x


class Prismatic(Backbone):
    """Legend: b batch · h height = width · k image tokens · d text width · v towers' width."""

    RELEASED = ARCH
    DEFAULT_CONFIG = "openvla_oft_libero"
    # The tokenizer writes <s>; the prompt's end is the stop token behind the actions.
    LAYOUT = Layout(bos=1, eos=1)
    # The blank before </s> is a token of its own, which training had before the actions.
    PROMPT = "In: What action should the robot take to {instruction}?\nOut: </s>"
    QUESTION = "In: {question}\nOut: </s>"
    FOR_EXPERT = True
    SIZES_FROM_WEIGHTS = True
    IGNORE = LANGUAGES["llama"].ignore
    # FiLM comes with fine-tuning; its zeros leave the towers as they were.
    FRESH = (r"/film_(scale|shift)/",)

    @classmethod
    def arch(cls, overrides: Mapping[str, Any], strict: bool = True) -> dict[str, Any]:
        """The released architecture with `overrides` applied.

        Raises:
            ValueError: as `merge_arch`, for parts that are not supported, and for towers whose
                images or patches differ.
        """
        merged, problems = merge_arch(ARCH, overrides, strict), []
        for key, values in LEGAL.items():
            if merged[key] not in values:
                problems.append(f"{key}: {merged[key]!r} is none of {list(values)}")
        dino, siglip = (merged[name] for name in TOWERS)
        for key in ("image_size", "patch_size"):
            if dino[key] != siglip[key]:
                problems.append(
                    f"featurizer.{key}: {dino[key]} is not fused_featurizer.{key}, {siglip[key]}"
                )
        if not 0 < merged["image_crop"] <= 1:
            problems.append(f"image_crop: {merged['image_crop']} is no share of an area")
        if problems:
            raise ValueError("backbone architecture:\n  " + "\n  ".join(problems))
        return merged

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """Sizes of the towers, but for their heads, which no shape tells; {} of other weights."""
        # FiLM wraps the towers in one more module, and so their prefix stands there twice.
        film = any(name.startswith(_VISION * 2) for name in shapes)
        root, inner = _VISION * (1 + film), "block." if film else ""
        sizes: dict[str, Any] = {"film": film}
        for tower in TOWERS:
            at = f"{root}{tower}."
            if f"{at}patch_embed.proj.weight" not in shapes:
                return {}
            width, _, side, _ = shapes[f"{at}patch_embed.proj.weight"]
            patches = shapes[f"{at}pos_embed"][1]
            sizes[tower] = {
                "hidden_size": width,
                "num_hidden_layers": count_layers(shapes, f"{at}blocks."),
                "intermediate_size": shapes[f"{at}blocks.0.{inner}mlp.fc1.weight"][0],
                "patch_size": side,
                # Images are square, so the number of patches is a square number.
                "image_size": side * round(patches**0.5),
                "registers": shapes.get(f"{at}reg_token", (0, 0))[1],
            }
        return sizes

    @classmethod
    def prompt_form(cls, arch: Mapping[str, Any]) -> str:
        """OpenVLA's; the first release was trained on Vicuna's chat."""
        vicuna = "vicuna" in arch.get("llm_backbone_id", "")
        return "openvla_v01" if vicuna else "openvla"

    @property
    def image_spec(self) -> ImageSpec:
        """Pixels in [0, 1]: each tower normalizes for itself."""
        c = self.config
        return ImageSpec(
            c["featurizer"]["image_size"],
            mean=(0.0, 0.0, 0.0),
            std=(1.0, 1.0, 1.0),
            resample=c["image_filter"],
            fit=FITS[c["image_resize_strategy"]],
            # Their processor crops with torchvision, which rounds half of an odd margin to even.
            crop_rounding="half_even",
            # Their processor fills margins with the mean of the last tower alone.
            background=tuple(c["means"][-1]),
            zoom=c["image_crop"],
        )

    @property
    def vision_specs(self) -> tuple[VisionSpec, VisionSpec]:
        """Both towers' sizes."""
        dino, siglip = (
            vision_families.prismatic(self.config[name], self.config["film"]) for name in TOWERS
        )
        return dino, siglip

    @property
    def follows_language(self) -> bool:
        """Whether the towers have FiLM."""
        return self.config["film"]

    @property
    def image_tokens(self) -> int:
        """Tokens of one image: its patches."""
        return self.vision_specs[0].tokens

    @property
    def text_spec(self) -> DecoderSpec:
        """Sizes of the language model."""
        return LANGUAGES["llama"].spec(self.config["text_config"])

    @property
    def token_end(self) -> int:
        """First id above the actions': the tokenizer's words, without what pads the vocabulary."""
        return self.vocab_size - self.config["pad_to_multiple_of"]

    @property
    def padding_id(self) -> int:
        """Id whose embedding no gradient reaches."""
        return self.config["text_config"]["pad_token_id"]

    def setup(self):
        self.vision = Towers(self.vision_specs, self.remat, self.dtype)
        self.projection = Projector(self.width, self.dtype)
        self.text = Decoder(self.text_spec, self.remat, self.dtype)

    def encode_images(
        self, images: Float[Array, "b h h 3"], language: Float[Array, "b d"] | None = None
    ) -> Float[Array, "b k d"]:
        """Pixels in [0, 1], and with FiLM a vector of the instruction -> image tokens."""
        return self.projection(self.patches(images, language))

    def patches(
        self, images: Float[Array, "b h h 3"], language: Float[Array, "b d"] | None = None
    ) -> Float[Array, "b k v"]:
        """The same before the projector."""
        units = zip(self.config["means"], self.config["stds"], strict=True)
        first, second = (
            (images - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)
            for mean, std in units
        )
        return self.vision(first, second, language)

    def weight_map(self) -> list[w.Weight]:
        """Every parameter of OpenVLA; targets are relative to `backbone/`."""
        root = _VISION * (1 + self.config["film"])
        text = LANGUAGES["llama"].weights(self.text_spec)
        rows = w.prefixed(timm_pool_weights(), f"{root}fused_featurizer.attn_pool.", "vision/pool/")
        for spec, original, ours in zip(self.vision_specs, TOWERS, ("dino", "siglip"), strict=True):
            rows += vision_families.prismatic_weights(spec, f"{root}{original}.", f"vision/{ours}/")
        for i in (1, 2, 3):
            rows += w.pair(f"projector.fc{i}", f"projection/fc{i}")
        return [*rows, *w.prefixed(text, "language_model.", "text/")]
