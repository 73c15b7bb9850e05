"""The decoder's structure: scan, masks, positions, local layers, inserts, output matrices."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vla_jax.models.towers import decoder as tower
from vla_jax.models.towers import positions
from vla_jax.models.towers.block import Block, BlockSpec
from vla_jax.models.towers.decoder import Decoder
from vla_jax.models.towers.decoder_spec import DecoderSpec, Insert
from vla_jax.models.towers.layers import Dense, LayerNorm, Rope
from vla_jax.rules import flatten

BLOCK = BlockSpec(heads=2, hidden=12, activation="silu", gated=True, kv_heads=1)
SPEC = DecoderSpec(vocab=20, width=8, layers=4, block=BLOCK, rope=Rope(100.0, 4))
B, N = 2, 7
VALID = jnp.ones((B, N), bool)


def random_params(model: Decoder, *args, seed: int = 0):
    """Parameters drawn at random, so that no bias, scale or gate is neutral."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), *args)["params"]
    rng = np.random.default_rng(seed)
    draw = lambda leaf: jnp.asarray(0.4 * rng.normal(size=leaf.shape), leaf.dtype)  # noqa: E731
    return {"params": jax.tree.map(draw, shapes)}


def embeds(spec: DecoderSpec = SPEC, n: int = N, seed: int = 1) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (B, n, spec.width))


@functools.cache
def _jitted(model: Any, method: str, **static):
    return jax.jit(functools.partial(model.apply, method=method, **static))


def jitted(model: Decoder, method: str = "__call__", **static):
    """Compiled once for all tests of a model."""
    module: Any = model  # can be a key, which its type does not say
    return _jitted(module, method, **static)


@pytest.fixture(scope="module")
def plain():
    model = Decoder(SPEC, remat="none")
    return model, random_params(model, embeds(), VALID)


def influence(model: Decoder, params, i: int, *args, **more) -> set[int]:
    """Columns whose output changes with the input at column i."""
    run = jitted(model, "run")
    x = embeds(model.spec)
    # Not a constant: LayerNorm would take it out again.
    moved = x.at[:, i].multiply(-0.5)
    change = run(params, x, *args, **more).hidden - run(params, moved, *args, **more).hidden
    return set(np.flatnonzero(np.abs(change).max((0, 2)) > 1e-6).tolist())


@pytest.mark.parametrize(
    "remat", ["full", *(pytest.param(r, marks=pytest.mark.slow) for r in ("none", "dots"))]
)
def test_scan_equals_a_loop(remat):
    model = Decoder(SPEC, remat)
    params = random_params(model, embeds(), VALID)
    x, mask = embeds(), tower.causal_mask(VALID)

    def loop(params):
        p, y = params["params"], x
        rope = Rope(100.0, 4)(jnp.arange(N)[None])
        for i in range(SPEC.layers):
            single = jax.tree.map(lambda leaf, i=i: leaf[i], p["layers"])
            y, _ = Block(BLOCK).apply({"params": single}, y, mask, rope)
        return jnp.sum(LayerNorm().apply({"params": p["norm"]}, y) ** 3)  # type: ignore

    def scan(params):
        return jnp.sum(model.apply(params, x, VALID) ** 3)  # type: ignore

    got, expected = (jax.jit(jax.value_and_grad(f))(params) for f in (scan, loop))
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)
    for path, value in flatten(expected[1]).items():
        np.testing.assert_allclose(flatten(got[1])[path], value, rtol=1e-3, atol=1e-3)


def test_causal_by_default(plain):
    model, params = plain
    assert influence(model, params, 3, VALID) == {3, 4, 5, 6}


def test_padding_is_not_seen(plain):
    model, params = plain
    valid = VALID.at[:, 5:].set(False)
    assert influence(model, params, 6, valid) & set(range(5)) == set()
    assert influence(model, params, 5, valid.at[:, 6].set(True)) == {5}


def test_masks_given_explicitly(plain):
    model, params = plain
    everywhere = set(range(N))
    mask = tower.bidirectional_mask(VALID.at[:, 6].set(False))
    assert influence(model, params, 5, VALID, None, mask) == everywhere
    assert influence(model, params, 6, VALID, None, mask) == {6}
    odd = jnp.eye(N, dtype=bool)[None].at[:, 0, 5].set(True)
    assert influence(model, params, 5, VALID, None, odd) == {0, 5}
    assert influence(model, params, 2, VALID, None, odd) == {2}


def test_prefixes_see_all_of_themselves(plain):
    model, params = plain
    prefix = jnp.broadcast_to(jnp.array([1, 1, 1, 0, 1, 1, 0], bool), (B, N))
    see = functools.partial(influence, model, params, prefix=prefix)
    assert see(2, VALID) == set(range(N))
    assert see(3, VALID) == {3, 4, 5, 6}
    assert see(5, VALID) == {4, 5, 6}
    assert see(2, VALID.at[:, 2].set(False)) == {2}


def test_prefixes_in_local_layers():
    model = Decoder(dataclasses.replace(SPEC, layers=1, window=2, local=(True,)), "none")
    params = random_params(model, embeds(), VALID)
    prefix = jnp.broadcast_to(jnp.arange(N) < 4, (B, N))
    assert influence(model, params, 0, VALID, prefix=prefix) == {0, 1, 2, 3}
    assert influence(model, params, 3, VALID, prefix=prefix) == {0, 1, 2, 3, 4}
    assert influence(model, params, 0, VALID) == {0, 1}


def test_explicit_causal_mask_changes_nothing(plain):
    model, params = plain
    valid = VALID.at[1, 4:].set(False)
    run = jitted(model)
    result = run(params, embeds(), valid, jnp.arange(N)[None], tower.causal_mask(valid))
    np.testing.assert_array_equal(run(params, embeds(), valid), result)


def test_positions_given_explicitly(plain):
    """Rotary positions are relative: shifting all changes nothing, stretching does."""
    model, params = plain
    run, x = jitted(model), embeds()
    default = run(params, x, VALID)
    shifted = run(params, x, VALID, 9 + jnp.arange(N)[None])
    np.testing.assert_allclose(shifted, default, atol=1e-4)
    stretched = run(params, x, VALID, 2 * jnp.arange(N)[None])
    assert np.abs(stretched - default).max() > 1e-3


def test_sections_with_equal_rows_are_plain_rotation(plain):
    model, params = plain
    sectioned = dataclasses.replace(SPEC, rope=Rope(100.0, 4, sections=(1, 1), interleaved=True))
    positions = jnp.broadcast_to(jnp.arange(N), (2, B, N))
    got = jitted(Decoder(sectioned))(params, embeds(), VALID, positions)
    np.testing.assert_allclose(got, jitted(model)(params, embeds(), VALID), atol=1e-6)
    moved = jitted(Decoder(sectioned))(params, embeds(), VALID, positions.at[1].multiply(3))
    assert np.abs(got - moved).max() > 1e-3


@pytest.mark.parametrize("window", [1, 3])
def test_local_layers_see_a_window(window):
    single = dataclasses.replace(SPEC, layers=1, window=window, local=(True,))
    params = random_params(Decoder(single), embeds(), VALID)
    assert influence(Decoder(single), params, 2, VALID) == set(range(2, 2 + window))
    two = dataclasses.replace(SPEC, layers=2, window=window, local=(True, True))
    params = random_params(Decoder(two), embeds(), VALID)
    assert influence(Decoder(two), params, 1, VALID) == set(range(1, 1 + 2 * window - 1))
    mixed = dataclasses.replace(two, local=(True, False))
    assert influence(Decoder(mixed), params, 1, VALID) == set(range(1, N))


def test_local_layers_by_hand():
    """Flags pick the mask layer by layer, in order."""
    spec = dataclasses.replace(SPEC, layers=3, window=2, local=(False, True, False))
    params = random_params(Decoder(spec), embeds(), VALID)
    y, full = embeds(), tower.causal_mask(VALID)
    local = full & ~jnp.tril(jnp.ones((N, N), bool), -2)
    rope = Rope(100.0, 4)(jnp.arange(N)[None])
    for i, mask in enumerate((full, local, full)):
        single = jax.tree.map(lambda leaf, i=i: leaf[i], params["params"]["layers"])
        y, _ = jax.jit(Block(BLOCK).apply)({"params": single}, y, mask, rope)
    expected = LayerNorm().apply({"params": params["params"]["norm"]}, y)
    np.testing.assert_allclose(jitted(Decoder(spec))(params, embeds(), VALID), expected, atol=1e-5)  # type: ignore


def test_alibi():
    """Slopes of 4 and 6 heads as printed in the paper's code, and the bias by hand."""
    assert positions.alibi_slopes(4, 8.0) == (2**-2, 2**-4, 2**-6, 2**-8)
    assert positions.alibi_slopes(6, 8.0) == (2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3)
    spec = dataclasses.replace(SPEC, layers=1, rope=None, alibi=8.0)
    params = random_params(Decoder(spec), embeds(), VALID)
    distance = jnp.arange(N) - jnp.arange(N)[:, None]
    bias = jnp.array([2.0**-4, 2.0**-8])[None, :, None, None] * distance
    single = jax.tree.map(lambda leaf: leaf[0], params["params"]["layers"])
    y, _ = Block(BLOCK).apply({"params": single}, embeds(), tower.causal_mask(VALID), None, bias)
    expected = LayerNorm().apply({"params": params["params"]["norm"]}, y)
    np.testing.assert_allclose(jitted(Decoder(spec))(params, embeds(), VALID), expected, atol=1e-5)  # type: ignore


def bare(**facts) -> DecoderSpec:
    """No layer adds anything: what comes out is the normalised input."""
    return dataclasses.replace(SPEC, rope=None, norm_in_head=True, layers=1, **facts)


def entering(spec: DecoderSpec, valid: jax.Array, *args, dtype=jnp.float32):
    model = Decoder(spec, dtype=dtype)
    params = random_params(model, embeds(spec), valid)
    x = embeds(spec).astype(dtype)
    states = jitted(model, "run", collect=True)(params, x, valid, *args).states
    return params["params"], np.asarray(x, np.float32), np.asarray(states[0], np.float32)


def test_learned_positions_count_padding_or_not():
    valid = VALID.at[1, :3].set(False)  # left padding tells the two rules apart
    spec = bare(positions="learned", max_positions=12, first_position=2)
    params, x, got = entering(spec, valid)
    table = np.asarray(params["positions"])
    np.testing.assert_allclose(got, x + table[2 + np.arange(N)], atol=1e-6)
    spec = dataclasses.replace(spec, count_padding=False)
    params, x, got = entering(spec, valid)
    rows = np.array([[2, 3, 4, 5, 6, 7, 8], [1, 1, 1, 2, 3, 4, 5]])
    np.testing.assert_allclose(got, x + table[rows], atol=1e-6)
    _, x, got = entering(spec, valid, jnp.full((B, N), 4))
    np.testing.assert_allclose(got, x + table[4], atol=1e-6)


def test_sinusoidal_positions():
    _, x, got = entering(bare(positions="sinusoid", first_position=2), VALID)
    angle = (2 + np.arange(N))[:, None] * 10000.0 ** (-np.arange(4) / 3)
    expected = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)
    np.testing.assert_allclose(got, x + expected, atol=1e-5)
    _, x, got = entering(bare(positions="sinusoid", first_position=2), VALID, jnp.ones((B, N), int))
    np.testing.assert_array_equal(got, x)  # the row of the padding token


@pytest.mark.parametrize("rounded", [False, True])
def test_scale_of_the_embeddings_in_bfloat16(rounded):
    """Gemma rounds the factor itself to bfloat16; Kosmos-2 multiplies by the exact one."""
    scale = 2048**0.5  # 45.2548, in bfloat16 45.25
    _, x, got = entering(bare(embed_scale=scale, round_scale=rounded), VALID, dtype=jnp.bfloat16)
    factor = 45.25 if rounded else np.float32(scale)
    expected = np.asarray(jnp.asarray(x * factor, jnp.bfloat16), np.float32)
    np.testing.assert_array_equal(got, expected)


def test_output_matrices(plain):
    model, params = plain
    hidden = np.asarray(embeds())
    table = np.asarray(params["params"]["embedding"])
    scores = jitted(model, "logits")(params, embeds())
    np.testing.assert_allclose(scores, hidden @ table.T, atol=1e-5)

    spec = dataclasses.replace(SPEC, tied=False, head_bias=True, logit_cap=2.0)
    params = random_params(Decoder(spec), embeds(), VALID)
    separate = params["params"]
    scores = hidden @ np.asarray(separate["unembedding"]).T + np.asarray(separate["head_bias"])
    got = jitted(Decoder(spec), "logits")(params, embeds())
    np.testing.assert_allclose(got, 2 * np.tanh(scores / 2), atol=1e-5)


def test_norm_in_the_head(plain):
    model, params = plain
    late = Decoder(dataclasses.replace(SPEC, norm_in_head=True))
    raw = jitted(late)(params, embeds(), VALID)
    hidden = jitted(model)(params, embeds(), VALID)
    assert np.abs(raw - hidden).max() > 0.1
    np.testing.assert_allclose(
        jitted(late, "logits")(params, raw), jitted(model, "logits")(params, hidden), atol=1e-5
    )


def test_states_are_the_inputs_of_the_layers(plain):
    model, params = plain
    states = jitted(model, "run", collect=True)(params, embeds(), VALID).states
    np.testing.assert_array_equal(states[0], embeds())
    shorter = Decoder(dataclasses.replace(SPEC, layers=2, norm_in_head=True))
    first = {"params": dict(params["params"])}
    first["params"]["layers"] = jax.tree.map(lambda x: x[:2], params["params"]["layers"])
    np.testing.assert_allclose(states[2], jitted(shorter)(first, embeds(), VALID), atol=1e-5)


def test_deep_features_enter_the_first_layers(plain):
    model, params = plain
    deep = jax.random.normal(jax.random.key(7), (2, B, N, SPEC.width))
    run = jitted(model, "run", collect=True)
    states, without = (
        run(params, embeds(), VALID, deep=d).states for d in (deep, jnp.zeros_like(deep))
    )
    np.testing.assert_array_equal(states[0], without[0])
    np.testing.assert_allclose(states[1], without[1] + deep[0], atol=1e-5)
    again = run(params, embeds(), VALID, deep=deep.at[1].set(0)).states
    np.testing.assert_allclose(states[2], again[2] + deep[1], atol=1e-5)
    expected = jitted(model)(params, embeds(), VALID)
    zero = jitted(model, "run")(params, embeds(), VALID, deep=jnp.zeros_like(deep)).hidden
    np.testing.assert_allclose(zero, expected, atol=1e-6)


def test_own_rotation_and_gain(plain):
    model, params = plain
    run = jitted(model, "run")
    separate = Rope(7.0, 4)(jnp.arange(N)[None])
    other = Decoder(dataclasses.replace(SPEC, rope=Rope(7.0, 4)))
    expected = jitted(other)(params, embeds(), VALID)
    np.testing.assert_allclose(
        run(params, embeds(), VALID, rope=separate).hidden, expected, atol=1e-5
    )
    # A gain of 3 on all queries is a three times larger scale of the scores.
    scaled = dataclasses.replace(BLOCK, scale=3 * 4**-0.5)
    other = Decoder(dataclasses.replace(SPEC, block=scaled))
    expected = jitted(other)(params, embeds(), VALID)
    gain = jnp.full((1, N), 3.0)
    got = run(params, embeds(), VALID, gain=gain).hidden
    np.testing.assert_allclose(got, expected, atol=1e-5)


class Gate(nn.Module):
    """A stand-in for gated cross-attention: its own parameters, and a context."""

    @nn.compact
    def __call__(self, x, context):
        gate = self.param("gate", nn.initializers.zeros, (1,))
        return x + gate * Dense((x.shape[-1],), name="dense")(context)


@pytest.mark.parametrize(
    ("every", "remat"), [pytest.param(1, "none", marks=pytest.mark.slow), (2, "full")]
)
def test_inserts_stand_before_every_kth_layer(every, remat):
    model, context = Decoder(SPEC, remat, insert=Insert(every, Gate)), embeds(seed=5)
    args = (embeds(), VALID, None, None, context)
    params = random_params(model, *args)
    layers = params["params"]["layers"]
    assert layers["extra"]["gate"].shape == (4 // every, 1)
    rope = Rope(100.0, 4)(jnp.arange(N)[None])

    def loop(params):
        layers, y = params["params"]["layers"], embeds()
        for i in range(SPEC.layers):
            pick = functools.partial(jax.tree.map, lambda leaf, g=i // every: leaf[g])
            if (i + 1) % every == 0:
                y = Gate().apply({"params": pick(layers["extra"])}, y, context)
            block = pick(layers[f"blocks_{i % every}"])
            y, _ = Block(BLOCK).apply({"params": block}, y, tower.causal_mask(VALID), rope)
        return jnp.sum(LayerNorm().apply({"params": params["params"]["norm"]}, y) ** 3)  # type: ignore

    def scan(params):
        return jnp.sum(model.apply(params, *args) ** 3)  # type: ignore

    got, expected = (jax.jit(jax.value_and_grad(f))(params) for f in (scan, loop))
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)
    for path, value in flatten(expected[1]).items():
        np.testing.assert_allclose(flatten(got[1])[path], value, rtol=1e-3, atol=1e-3)


def test_inserts_must_divide_the_depth():
    model = Decoder(SPEC, insert=Insert(3, Gate))
    with pytest.raises(ValueError, match="every 3 does not divide 4 layers"):
        jax.eval_shape(model.init, jax.random.key(0), embeds(), VALID)


def test_dropout_needs_its_rng_and_differs_between_layers():
    block = dataclasses.replace(BLOCK, dropout=0.5)
    model = Decoder(dataclasses.replace(SPEC, block=block))
    params = random_params(model, embeds(), VALID)
    params["params"]["layers"] = jax.tree.map(
        lambda leaf: jnp.broadcast_to(leaf[:1], leaf.shape), params["params"]["layers"]
    )
    run = jitted(model, "run", collect=True)
    quiet = run(params, embeds(), VALID).states
    drawn = run(params, embeds(), VALID, rngs={"dropout": jax.random.key(0)}).states
    np.testing.assert_array_equal(
        quiet, jitted(Decoder(SPEC), "run", collect=True)(params, embeds(), VALID).states
    )
    assert np.abs(drawn[1] - quiet[1]).max() > 0.1
    # With equal weights, equal draws would drop the same columns of the MLP's bias everywhere.
    zero = jax.tree.map(jnp.zeros_like, params)
    zero["params"]["layers"]["attn"]["o"]["bias"] += 1.0
    states = run(zero, embeds(), VALID, rngs={"dropout": jax.random.key(0)}).states
    steps = np.asarray(states[1:] - states[:-1])
    assert set(np.unique(np.round(steps, 3))) == {0.0, 2.0}
    assert not np.array_equal(steps[0], steps[1])


def test_facts_are_checked_all_at_once():
    with pytest.raises(ValueError, match="decoder") as error:
        DecoderSpec(20, 9, 4, BLOCK, positions="learnt", window=3, local=(False, False))
    for word in ("'learnt'", "give both or neither", "2 flags for 4 layers", "2 does not divide"):
        assert word in str(error.value)
