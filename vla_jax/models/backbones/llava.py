"""LLaVA-1.5: CLIP's next to last layer, a perceptron, Vicuna (llava-hf/llava-1.5-7b-hf).

Names are Hugging Face's; folders of the llava package (liuhaotian/llava-v1.5-7b) are read too, and
RoboVLMs' checkpoints have its names.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from vla_jax.models import weights as w
from vla_jax.models.backbones import llava_parts as shared
from vla_jax.models.backbones.base import Layout, merge_arch
from vla_jax.models.towers.text_families import LANGUAGES
from vla_jax.moved import names_of

# config.json of the released model, reduced to what shapes and numbers depend on.
ARCH: dict[str, Any] = {
    "model_type": "llava",
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",  # default: the patches; full: and the class token
    "projector_hidden_act": "gelu",
    "mm_projector_type": "mlp2x_gelu",  # of the llava package; Hugging Face knows this one only
    "vision_config": shared.CLIP,
    "text_config": {
        "model_type": "llama",
        "vocab_size": 32064,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "head_dim": None,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "rope_parameters": None,
        # Type of the table of cosines and sines. The llava package loads a model in float16 and,
        # up to transformers 4.37, makes the table in it: casting the model leaves it so rounded.
        "rope_dtype": None,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
    },
}
LEGAL = {
    "vision_config.model_type": ("clip_vision_model",),
    "vision_feature_select_strategy": ("default", "full"),
    "text_config.model_type": ("llama",),
    "text_config.rope_dtype": (None, "float16", "bfloat16"),
}


def _from_original(config: Mapping[str, Any]) -> dict[str, Any]:
    kind, selected = config.get("model_type"), config.get("mm_vision_select_feature", "patch")
    # The package's file is flat: the language model's keys lie among all others.
    text = {key: config[key] for key in ARCH["text_config"] if key in config}
    return {
        # Any other kind is passed on, so that `merge_arch` refuses it by its name.
        "model_type": "llava" if kind in ("llava_llama", None) else kind,
        "text_config": {**text, "model_type": "llama"},
        "vision_config": shared.tower_of(config["mm_vision_tower"]),
        "vision_feature_layer": config.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": {"patch": "default", "cls_patch": "full"}.get(
            selected, selected
        ),
        # The package, too, takes a file without this key for one linear layer.
        "mm_projector_type": config.get("mm_projector_type", "linear"),
    }


class Llava(shared.LlavaFamily):
    """CLIP and Vicuna."""

    RELEASED = ARCH
    DEFAULT_CONFIG = "llava_ph"
    # The tokenizer writes <s> and no </s>.
    LAYOUT = Layout(bos=1, eos=0)
    # RoboVLMs asks whether it has one: actions go before the last word.
    ORIGINAL_LAYOUT = Layout(bos=1, eos=1)
    # The tokenizer's 32000 pieces less 4 special tokens less 10, as RoboVLMs counts.
    ACTION_TOKEN_END = 31986
    RENAMES = (
        # The llava package.
        (r"model\.vision_tower\.vision_tower\.", "vision_tower."),
        (r"model\.mm_projector\.(?=weight|bias)", "multi_modal_projector.linear_1."),
        (r"model\.mm_projector\.0\.", "multi_modal_projector.linear_1."),
        (r"model\.mm_projector\.2\.", "multi_modal_projector.linear_2."),
        (r"model\.(embed_tokens|layers|norm)\.", r"language_model.model.\1."),
        # transformers 5 leaves `vision_model` out, with `model.` in front or without.
        (r"(?:model\.)?vision_tower\.(vision_model\.)?", "vision_tower.vision_model."),
        (r"model\.multi_modal_projector\.", "multi_modal_projector."),
        (r"model\.language_model\.", "language_model.model."),
        (r"lm_head\.", "language_model.lm_head."),
    )
    # Buffers older dumps contain; they carry nothing.
    IGNORE = (r"embeddings\.position_ids$", *LANGUAGES["llama"].ignore)

    @classmethod
    def arch(cls, overrides: Mapping[str, Any], strict: bool = True) -> dict[str, Any]:
        """The released architecture with `overrides` applied; see `base.merge_arch`.

        A config.json of the llava package, which is flat, is understood too.

        Raises:
            ValueError: as `merge_arch`, and for parts that are not supported.
        """
        # A user's own changes (strict) are nested as Hugging Face's already.
        if not strict and "text_config" not in overrides and "mm_vision_tower" in overrides:
            overrides = _from_original(overrides)
        return shared.check(merge_arch(ARCH, overrides, strict), LEGAL)

    @property
    def parts(self) -> shared.Parts:
        """Sizes of the tower, the projector and the decoder."""
        text = LANGUAGES["llama"].spec(self.config["text_config"])
        if text.rope:
            rope = dataclasses.replace(text.rope, rounded=self.config["text_config"]["rope_dtype"])
            text = dataclasses.replace(text, rope=rope)
        return shared.assemble(
            self.config,
            text,
            take=self.config["vision_feature_layer"],
            keep_class=self.config["vision_feature_select_strategy"] == "full",
            activation=self.config["projector_hidden_act"],
        )

    def weight_map(self) -> list[w.Weight]:
        """Every parameter of the Hugging Face model; targets are relative to `backbone/`."""
        p = self.parts
        linear = [f"multi_modal_projector.linear_{i + 1}" for i in range(p.depth)]
        text = LANGUAGES["llama"].weights(p.text)
        return shared.rows(
            p, "vision_tower.vision_model.", linear, w.prefixed(text, "language_model.", "")
        )

    def robovlms_map(self) -> list[w.Weight]:
        """The same under the llava package's names."""
        p = self.parts
        tower = "model.vision_tower.vision_tower.vision_model."
        linear = shared.mm_projector(p.depth, "model.mm_projector")
        return shared.rows(p, tower, linear, LANGUAGES["llama"].weights(p.text))


__getattr__ = names_of(__name__)
