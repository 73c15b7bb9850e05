"""Backbones whose config.json leaves out what their weights tell: Moondream2 and UForm-Gen."""

import json
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from configs.tiny import ARCHS
from tests import arrays
from tests.models import tiny
from vla_jax.config import ModelConfig
from vla_jax.convert import maps
from vla_jax.convert.hf import source as hf
from vla_jax.models import weights
from vla_jax.models.backbones import BACKBONES, moondream, uform
from vla_jax.models.backbones.moondream import Moondream
from vla_jax.models.backbones.uform import UForm
from vla_jax.rules import flatten

SIDES = {"num_hidden_layers": 2, "num_attention_heads": 1, "intermediate_size": 24}
MOONDREAM = {
    "vision_config": {
        **SIDES,
        "hidden_size": 72,
        "patch_size": 7,
        "image_size": 28,
        "projection_dim": 40,
    },
    "text_config": {**SIDES, "vocab_size": 40, "hidden_size": 64},
}
LLAMA = {**uform._LLAMA, "hidden_size": 128}
# case -> backbone, its architecture, what its config.json says
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    f"moondream, {streams} streams": (
        "moondream",
        {**MOONDREAM, "vision_config": {**MOONDREAM["vision_config"], "streams": streams}},
        {"model_type": "moondream1", "text_config": {"model_type": "phi"}},
    )
    for streams in (1, 2)
}
for first, facts in ((True, LLAMA), (False, {"hidden_size": 64})):
    CASES[f"uform, generation {1 if first else 2}"] = (
        "uform",
        {
            **ARCHS["uform"],
            "image_encoder_embedding_dim": 8 if first else 0,
            "image_encoder_class_token": first,
            "image_pooler_project_first": first,
            "text_config": {
                **ARCHS["uform"]["text_config"],
                **facts,
                "num_attention_heads": 1,
                "num_key_value_heads": 1,
            },
        },
        {"model_type": "vlm", "image_encoder_num_heads": 2, "image_pooler_num_attn_heads": 2},
    )


def with_arch(name: str, arch: dict[str, Any]) -> ModelConfig:
    config = tiny.config("policy_head", "lstm", backbone=name)
    return replace(config, backbone=replace(config.backbone, arch=arch))


def random(name: str, arch: dict[str, Any]) -> tuple[ModelConfig, Any, dict[str, np.ndarray]]:
    """A model config, its weights, and those under the names of the checkpoint, without aliases."""
    config = with_arch(name, arch)
    _, params = tiny.build(config)
    flat = jax.tree.map(np.asarray, flatten(params))
    reference: dict[str, np.ndarray] = {}
    for row in maps.hugging_face(config)[0]:
        if not row.alias:
            reference |= arrays.to_theirs(row, flat)
    return config, params, reference


@pytest.mark.parametrize("case", CASES)
def test_sizes_are_read_off_the_weights(case, tmp_path):
    name, overrides, message = CASES[case]
    backbone = BACKBONES[name]
    config, params, reference = random(name, overrides)
    save_file(reference, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(message))
    asked = with_arch(name, {})
    result = hf.read_arch(tmp_path, asked)
    assert result == backbone.arch(overrides)
    # With a RoboVLMs checkpoint its shapes are given, and there may be no folder.
    shapes = {key: value.shape for key, value in reference.items()}
    assert hf.read_arch(tmp_path, asked, shapes) == result
    assert hf.read_arch(None, asked, {}) == backbone.arch({})
    ours = {f"backbone/{path}": leaf.shape for path, leaf in flatten(params["backbone"]).items()}
    loaded = hf.load(tmp_path, config, ours, lambda _, value: value)
    for path, leaf in flatten(params["backbone"]).items():
        np.testing.assert_array_equal(loaded[f"backbone/{path}"], leaf)


def test_names_of_2025(tmp_path):
    """Under the names of later releases, in whichever wrapper, the same weights."""
    _, _, reference = random("moondream", MOONDREAM)
    later = {
        moondream._VISION + "patch_embed.linear.": "vision.patch_emb.",
        moondream._VISION + "pos_embed": "vision.pos_emb",
        moondream._VISION + "norm.": "vision.post_ln.",
        moondream._VISION + "blocks.": "vision.blocks.",
        "vision_encoder.projection.mlp.": "vision.proj_mlp.",
        "text_model.transformer.embd.wte.weight": "text.wte",
        "text_model.transformer.h.": "text.blocks.",
        "text_model.lm_head.ln.": "text.post_ln.",
        "text_model.lm_head.linear.": "text.lm_head.",
        ".norm1.": ".ln1.",
        ".norm2.": ".ln2.",
        ".mixer.Wqkv.": ".attn.qkv.",
        ".mixer.out_proj.": ".attn.proj.",
    }
    named = {}
    for name, value in reference.items():
        for old, new in later.items():
            name = name.replace(old, new)
        named["model." + name] = value
    named["model.region.coord_encoder.weight"] = np.zeros((2, 2), np.float32)
    save_file(named, tmp_path / "model.safetensors")
    config = with_arch("moondream", {})
    source = hf.open_source(tmp_path, config)
    assert set(source.shapes) - set(reference) == {"model.region.coord_encoder.weight"}
    for name, value in reference.items():
        np.testing.assert_array_equal(source.read(name), value)
    assert weights.ignored("model.region.coord_encoder.weight", Moondream.IGNORE)


@pytest.mark.slow
def test_cameras_of_different_sizes():
    """One in four tiles, one in none; each gives the tokens it gives alone."""
    model, params = tiny.build(tiny.config("policy_head", "lstm", backbone="moondream"))
    size = model.image.size
    observed, large = tiny.observe(size=size), tiny.observe(size=2 * size, seed=1)

    encode = jax.jit(lambda seen: model.apply({"params": params}, seen, method="encode"))

    def tokens(images):
        observation = observed.__class__(**{**vars(observed), "images": images})
        encoded: Any = encode(observation)
        return jnp.split(encoded, 2, axis=2)  # the last camera first

    mixed = tokens({"primary": large.images["primary"], "wrist": observed.images["wrist"]})
    np.testing.assert_allclose(mixed[0], tokens(observed.images)[0], atol=1e-5)
    np.testing.assert_allclose(mixed[1], tokens(large.images)[1], atol=1e-5)
    assert not np.allclose(mixed[1], tokens(observed.images)[1], atol=0.1)


def test_images_of_both_generations():
    for first, fit in ((True, "crop"), (False, "pad")):
        spec = UForm(UForm.arch({"image_pooler_project_first": first})).image_spec
        assert (spec.fit, spec.size) == (fit, 336)
    spec = Moondream(Moondream.arch({})).image_spec
    assert spec.shape_for(1080, 1920) == (378, 756)
    assert spec.shape_for(200, 200) == (378, 378)
    single = Moondream(Moondream.arch({"vision_config": {"streams": 1}})).image_spec
    assert single.shape_for(1080, 1920) == (378, 378)
