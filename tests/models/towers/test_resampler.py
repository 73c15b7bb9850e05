"""Resamplers, mergers and tiles: what tells them apart. Parity with the originals: tests/parity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vla_jax.models.towers import positions, resampler, tiles
from vla_jax.models.towers.block import BlockSpec
from vla_jax.models.towers.vit import VisionSpec

WIDTH = 16


def tokens(n=8, width=WIDTH, batch=2, seed=0):
    values = np.random.default_rng(seed).normal(size=(batch, n, width))
    return jnp.asarray(values, jnp.float32)


def fill(module, *args, seed=1):
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *args))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(0.3 * rng.normal(size=s.shape), s.dtype), shapes)


def run(module, params, x, **rngs):
    return jax.jit(lambda p, x: module.apply(p, x, rngs=rngs))(params, x)


def test_perceiver_takes_any_number_of_tokens_in_any_order():
    module = resampler.Perceiver(queries=3, depth=2, heads=2, head_width=4)
    params = fill(module, tokens())
    assert params["params"]["layers"]["attn"]["k"]["kernel"].shape == (2, WIDTH, 2, 4)
    x = tokens()
    out = run(module, params, x)
    assert out.shape == (2, 3, WIDTH)
    np.testing.assert_allclose(out, run(module, params, x[:, ::-1]), rtol=0, atol=1e-5)
    more = jnp.concatenate([x, tokens(seed=3)], axis=1)
    assert np.abs(run(module, params, more) - out).max() > 1e-3


@pytest.mark.slow
def test_positioned_queries_begin_as_a_table_and_train_with_the_rest():
    module = resampler.PositionedQueries((2, 2), (2, 4), WIDTH, heads=2)
    x = tokens(8, 12)
    params = fill(module, x)
    grads = jax.jit(jax.grad(lambda p: (module.apply(p, x) ** 2).sum()))(params)["params"]  # type: ignore
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        # The keys' bias shifts all scores of a query alike.
        assert np.any(np.abs(leaf) > 1e-4) != ("'k'" in str(path) and "bias" in str(path)), path
    # They do tell the tokens apart.
    out = run(module, params, x)
    assert np.abs(run(module, params, x[:, ::-1]) - out).max() > 1e-3
    new = jax.jit(module.init)(jax.random.key(0), x)["params"]["positions"]
    np.testing.assert_array_equal(new, positions.sincos((2, 2), WIDTH))


def test_sincos_counts_columns_first():
    table = positions.sincos((2, 3), 8)
    assert table.shape == (6, 8)
    np.testing.assert_allclose(table[1, :4], [np.sin(1), np.sin(0.01), np.cos(1), np.cos(0.01)])
    np.testing.assert_allclose(table[1, 4:], [0, 0, 1, 1])
    np.testing.assert_allclose(table[3, :2], 0)
    with pytest.raises(ValueError, match="multiple of 4"):
        positions.sincos((2, 2), 6)


@pytest.mark.parametrize("project_first", [True, False])
def test_latent_decoder_works_at_either_width(project_first):
    module = resampler.LatentDecoder(
        queries=3, width=24, heads=2, hidden=20, project_first=project_first
    )
    x = tokens()
    params = fill(module, x)
    inner = 24 if project_first else WIDTH
    assert params["params"]["queries"].shape == (3, inner)
    out = run(module, params, x)
    assert out.shape == (2, 3, 24)
    np.testing.assert_array_equal(out, run(module, params, x))
    assert np.abs(run(module, params, x, dropout=jax.random.key(0)) - out).max() > 1e-2


@pytest.mark.parametrize("norm_merged", [True, False])
def test_a_merged_token_is_its_square_of_patches(norm_merged):
    module = resampler.PatchMerger((4, 6), 2, width=10, norm_merged=norm_merged)
    x = tokens(24)
    params = fill(module, x)
    out = run(module, params, x)
    assert out.shape == (2, 6, 10)
    for patch in (0, 7, 14, 23):
        row, column = divmod(patch, 6)
        changed = np.abs(run(module, params, x.at[:, patch].multiply(-2.0)) - out).max((0, 2))
        assert np.flatnonzero(changed).tolist() == [row // 2 * 3 + column // 2]
    with pytest.raises(ValueError, match="cannot be merged"):
        run(resampler.PatchMerger((3, 8), 2, 10, norm_merged=norm_merged), params, x)


def test_two_streams_are_the_overview_and_the_mean_of_the_tiles():
    block = BlockSpec(heads=1, hidden=4, activation="gelu")
    spec = VisionSpec(3, 1, block, patch=2, grid=(2, 2))

    def encode(x):  # a patch's feature: its mean colour
        return x.reshape(len(x), 2, 2, 2, 2, 3).mean((2, 4)).reshape(len(x), 4, 3)

    small = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 4, 3)), jnp.float32)
    single = tiles.two_streams(encode, small, spec)
    np.testing.assert_array_equal(single, jnp.concatenate([encode(small)] * 2, -1))

    large = jnp.asarray(np.random.default_rng(1).normal(size=(2, 8, 4, 3)), jnp.float32)
    both = tiles.two_streams(encode, large, spec)
    # With a linear encoder both streams are means over the same pixels.
    quarters = large.reshape(2, 2, 4, 2, 2, 3).mean((2, 4)).reshape(2, 4, 3)
    np.testing.assert_allclose(both[..., :3], quarters, atol=1e-6)
    np.testing.assert_allclose(both[..., 3:], quarters, atol=1e-6)
    # The overview cannot tell two rows apart that the tiles can.
    squared = tiles.two_streams(lambda x: encode(x**2), large, spec)
    np.testing.assert_allclose(
        squared[..., 3:],
        (large**2).reshape(2, 2, 4, 2, 2, 3).mean((2, 4)).reshape(2, 4, 3),
        atol=1e-6,
    )
    assert np.abs(squared[..., :3] - squared[..., 3:]).max() > 0.1
    with pytest.raises(ValueError, match="not made of tiles"):
        tiles.two_streams(encode, large[:, :6], spec)
