"""The llava package's folders, and what its tokenizers write."""

import json
import re

import jax
import jax.numpy as jnp
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, processors

from vla_jax.convert.tensors import renamed
from vla_jax.data.language.tokenizer import Tokenizer
from vla_jax.models.backbones.llava import Llava
from vla_jax.models.backbones.llava_mpt import LlavaMPT
from vla_jax.models.towers.layers import Rope

FLAT = {
    "model_type": "llava_llama", "vocab_size": 32000, "hidden_size": 5120, "num_hidden_layers": 40,
    "num_attention_heads": 40, "intermediate_size": 13824, "rms_norm_eps": 1e-5, "use_cache": True,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_vision_select_layer": -2,
    "mm_projector_type": "mlp2x_gelu", "mm_hidden_size": 1024,
}  # fmt: skip


def test_a_flat_config_is_understood():
    arch = Llava.arch(FLAT, strict=False)
    backbone = Llava(arch)
    assert Llava.arch(arch) == arch
    assert (backbone.width, backbone.vocab_size, backbone.image_tokens) == (
        5120, 32000, 576
    )  # fmt: skip
    parts = backbone.parts
    assert (parts.depth, parts.text.layers, parts.text.block.hidden) == (2, 40, 13824)
    first = {k: v for k, v in FLAT.items() if k != "mm_projector_type"}
    first["mm_vision_tower"] = "checkpoints/clip-vit-large-patch14/"
    arch = Llava.arch(first, strict=False)
    backbone = Llava(arch)
    assert (backbone.parts.depth, backbone.image_spec.size) == (1, 224)
    mpt = {"model_type": "llava_mpt", "mm_vision_tower": FLAT["mm_vision_tower"]}
    assert LlavaMPT(LlavaMPT.arch(mpt, strict=False)).image_tokens == 576
    assert LlavaMPT(LlavaMPT.arch({})).image_tokens == 256


@pytest.mark.parametrize(
    ("backbone", "config", "words"),
    [
        (Llava, {**FLAT, "mm_vision_tower": "siglip"}, ["'siglip' is neither"]),
        (Llava, {**FLAT, "model_type": "llava_mpt"}, ["of 'llava_mpt', expected 'llava'"]),
        (
            Llava,
            {"text_config": {"model_type": "mistral"}, "mm_projector_type": "resampler"},
            ["text_config.model_type: 'mistral' is none of ['llama']", "'resampler' is none of"],
        ),
        (LlavaMPT, {"attn_config": {"alibi": False}}, ["attn_config.alibi: False is none of"]),
    ],
)
def test_what_is_not_supported_is_refused(backbone, config, words):
    with pytest.raises(ValueError, match=re.escape(words[0])) as error:
        backbone.arch(config, strict=False)
    for word in words:
        assert word in str(error.value)


def test_every_name_of_the_package_becomes_hugging_faces():
    backbone = Llava(Llava.arch({"text_config": {"num_hidden_layers": 2}}))
    reference, ours = (sorted(map_of(), key=lambda row: row.target) for map_of in (
        backbone.robovlms_map, backbone.weight_map
    ))  # fmt: skip
    assert len(reference) == len({row.source for row in reference})
    for a, b in zip(reference, ours, strict=True):
        assert a.target == b.target
        assert renamed(a.source, Llava.RENAMES) == b.source


def test_layouts_fit_what_the_tokenizers_write(tmp_path):
    """Vicuna's begins with <s>; MPT's writes words alone, and neither has an end."""
    words = {w: i for i, w in enumerate(["<unk>", "<s>", "</s>", "lift", "it"])}
    for backbone, template in ((Llava, "<s> $A"), (LlavaMPT, "$A")):
        backend = Backend(models.WordLevel(words, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
        backend.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
            single=template, special_tokens=[("<s>", 1)]
        )
        (tmp_path / "tokenizer.json").write_text(backend.to_str())
        settings = {"bos_token": "<s>", "eos_token": "</s>"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        prompt = backbone.PROMPT.format(instruction="lift it")
        ids, mask = Tokenizer.from_dir(tmp_path).encode(prompt, 5)
        assert ids[mask].tolist() == [1] * backbone.LAYOUT.bos + [3, 4] + [2] * backbone.LAYOUT.eos
        assert not ids[~mask].any()


def test_rotary_tables_can_be_rounded():
    positions = jnp.arange(20)[None]
    exact = Rope(1e4, 16)(positions)
    rounded = jax.jit(Rope(1e4, 16, rounded="float16"))(positions)
    for a, b in zip(exact, rounded, strict=True):
        assert (b == a.astype(jnp.float16).astype(jnp.float32)).all()
        assert (a != b).any()
