from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.train.toy import make_config
from vla_jax.config import ConfigError
from vla_jax.train import optim


def multipliers(kind: str, warmup: int, steps: int, at: list[int]) -> np.ndarray:
    config = make_config(**{
        "optim.schedule": kind, "optim.warmup_steps": warmup, "optim.learning_rate": 2.0
    }).optim  # fmt: skip
    schedule = jax.jit(optim.make_schedule(config, steps))
    return np.array([schedule(step) for step in at]) / 2.0


def test_half_cosine_has_the_original_multipliers():
    at = [0, 50, 100, 325, 550, 775, 1000, 5000]
    expected = [0, 0.5, 1, 0.855018, 0.505, 0.154982, 0.01, 0.01]
    np.testing.assert_allclose(multipliers("half_cosine", 100, 1000, at), expected, atol=1e-6)


def test_cosine_ends_at_zero_and_constant_holds():
    at = [0, 10, 20, 70, 120, 121]
    np.testing.assert_allclose(
        multipliers("cosine", 20, 120, at), [0, 0.5, 1, 0.5, 0, 0], atol=1e-6
    )
    np.testing.assert_allclose(multipliers("constant", 20, 120, at), [0, 0.5, 1, 1, 1, 1])
    np.testing.assert_allclose(multipliers("constant", 0, 10, [0, 9]), [1, 1])


def test_drop_falls_at_once_and_stays():
    config = make_config(**{
        "optim.schedule": "drop", "optim.warmup_steps": 0, "optim.learning_rate": 2.0,
        "optim.drop_at": 10, "optim.min_scale": 0.1,
    }).optim  # fmt: skip
    schedule = optim.make_schedule(config, 20)
    results = [float(schedule(step)) for step in (0, 9, 10, 30)]
    np.testing.assert_allclose(results, [2.0, 2.0, 0.2, 0.2])


def test_adamw_decays_every_parameter_and_starts_at_rate_zero():
    config = make_config(**{"optim.weight_decay": 0.1, "optim.clip_norm": 0.0}).optim
    optimizer = optim.make_optimizer(config, 20)
    params = {"a/bias": jnp.array([2.0]), "b/kernel": jnp.array([[3.0]])}
    state, grads = optimizer.init(params), jax.tree.map(jnp.ones_like, params)
    first, state = optimizer.update(grads, state, params)
    assert not any(np.any(x) for x in jax.tree.leaves(first))
    updates: Any = optimizer.update(grads, state, params)[0]
    # Constant gradients: the Adam direction is 1; rate at step 1 of 2 warmup steps is half.
    for path, value in params.items():
        np.testing.assert_allclose(updates[path], -0.005 * (1 + 0.1 * value), rtol=1e-5)


@pytest.mark.parametrize(("clip", "expected"), [(1.0, 0.1), (0.0, 10.0)])
def test_clip_norm_zero_is_off(clip, expected):
    # With b1 = 0.9 the first moment after one step is a tenth of the clipped gradient.
    config = make_config(**{"optim.clip_norm": clip}).optim
    optimizer = optim.make_optimizer(config, 20)
    grads = {"x": jnp.array([100.0])}
    _, state = optimizer.update(grads, optimizer.init(grads), grads)
    np.testing.assert_allclose(optax.tree_utils.tree_get(state, "mu")["x"], expected, rtol=1e-6)


def test_rates_and_decays_follow_the_path_first_match_first():
    config = make_config(**{
        "optim.weight_decay": 0.1, "optim.clip_norm": 0.0, "optim.warmup_steps": 0,
        "optim.rates": (("^head/arm", 10.0), ("^head/", 2.0)),
        "optim.decays": (("(bias|scale)$", 0.0), ("^head/", 0.5)),
    }).optim  # fmt: skip
    params = {
        "backbone/kernel": jnp.array([2.0]), "backbone/bias": jnp.array([2.0]),
        "head/arm/kernel": jnp.array([2.0]), "head/gripper/bias": jnp.array([2.0]),
    }  # fmt: skip
    optimizer = optim.make_optimizer(config, 20)
    grads = jax.tree.map(jnp.ones_like, params)
    updates: Any = optimizer.update(grads, optimizer.init(params), params)[0]
    expected = {  # -rate * factor * (direction 1 + decay * 2)
        "backbone/kernel": 1.2, "backbone/bias": 1.0,
        "head/arm/kernel": 10 * 2.0, "head/gripper/bias": 2.0,
    }  # fmt: skip
    for path, value in expected.items():
        np.testing.assert_allclose(updates[path], -0.01 * value, rtol=1e-5)


def test_groups_that_match_nothing_are_named():
    config = make_config(**{"optim.rates": (("haed", 2.0),), "optim.decays": (("bais", 0.0),)})
    with pytest.raises(ConfigError) as error:
        optim.make_optimizer(config.optim, 20).init({"head/kernel": jnp.zeros(1)})
    assert "optim.rates: 'haed' matches none of 1" in str(error.value)
    assert "optim.decays: 'bais' matches none of 1" in str(error.value)


def test_without_groups_it_is_optax_adamw_to_the_bit():
    config = make_config(**{"optim.weight_decay": 0.1}).optim
    ours = optim.make_optimizer(config, 20)
    schedule = optim.make_schedule(config, 20)
    reference = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=config.weight_decay)
    )
    params: Any = {"a": jnp.array([2.0, -1.0]), "b": jnp.array([[3.0]])}
    a: Any = params
    b: Any = params
    actual, its = ours.init(params), reference.init(params)
    for step in range(4):
        grads = jax.tree.map(lambda x, s=step: jnp.cos(x + s), params)
        change, actual = ours.update(grads, actual, a)
        other, its = reference.update(grads, its, b)
        a, b = optax.apply_updates(a, change), optax.apply_updates(b, other)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_a_mean_in_half_precision_steps_almost_as_one_in_full():
    params = {"a/kernel": jnp.linspace(-1.0, 1.0, 64).reshape(8, 8)}
    steps = {}
    for dtype in ("float32", "bfloat16"):
        optimizer = optim.make_optimizer(make_config(**{"optim.mean_dtype": dtype}).optim, 20)
        state: Any = optimizer.init(params)
        assert {str(x.dtype) for x in jax.tree.leaves(optax.tree.get(state, "mu"))} == {dtype}
        assert {str(x.dtype) for x in jax.tree.leaves(optax.tree.get(state, "nu"))} == {"float32"}
        for step in range(3):
            grads = jax.tree.map(lambda x, s=step: jnp.cos(9 * x + s), params)
            steps[dtype], state = optimizer.update(grads, state, params)
    size = np.abs(steps["float32"]["a/kernel"]).max()
    np.testing.assert_allclose(
        steps["bfloat16"]["a/kernel"], steps["float32"]["a/kernel"], rtol=0, atol=0.01 * size
    )


def test_muon_steps_are_orthogonal_and_of_adams_size():
    config = make_config(
        **{"optim.muon": ("kernel$",), "optim.clip_norm": 0.0, "optim.warmup_steps": 0}
    ).optim
    optimizer = optim.make_optimizer(config, 10**6)
    random = np.random.default_rng(0)
    shapes = {
        "text/layers/attn/q/kernel": (3, 32, 4, 16),
        "text/layers/attn/o/kernel": (3, 4, 8, 64),
        "head/fc/kernel": (16, 64),
        "head/fc/bias": (64,),
    }
    params = {path: jnp.zeros(shape) for path, shape in shapes.items()}
    grads = {path: jnp.asarray(random.normal(size=s), jnp.float32) for path, s in shapes.items()}
    state = optimizer.init(params)
    updates: Any = optimizer.update(grads, state, params)[0]
    assert set(updates) == set(params)
    matrices = {
        "text/layers/attn/q/kernel": (3, 32, 64),
        "text/layers/attn/o/kernel": (3, 32, 64),
        "head/fc/kernel": (1, 16, 64),
    }
    for path, (layers, rows, columns) in matrices.items():
        step = np.asarray(updates[path]).reshape(layers, rows, columns) / config.learning_rate
        for matrix in step:
            # Five Newton-Schulz rounds leave singular values within about [0.7, 1.2].
            values = np.linalg.svd(matrix, compute_uv=False) / (0.2 * max(rows, columns) ** 0.5)
            assert 0.3 < values.min() <= values.max() < 1.3, (path, values)
        gradient = np.asarray(grads[path]).reshape(layers, rows, columns)
        assert (step * gradient).sum() < 0
    # The rest keeps Adam's step: minus the gradient's sign at first.
    np.testing.assert_allclose(
        updates["head/fc/bias"], -config.learning_rate * np.sign(grads["head/fc/bias"]), rtol=1e-4
    )


def test_muon_refuses_what_is_no_matrix():
    config = make_config(**{"optim.muon": ("bias$", "nothing")}).optim
    with pytest.raises(ConfigError, match="no matrix"):
        optim.make_optimizer(config, 10).init({"a/bias": jnp.zeros(3)})
