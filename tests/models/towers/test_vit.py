"""The vision transformer: what its spec's choices mean. Parity with the originals: tests/parity."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vla_jax.models.towers import positions
from vla_jax.models.towers.block import BlockSpec
from vla_jax.models.towers.vit import VisionSpec, VisionTransformer, patches

BLOCK = BlockSpec(heads=2, hidden=12, activation="gelu")
PLAIN = VisionSpec(width=16, layers=3, block=BLOCK, patch=2, grid=(4, 4), table=(4, 4))


def change(spec=PLAIN, **facts):
    return dataclasses.replace(spec, **facts)


def images(spec, batch=2, seed=0):
    shape = (batch, *spec.image, 3)
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def fill(spec, seed=1):
    """Random parameters, none of them at a starting value that hides it."""
    model = VisionTransformer(spec, "none")
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images(spec)))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(0.3 * rng.normal(size=s.shape), s.dtype), shapes)


@functools.partial(jax.jit, static_argnums=(0, 3))
def run_with_taps(spec, params, x, remat="none"):
    return VisionTransformer(spec, remat).apply(params, x)


def run(*args):
    return run_with_taps(*args).tokens


def test_tokens_are_patches_row_by_row():
    x = images(PLAIN)
    cut = patches(x, PLAIN).reshape(2, 4, 4, 2, 2, 3)
    np.testing.assert_array_equal(cut[1, 2, 3], x[1, 4:6, 6:8])
    wide = change(grid=(2, 3), table=(2, 3))
    assert run(wide, fill(wide), images(wide)).shape == (2, 6, 16)


def test_class_token_may_be_kept_or_dropped_and_placed_or_not():
    spec = change(class_token=True, pre_norm=True)
    params = fill(spec)
    retained = run(spec, params, images(spec))
    assert retained.shape == (2, 17, 16)
    assert spec.tokens == 17
    dropped = run(change(spec, keep_class=False), params, images(spec))
    np.testing.assert_array_equal(retained[:, 1:], dropped)
    assert change(spec, keep_class=False).tokens == 16
    bare = change(spec, class_position=False)
    assert fill(bare)["params"]["positions"].shape == (16, 16)
    # The same as a position of zero.
    zeroed = params["params"] | {"positions": params["params"]["positions"].at[0].set(0.0)}
    without = zeroed | {"positions": zeroed["positions"][1:]}
    np.testing.assert_array_equal(
        run(spec, {"params": zeroed}, images(spec)), run(bare, {"params": without}, images(spec))
    )


@pytest.mark.parametrize("take", [-2, -3])
def test_earlier_hidden_states_are_those_of_a_shallower_tower(take):
    deep, depth = change(post_norm=True, take=take), 4 + take
    params = fill(deep)
    assert params["params"]["layers"]["norm1"]["scale"].shape[0] == 3
    shallow = change(layers=depth)
    cut = jax.tree.map(lambda p: p[:depth], params["params"]["layers"])
    below = {"params": {**params["params"], "layers": cut}}
    del below["params"]["post_norm"]
    np.testing.assert_allclose(
        run(deep, params, images(deep)), run(shallow, below, images(deep)), rtol=0, atol=1e-6
    )


def test_layers_that_are_not_taken_get_no_gradient_and_the_others_do():
    spec = change(post_norm=True, take=-2)
    loss = jax.grad(lambda p: (run(spec, p, images(spec), "full") ** 2).sum())
    grads = loss(fill(spec))["params"]
    kernel = np.abs(grads["layers"]["mlp"]["fc1"]["kernel"]).sum((1, 2))
    assert (kernel[:2] > 0).all()
    assert kernel[2] == 0
    assert not np.any(grads["post_norm"]["scale"])


def test_taps_are_the_layers_outputs():
    spec = change(taps=(0, 2), post_norm=True)
    params = fill(spec)
    tokens, taps = run_with_taps(spec, params, images(spec))
    for layer, tap in zip(spec.taps, taps, strict=True):
        expected = run(change(spec, taps=(), take=layer - 3), params, images(spec))
        if layer == 2:  # before the norm
            assert np.abs(tap - tokens).max() > 0.1
            bare = {"params": {k: v for k, v in params["params"].items() if k != "post_norm"}}
            expected = run(change(spec, taps=(), post_norm=False), bare, images(spec))
        np.testing.assert_allclose(tap, expected, rtol=0, atol=1e-6)
    expected = run(change(spec, taps=()), params, images(spec))
    np.testing.assert_allclose(tokens, expected, rtol=0, atol=1e-6)


ROTATED = change(table=None, rope_theta=100.0)


@pytest.mark.parametrize("grid", [(4, 4), (4, 6), (3, 5)])
def test_windows_are_towers_of_their_own(grid):
    # The rotation is relative and there is no table: a window cannot know where it is.
    spec = change(ROTATED, grid=grid, window=2)
    params = fill(spec)
    full = np.asarray(run(spec, params, images(spec))).reshape(2, *grid, 16)
    for top in range(0, grid[0], 2):
        for left in range(0, grid[1], 2):
            part = full[:, top : top + 2, left : left + 2]
            small = change(ROTATED, grid=part.shape[1:3])
            pixels = images(spec)[:, 2 * top : 2 * top + 4, 2 * left : 2 * left + 4]
            alone = run(small, params, pixels).reshape(part.shape)
            np.testing.assert_allclose(part, alone, rtol=0, atol=2e-6)


@pytest.mark.parametrize("grid", [(4, 4), (3, 5)])
def test_full_layers_see_past_the_windows(grid):
    spec = change(ROTATED, grid=grid, window=2, full_layers=(1,))
    params, x = fill(spec), images(spec)
    moved = x.at[:, :2, :2].add(1.0)  # the first patch
    observed = np.abs(run(spec, params, moved) - run(spec, params, x)).max((0, 2)).reshape(grid)
    assert (observed > 0).all()
    blind = change(spec, full_layers=())
    observed = np.abs(run(blind, params, moved) - run(blind, params, x)).max((0, 2)).reshape(grid)
    assert (observed[:2, :2] > 0).all()
    assert not observed[2:].any()
    assert not observed[:, 2:].any()
    assert spec.segments() == [(0, 1, True), (1, 2, False), (2, 3, True)]


def test_rotation_tells_rows_from_columns():
    spec = change(ROTATED, grid=(2, 3))
    params, x = fill(spec), images(spec)
    turned = run(change(spec, grid=(3, 2)), params, x.swapaxes(1, 2)).reshape(2, 3, 2, 16)
    straight = run(spec, params, x).reshape(2, 2, 3, 16)
    assert np.abs(turned.swapaxes(1, 2) - straight).max() > 1e-3


def test_a_still_image_is_all_frames():
    spec = change(frames=2)
    params, x = fill(spec), images(spec)
    assert params["params"]["patch"]["kernel"].shape == (2, 12, 16)
    doubled = jnp.stack([x, x], axis=1)
    np.testing.assert_array_equal(run(spec, params, x), run(spec, params, doubled))
    other = jnp.stack([x, images(spec, seed=5)], axis=1)
    assert np.abs(run(spec, params, other) - run(spec, params, x)).max() > 1e-3


@pytest.mark.parametrize("kind", sorted(positions.INTERPOLATIONS))
def test_a_table_of_another_grid_is_resampled(kind):
    spec = change(table=(3, 3), resampling=kind)
    params = fill(spec)
    table = positions.resample(params["params"]["positions"], (3, 3), (4, 4), kind)
    same = {"params": params["params"] | {"positions": table}}
    np.testing.assert_allclose(
        run(spec, params, images(spec)), run(PLAIN, same, images(spec)), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("kind", sorted(positions.INTERPOLATIONS))
@pytest.mark.parametrize(("source", "target"), [(4, 9), (16, 32), (8, 3), (5, 5), (3, 1)])
def test_interpolation_keeps_constants_and_ends(kind, source, target):
    matrix = positions.interpolation(source, target, kind)
    np.testing.assert_allclose(matrix.sum(1), 1.0, atol=1e-6)
    if source == target:
        np.testing.assert_allclose(matrix, np.eye(source), atol=1e-6)
    if kind == "bilinear_corners" and target > 1:
        line = matrix @ np.arange(source)
        np.testing.assert_allclose(line, np.linspace(0, source - 1, target), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["full", "dots"])
def test_recomputation_changes_nothing(remat):
    spec = change(ROTATED, window=2, full_layers=(1,), taps=(0,))

    def gradient(kind):
        return jax.grad(lambda p: (run(spec, p, images(spec), kind) ** 2).mean())(fill(spec))

    for a, b in zip(*(jax.tree.leaves(gradient(k)) for k in ("none", remat)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


def test_activations_have_the_asked_type_and_parameters_stay_float32():
    spec = change(class_token=True, pre_norm=True, post_norm=True, take=-2)
    model = VisionTransformer(spec, "none", jnp.bfloat16)
    params = jax.jit(model.init)(jax.random.key(0), images(spec))
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    out = jax.jit(model.apply)(params, images(spec)).tokens
    assert out.dtype == jnp.bfloat16
    assert bool(jnp.isfinite(out).all())


def test_a_new_class_token_has_no_position_and_patches_have_their_own():
    spec = change(class_token=True)
    init = jax.jit(VisionTransformer(spec, "none").init)
    params = init(jax.random.key(0), images(spec))["params"]
    table = np.asarray(params["positions"])
    assert not table[0].any()
    assert np.abs(table[1:, None] - table[None, 1:]).max(-1)[~np.eye(16, dtype=bool)].min() > 0.1


def test_specs_that_cannot_be_are_refused_with_every_reason():
    facts = {"rope_theta": 1e4, "take": -4, "taps": (3,), "resampling": "nearest"}
    with pytest.raises(ValueError, match="vision tower") as error:
        change(class_token=True, **facts)
    for word in ("class_token", "take", "taps", "resampling"):
        assert word in str(error.value)
    with pytest.raises(ValueError, match="no patches"):
        change(grid=(0, 4))


@pytest.mark.parametrize(
    ("spec", "shape"),
    [(PLAIN, (1, 8, 10, 3)), (PLAIN, (1, 2, 8, 8, 3)), (change(frames=2), (1, 3, 8, 8, 3))],
)
def test_images_of_another_shape_are_refused(spec, shape):
    with pytest.raises(ValueError, match=r"takes images of \(8, 8\) pixels"):
        run(spec, fill(spec), jnp.zeros(shape))
