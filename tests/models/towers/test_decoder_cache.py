"""Token by token with a cache gives what one pass over the whole sequence gives."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.towers.test_decoder import BLOCK, SPEC, Gate, jitted, random_params
from vla_jax.models.towers.decoder import Decoder, empty_cache
from vla_jax.models.towers.decoder_spec import Insert
from vla_jax.models.towers.layers import Rope

PLAIN = dataclasses.replace(SPEC, rope=None)
SPECS = {
    "rotary": SPEC,
    "alibi": dataclasses.replace(PLAIN, alibi=8.0),
    "sinusoid": dataclasses.replace(PLAIN, positions="sinusoid", first_position=2),
    "learned": dataclasses.replace(
        PLAIN, positions="learned", max_positions=16, first_position=2, count_padding=False
    ),
    "local": dataclasses.replace(SPEC, window=3, local=(True, False, True, False)),
    "q_norm": dataclasses.replace(SPEC, block=dataclasses.replace(BLOCK, qk_norm="rms")),
    "parallel": dataclasses.replace(
        SPEC, block=dataclasses.replace(BLOCK, residual="parallel", kv_heads=2, soft_cap=1.0)
    ),
}
# Prompts of 3 and 5 tokens, then 4 more each.
LENGTHS, MORE = np.array([3, 5]), 4


@pytest.mark.parametrize("kind", [*SPECS, "inserts"])
def test_cache_equals_recomputation(kind):
    insert = Insert(2, Gate) if kind == "inserts" else None
    spec = SPECS["local" if insert else kind]
    model = Decoder(spec, "none", insert=insert)
    b, n = 2, int(LENGTHS.max())
    full = np.random.default_rng(3).normal(size=(b, n + MORE, spec.width)).astype(np.float32)
    observed = np.arange(n + MORE) < LENGTHS[:, None] + MORE
    context = jnp.ones((b, 1, spec.width))
    args = (jnp.asarray(full), jnp.asarray(observed), None, None, context)
    params = random_params(model, *args)
    run = jitted(model, "run")
    expected = np.asarray(run(params, *args).hidden)

    valid = np.arange(n) < LENGTHS[:, None]
    prompt = np.where(valid[..., None], full[:, :n], np.float32(9.0))  # padding must not matter
    args = (jnp.asarray(prompt), jnp.asarray(valid), None, None, context)
    result = run(params, *args, cache=empty_cache(spec, b, n + MORE + 1))
    np.testing.assert_allclose(np.asarray(result.hidden)[valid], expected[:, :n][valid], atol=1e-5)
    for step in range(MORE):
        column = LENGTHS + step
        single = jnp.asarray(full[np.arange(b), column][:, None])
        result = run(
            params, single, jnp.ones((b, 1), bool), None, None, context, cache=result.cache
        )
        got = np.asarray(result.hidden[:, 0])
        np.testing.assert_allclose(got, expected[np.arange(b), column], atol=1e-5)
    np.testing.assert_array_equal(result.cache.length, LENGTHS + MORE)


def test_several_tokens_at_once():
    """A second chunk of several tokens, right-padded in one row, as interleaved streaming needs."""
    model = Decoder(SPEC, "none")
    x = jax.random.normal(jax.random.key(0), (2, 8, SPEC.width))
    params = random_params(model, x, jnp.ones((2, 8), bool))
    run = jitted(model, "run")
    first = run(params, x[:, :3], jnp.ones((2, 3), bool), cache=empty_cache(SPEC, 2, 10))
    valid = jnp.asarray([[True, True, True], [True, False, False]])
    second = run(params, x[:, 3:6], valid, cache=first.cache)
    np.testing.assert_array_equal(second.cache.length, [6, 4])
    third = run(params, x[:, 6:], jnp.ones((2, 2), bool), cache=second.cache)
    full = run(params, x, jnp.ones((2, 8), bool)).hidden
    np.testing.assert_allclose(second.hidden[0], full[0, 3:6], atol=1e-5)
    np.testing.assert_allclose(third.hidden[0], full[0, 6:], atol=1e-5)
    short = jnp.concatenate([x[1:, :4], x[1:, 6:]], axis=1)
    expected = run(params, short, jnp.ones((1, 6), bool)).hidden
    np.testing.assert_allclose(third.hidden[1], expected[0, 4:], atol=1e-5)


def test_prefix_then_causal():
    """A prefix that sees itself entirely, cached; what follows is causal."""
    model = Decoder(SPEC, "none")
    x = jax.random.normal(jax.random.key(0), (2, 7, SPEC.width))
    ones = jnp.ones((2, 7), bool)
    params = random_params(model, x, ones)
    run = jitted(model, "run")
    prefix = jnp.broadcast_to(jnp.arange(7) < 4, (2, 7))
    full = run(params, x, ones, prefix=prefix).hidden
    empty = empty_cache(SPEC, 2, 9)
    cached = run(params, x[:, :4], ones[:, :4], cache=empty, prefix=prefix[:, :4])
    np.testing.assert_allclose(cached.hidden, full[:, :4], atol=1e-5)
    remainder = run(params, x[:, 4:], ones[:, 4:], cache=cached.cache)
    np.testing.assert_allclose(remainder.hidden, full[:, 4:], atol=1e-5)


def test_a_second_prefix_behind_a_cache():
    """Seen entirely by itself, and by nothing before it; a cache of more slots than tokens."""
    model = Decoder(SPECS["local"], "none")
    x = jax.random.normal(jax.random.key(0), (2, 9, SPEC.width))
    ones = jnp.ones((2, 9), bool)
    params = random_params(model, x, ones)
    run = jitted(model, "run")
    column = jnp.arange(9)
    prefix = jnp.broadcast_to((column < 4) | (column >= 5), (2, 9))
    full = run(params, x, ones, prefix=prefix).hidden
    cache, parts = empty_cache(SPECS["local"], 2, 12), []
    for begin, end in ((0, 4), (4, 5), (5, 9)):
        part = slice(begin, end)
        result = run(params, x[:, part], ones[:, part], cache=cache, prefix=prefix[:, part])
        cache = result.cache
        parts.append(result.hidden)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), full, atol=1e-5)


def test_shapes_are_static():
    """One compilation serves every step, and the cache keeps the activations' dtype."""
    model = Decoder(dataclasses.replace(SPEC, rope=Rope(100.0, 4)), "none", jnp.bfloat16)
    x = jnp.ones((2, 1, SPEC.width), jnp.bfloat16)
    params = random_params(model, x, jnp.ones((2, 1), bool))
    run = jax.jit(functools.partial(model.apply, method="run"))
    cache = empty_cache(SPEC, 2, 5, jnp.bfloat16)
    assert cache.keys.shape == (4, 2, 5, 1, 4)
    for _ in range(4):
        new = run(params, x, jnp.ones((2, 1), bool), cache=cache).cache
        assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, cache)
        assert new.keys.dtype == jnp.bfloat16
        cache = new
    assert run._cache_size() == 1  # type: ignore
