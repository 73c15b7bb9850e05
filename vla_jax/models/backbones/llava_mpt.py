"""LLaVA on MPT: CLIP's next to last layer, a linear map, MPT-7B-Chat.

Released as liuhaotian/LLaVA-Lightning-MPT-7B-preview.

Hugging Face has no class of it: the names are those of the llava package.
"""

from collections.abc import Mapping
from typing import Any

from vla_jax.models import weights as w
from vla_jax.models.backbones import llava_parts as shared
from vla_jax.models.backbones.base import Layout, merge_arch
from vla_jax.models.towers.text_families import LANGUAGES

# config.json of the released model, reduced to what shapes and numbers depend on. Its tower is
# given there by name; `vision_config` spells it out, as Hugging Face does.
ARCH: dict[str, Any] = {
    "model_type": "llava_mpt",
    "vocab_size": 50282,
    "d_model": 4096,
    "n_layers": 32,
    "n_heads": 32,
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
    "attn_config": {
        "alibi": True,
        "alibi_bias_max": 8,
        "attn_pdrop": 0.0,
        "clip_qkv": None,
        "prefix_lm": False,
        "qk_ln": False,
        "softmax_scale": None,
    },
    "mm_projector_type": "linear",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",  # patch: the patches; cls_patch: and the class token
    "vision_config": shared.tower_of("openai/clip-vit-large-patch14"),
}
LEGAL = {
    "attn_config.alibi": (True,),
    "attn_config.prefix_lm": (False,),
    "attn_config.qk_ln": (False,),
    "mm_vision_select_feature": ("patch", "cls_patch"),
    "vision_config.model_type": ("clip_vision_model",),
}


class LlavaMPT(shared.LlavaFamily):
    """CLIP and MPT."""

    RELEASED = ARCH
    DEFAULT_CONFIG = "llava_mpt_ph"
    # The tokenizer (GPT-NeoX's) has <|endoftext|> and writes it neither before nor behind a text.
    LAYOUT = Layout(bos=0, eos=0)
    # RoboVLMs asks whether it has one: images go behind the first word, actions before the last.
    ORIGINAL_LAYOUT = Layout(bos=1, eos=1)
    # The tokenizer's 50254 pieces less 4 special tokens less 10, as RoboVLMs counts.
    ACTION_TOKEN_END = 50240
    # Buffers older dumps contain; they carry nothing.
    IGNORE = (r"embeddings\.position_ids$",)

    @classmethod
    def arch(cls, overrides: Mapping[str, Any], strict: bool = True) -> dict[str, Any]:
        """The released architecture with `overrides` applied; see `base.merge_arch`.

        Raises:
            ValueError: as `merge_arch`, and for parts that are not supported.
        """
        if not strict and "vision_config" not in overrides and "mm_vision_tower" in overrides:
            # The file has the tower's name alone, and its sizes must be known without the hub.
            tower = shared.tower_of(overrides["mm_vision_tower"])
            overrides = {**overrides, "vision_config": tower}
        return shared.check(merge_arch(ARCH, overrides, strict), LEGAL)

    @property
    def parts(self) -> shared.Parts:
        """Sizes of the parts; the language model's keys lie at its top."""
        return shared.assemble(
            self.config,
            LANGUAGES["mpt"].spec(self.config),
            take=self.config["mm_vision_select_layer"],
            keep_class=self.config["mm_vision_select_feature"] == "cls_patch",
        )

    @property
    def width(self) -> int:
        """Width of the hidden states the structure works on."""
        return self.config["d_model"]

    @property
    def vocab_size(self) -> int:
        """Ids the decoder knows."""
        return self.config["vocab_size"]

    def weight_map(self) -> list[w.Weight]:
        """Every parameter, for RoboVLMs' checkpoints too; targets are relative to `backbone/`."""
        p, top = self.parts, "transformer."
        tower = top + "vision_tower.vision_tower.vision_model."
        linear = shared.mm_projector(p.depth, top + "mm_projector")
        return shared.rows(p, tower, linear, LANGUAGES["mpt"].weights(p.text))
