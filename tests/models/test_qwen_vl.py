"""What only Qwen-VL has: marks around an image, and what changes beyond its length."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import qwen_vl_ph
from configs import tiny as tiny_configs
from tests.models import tiny
from vla_jax.config import resolve
from vla_jax.models import vla
from vla_jax.models.backbones import qwen_vl
from vla_jax.models.backbones.base import Tokens

N = 24  # columns, half again the tiny model's seq_length


@pytest.fixture(scope="module")
def small():
    model, params = tiny.build(tiny.config("policy_head", "lstm", backbone="qwen_vl"))
    return model, params["backbone"]


def sequence(n=N, seed=0):
    rng = np.random.default_rng(seed)
    embeds = jnp.asarray(rng.normal(size=(2, n, tiny_configs.WIDTH)), jnp.float32)
    return Tokens(embeds, jnp.ones((2, n), bool), jnp.full((2, n), -1))


def run(arch, params, tokens, **changes):
    backbone = qwen_vl.QwenVL({**arch, **changes}, "none")
    return np.asarray(jax.jit(backbone.apply)({"params": params}, tokens))


@pytest.mark.parametrize(
    ("length", "factor"), [(1, 1), (2048, 1), (2049, 3), (4096, 3), (4097, 7), (8193, 15)]
)
def test_frequencies_follow_the_length(length, factor):
    last = jnp.array([[length - 1]])
    (cos, _), gain = qwen_vl.far(qwen_vl.ARCH, length, last)
    theta = 10000.0 * factor ** (128 / 126)
    angle = np.float64(length - 1) * theta ** (-np.arange(64) / 64)
    np.testing.assert_allclose(cos[0, 0], np.cos(angle), atol=1e-3)
    if length <= 2048:
        assert gain is None
    else:
        np.testing.assert_allclose(np.asarray(gain), [[math.log(length, 2048)]], rtol=1e-6)
        (_, _), first = qwen_vl.far(qwen_vl.ARCH, length, jnp.array([[0, 2047]]))
        np.testing.assert_allclose(np.asarray(first), 1.0, rtol=1e-6)


@pytest.mark.slow
def test_both_change_what_is_beyond_the_length_and_nothing_before(small):
    model, params = small
    plain = {"use_dynamic_ntk": False, "use_logn_attn": False}
    short = sequence(model.arch["seq_length"])
    np.testing.assert_array_equal(
        run(model.arch, params, short), run(model.arch, params, short, **plain)
    )
    both, neither, loud, slow = (
        run(model.arch, params, sequence(), **changes)
        for changes in (
            {}, plain, {"use_dynamic_ntk": False}, {"use_logn_attn": False}
        )
    )  # fmt: skip
    limit = model.arch["seq_length"]
    np.testing.assert_allclose(loud[:, :limit], neither[:, :limit], atol=1e-6)
    assert np.abs(loud - neither)[:, limit:].max() > 1e-3
    assert np.abs(slow - neither)[:, 1:limit].max() > 1e-3  # the whole sequence
    assert min(np.abs(both - other).max() for other in (neither, loud, slow)) > 1e-3


@pytest.mark.slow
def test_a_cache_goes_beyond_the_length_as_one_pass_does(small):
    model, params = small
    backbone, tokens = qwen_vl.QwenVL(model.arch, "none"), sequence()
    expected = run(model.arch, params, tokens)
    extend = jax.jit(lambda t, c: backbone.apply({"params": params}, t, c, method="extend"))
    cache, got = backbone.apply({}, 2, N, method="empty_cache"), []
    for begin, end in ((0, 10), (10, 15), (15, 20), (20, 24)):
        part = Tokens(*(x[:, begin:end] for x in tokens[:3]))
        hidden, cache = extend(part, cache)
        got.append(hidden)
    np.testing.assert_allclose(np.concatenate(got, axis=1), expected, atol=1e-5)


@pytest.mark.parametrize("resampler", [0, 3])
def test_marks_stand_around_every_image(resampler):
    changes = {"structure.resampler": resampler}
    config = tiny.config("policy_head", "lstm", backbone="qwen_vl", **changes)
    model, params = tiny.build(config)
    observation = tiny.observe(window=1, size=model.image.size)
    tokens = jax.jit(lambda p: model.apply({"params": p}, observation, method="encode"))(params)
    each = resampler + 2 if resampler else qwen_vl.QwenVL(model.arch).image_tokens
    assert len(config.structure.cameras) * each == model.step_tokens
    assert tokens.shape == (2, 1, 2 * each, tiny_configs.WIDTH)
    start = model.arch["visual"]["image_start_id"]
    table = np.asarray(params["backbone"]["text"]["embedding"])
    for first in (0, each):
        np.testing.assert_array_equal(tokens[0, 0, first], table[start])
        np.testing.assert_array_equal(tokens[0, 0, first + each - 1], table[start + 1])


def test_the_config_freezes_the_tower_and_nothing_else():
    config = resolve(qwen_vl_ph.get_config())
    assert vla.build(config.model).arch == qwen_vl.ARCH
    for row in qwen_vl.QwenVL(qwen_vl.ARCH).weight_map():
        frozen = any(re.search(p, f"backbone/{row.target}") for p in config.optim.frozen)
        assert frozen == row.source.startswith("transformer.visual."), row
