"""The TPU kernel of short sequences, run as plain operations, against their definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vla_jax.models.towers import short_attention

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("rows", "n", "s", "heads", "width", "causal", "rate"),
    [(2, 9, 9, 4, 64, True, 0.25), (2, 5, 7, 1, 128, False, 0.0), (1, 4, 6, 36, 64, False, 0.5)],
)
def test_numbers_and_gradients_are_those_of_the_definition(rows, n, s, heads, width, causal, rate):
    q, k, v, weight = (
        jnp.asarray(RNG.normal(size=(rows, length, heads * width)), jnp.float32)
        for length in (n, s, s, n)
    )
    valid = jnp.asarray(RNG.random((rows, 1, s)) < 0.7).at[:, :, 0].set(True)
    keep = jnp.asarray(RNG.random((rows, heads, n, s)) < 1 - rate) if rate else None
    how = short_attention.How(width, width**-0.5, causal, rate, interpret=True)
    words = None if keep is None else short_attention.packed(keep)

    def definition(q, k, v):
        q, k, v = (x.reshape(rows, -1, heads, width).swapaxes(1, 2) for x in (q, k, v))
        allowed = valid[:, None] & (jnp.tril(jnp.ones((n, s), bool)) if causal else True)
        scores = jnp.where(allowed, q @ k.swapaxes(2, 3) * how.scale, -1e30)
        weights = jax.nn.softmax(scores, -1)
        if keep is not None:
            weights = jnp.where(keep, weights / (1 - rate), 0)
        return (weights @ v).swapaxes(1, 2).reshape(rows, n, -1)

    def kernel(q, k, v):
        return short_attention.attend(how, q, k, v, valid.astype(jnp.int32), words)

    def both(function):
        total = jax.jit(jax.value_and_grad(lambda *x: (function(*x) * weight).sum(), (0, 1, 2)))
        return function(q, k, v), total(q, k, v)

    compare = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(compare, both(kernel), both(definition))


@pytest.mark.parametrize("heads", [1, 32, 40])
def test_a_bit_of_a_word_is_what_dropout_keeps_of_a_head(heads):
    keep = jnp.asarray(RNG.random((2, heads, 3, 4)) < 0.5)
    words = np.asarray(short_attention.packed(keep)).view(np.uint32)
    for head in range(heads):
        bits = words[:, head // 32] >> np.uint32(head % 32) & 1
        np.testing.assert_array_equal(bits, keep[:, head])


@pytest.mark.parametrize(
    ("heads", "width", "fits"), [(16, 64, True), (3, 64, False), (5, 128, True), (16, 72, False)]
)
def test_heads_must_fill_whole_registers(heads, width, fits):
    assert short_attention.fits(heads, width) == fits
