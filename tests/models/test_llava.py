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
from vla_jax.models.backbones import llava, llava_mpt
from vla_jax.models.towers.layers import Rope

FLAT = {
    "model_type": "llava_llama", "vocab_size": 32000, "hidden_size": 5120, "num_hidden_layers": 40,
    "num_attention_heads": 40, "intermediate_size": 13824, "rms_norm_eps": 1e-5, "use_cache": True,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_vision_select_layer": -2,
    "mm_projector_type": "mlp2x_gelu", "mm_hidden_size": 1024,
}  # fmt: skip


def test_a_flat_config_is_understood():
    arch = llava.arch(FLAT, strict=False)
    assert llava.arch(arch) == arch
    assert (llava.width(arch), llava.vocab_size(arch), llava.image_tokens(arch)) == (
        5120, 32000, 576
    )  # fmt: skip
    parts = llava.parts(arch)
    assert (parts.depth, parts.text.layers, parts.text.block.hidden) == (2, 40, 13824)
    first = {k: v for k, v in FLAT.items() if k != "mm_projector_type"}
    first["mm_vision_tower"] = "checkpoints/clip-vit-large-patch14/"
    arch = llava.arch(first, strict=False)
    assert (llava.parts(arch).depth, llava.image_spec(arch).size) == (1, 224)
    mpt = {"model_type": "llava_mpt", "mm_vision_tower": FLAT["mm_vision_tower"]}
    assert llava_mpt.image_tokens(llava_mpt.arch(mpt, strict=False)) == 576
    assert llava_mpt.image_tokens(llava_mpt.arch({})) == 256


@pytest.mark.parametrize(
    ("file", "config", "words"),
    [
        (llava, {**FLAT, "mm_vision_tower": "siglip"}, ["'siglip' is neither"]),
        (llava, {**FLAT, "model_type": "llava_mpt"}, ["of 'llava_mpt', expected 'llava'"]),
        (
            llava,
            {"text_config": {"model_type": "mistral"}, "mm_projector_type": "resampler"},
            ["text_config.model_type: 'mistral' is none of ['llama']", "'resampler' is none of"],
        ),
        (llava_mpt, {"attn_config": {"alibi": False}}, ["attn_config.alibi: False is none of"]),
    ],
)
def test_what_is_not_supported_is_refused(file, config, words):
    with pytest.raises(ValueError, match=re.escape(words[0])) as error:
        file.arch(config, strict=False)
    for word in words:
        assert word in str(error.value)


def test_every_name_of_the_package_becomes_hugging_faces():
    arch = llava.arch({"text_config": {"num_hidden_layers": 2}})
    theirs, ours = (sorted(map_of(arch), key=lambda row: row.target) for map_of in (
        llava.robovlms_map, llava.weight_map
    ))  # fmt: skip
    assert len(theirs) == len({row.source for row in theirs})
    for a, b in zip(theirs, ours, strict=True):
        assert a.target == b.target
        assert renamed(a.source, llava.RENAMES) == b.source


def test_layouts_fit_what_the_tokenizers_write(tmp_path):
    """Vicuna's begins with <s>; MPT's writes words alone, and neither has an end."""
    words = {w: i for i, w in enumerate(["<unk>", "<s>", "</s>", "lift", "it"])}
    for file, template in ((llava, "<s> $A"), (llava_mpt, "$A")):
        backend = Backend(models.WordLevel(words, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
        backend.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
            single=template, special_tokens=[("<s>", 1)]
        )
        (tmp_path / "tokenizer.json").write_text(backend.to_str())
        settings = {"bos_token": "<s>", "eos_token": "</s>"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        prompt = file.PROMPT.format(instruction="lift it")
        ids, mask = Tokenizer.from_dir(tmp_path).encode(prompt, 5)
        assert ids[mask].tolist() == [1] * file.LAYOUT.bos + [3, 4] + [2] * file.LAYOUT.eos
        assert not ids[~mask].any()


def test_rotary_tables_can_be_rounded():
    positions = jnp.arange(20)[None]
    exact = Rope(1e4, 16)(positions)
    rounded = jax.jit(Rope(1e4, 16, rounded="float16"))(positions)
    for a, b in zip(exact, rounded, strict=True):
        assert (b == a.astype(jnp.float16).astype(jnp.float32)).all()
        assert (a != b).any()
