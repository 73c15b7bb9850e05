import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.train.toy import Toy, loss, make_batch, make_config
from vla_jax.config import HeadConfig, MeshConfig
from vla_jax.models.losses import action_loss
from vla_jax.rules import flatten
from vla_jax.train import evaluate
from vla_jax.train.augment import augment
from vla_jax.train.mesh import batch_sharding, make_mesh, shard_batch
from vla_jax.train.optim import make_optimizer
from vla_jax.train.split import train_rules
from vla_jax.train.state import abstract, create, place
from vla_jax.train.step import make_train_step, split_rows

FROZEN = ("backbone/",)


def set_up(shape: tuple[int, int, int], frozen: tuple[str, ...] = (), ema: float = 0.0):
    config = make_config(**{"optim.frozen": frozen, "optim.ema_decay": ema})
    mesh = make_mesh(MeshConfig(*shape), jax.devices()[: int(np.prod(shape))])
    optimizer = make_optimizer(config.optim, config.train.steps)
    table = train_rules(config.optim)
    template = abstract(Toy().init, table, optimizer, mesh, min_sharded=64, ema=ema > 0)
    return config, mesh, template, create(Toy().init, optimizer, template, config.seed)


@functools.cache  # compiling is most of these tests' time
def compiled(shape: tuple[int, int, int], frozen: tuple[str, ...] = (), ema: float = 0.0):
    config, mesh, template, _ = set_up(shape, frozen, ema)
    return make_train_step(Toy(), config, mesh, template)


def train(shape: tuple[int, int, int], frozen: tuple[str, ...] = (), steps: int = 4):
    _, mesh, _, state = set_up(shape, frozen)
    step, rows = compiled(shape, frozen), []
    for i in range(steps):
        state, metrics = step(state, shard_batch(make_batch(i), mesh))
        rows.append({name: float(x) for name, x in metrics.items()})
    return state, rows


def test_loss_does_not_depend_on_the_mesh():
    _, alone = train((1, 1, 1))
    for shape in [(2, 2, 2), (8, 1, 1)]:
        state, rows = train(shape)
        for name in ("loss", "loss_arm", "loss_gripper", "grad_norm", "lr"):
            np.testing.assert_allclose([r[name] for r in rows], [r[name] for r in alone], rtol=1e-5)
        assert int(state.step) == 4
    assert alone[0]["lr"] == 0
    assert alone[1]["lr"] == pytest.approx(5e-3)


def test_state_lies_where_the_rules_say_and_moments_with_their_parameter():
    _, _, template, state = set_up((2, 2, 2))
    assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x.sharding, template)
    query = "backbone/text/layers/attn/q/kernel"
    moments = jax.tree_util.tree_leaves_with_path(state.opt_state)
    results = [x for path, x in moments if getattr(path[-1], "key", None) == query]
    assert len(results) == 2
    for x in [state.trainable[query], *results]:
        assert x.sharding.spec == jax.P(None, "fsdp", "tensor", None)
        assert x.addressable_shards[0].data.shape == (2, 8, 2, 4)


def test_training_lowers_the_loss():
    _, mesh, _, state = set_up((2, 2, 2))
    step, batch = compiled((2, 2, 2)), make_batch()
    losses = []
    for _ in range(40):
        state, metrics = step(state, shard_batch(batch, mesh))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.6 * losses[0]


def test_frozen_parameters_do_not_move_and_have_no_moments():
    *_, before = set_up((2, 2, 2), FROZEN)
    frozen = {path: np.asarray(x) for path, x in before.frozen.items()}
    trainable = {path: np.asarray(x) for path, x in before.trainable.items()}
    after, _ = train((2, 2, 2), FROZEN)
    assert len(frozen) == 8
    assert set(after.trainable) == {"head/arm/kernel", "head/gripper/kernel"}
    for path, x in after.frozen.items():
        assert x.dtype == jnp.bfloat16
        assert np.array_equal(np.asarray(x).view(np.uint16), frozen[path].view(np.uint16))
    for path, x in after.trainable.items():
        assert not np.array_equal(x, trainable[path])
    retained = sum(x.size for x in jax.tree.leaves(after.opt_state) if x.ndim)
    assert retained == 2 * sum(x.size for x in trainable.values())


def test_the_average_follows_the_weights_and_is_what_evaluation_sees():
    frozen, decay = ("backbone/text",), 0.2
    config, mesh, template, state = set_up((2, 2, 2), frozen, decay)
    step = compiled((2, 2, 2), frozen, decay)
    average = {path: np.asarray(x, np.float64) for path, x in state.trainable.items()}
    for i in range(4):
        state, _ = step(state, shard_batch(make_batch(i), mesh))
        keep = min(decay, (1 + i) / (10 + i))  # 0.1, 0.1818, then 0.2
        average = {
            path: keep * x + (1 - keep) * np.asarray(state.trainable[path], np.float64)
            for path, x in average.items()
        }
    assert set(state.ema) == set(state.trainable)
    for path, x in state.ema.items():
        assert x.sharding == state.trainable[path].sharding
        np.testing.assert_allclose(x, average[path], rtol=1e-6, atol=1e-7)
        assert not np.allclose(x, state.trainable[path], atol=1e-6)
    evaluated = evaluate.make_eval_step(Toy(), config, mesh, template)
    batch = shard_batch(make_batch(9), mesh)
    frozen_at_average = dataclasses.replace(state, trainable=state.ema)
    assert float(evaluated(state, batch)["loss"]) == float(
        evaluated(frozen_at_average, batch)["loss"]
    )
    other = dataclasses.replace(state, ema=state.trainable)
    assert float(evaluated(state, batch)["loss"]) != float(evaluated(other, batch)["loss"])


def test_loaded_parameters_take_the_place_of_random_ones():
    config, mesh, template, state = set_up((2, 2, 2), ("vision",), 0.9)
    optimizer = make_optimizer(config.optim, config.train.steps)
    host = {
        "head/arm/kernel": np.ones((16, 12)),
        "backbone/vision/patch/kernel": np.ones((192, 16)),
    }
    loaded = {path: place(template, path, x) for path, x in host.items()}
    mixed = create(Toy().init, optimizer, template, config.seed, loaded)
    assert jax.tree.map(lambda x: (x.sharding, x.dtype), mixed) == jax.tree.map(
        lambda x: (x.sharding, x.dtype), template
    )
    random, result = flatten(state.params), flatten(mixed.params)
    for path, x in result.items():
        expected = host.get(path, random[path])
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(expected, np.float32))
    for path, x in mixed.ema.items():
        np.testing.assert_array_equal(x, mixed.trainable[path])
    # Weights and their average are buffers of their own: both can be donated.
    compiled((2, 2, 2), ("vision",), 0.9)(mixed, shard_batch(make_batch(), mesh))


def test_loaded_parameters_that_do_not_fit_are_all_named():
    config, _, template, _ = set_up((2, 2, 2))
    optimizer = make_optimizer(config.optim, config.train.steps)
    wrong = {"head/extra/kernel": jnp.zeros(3), "head/gripper/kernel": jnp.zeros((2, 2))}
    with pytest.raises(ValueError, match="2 loaded parameters do not fit") as error:
        create(Toy().init, optimizer, template, config.seed, wrong)
    for part in ("unexpected: head/extra/kernel", "shape of head/gripper/kernel: (2, 2)"):
        assert part in str(error.value)
    with pytest.raises(ValueError, match=r"head/arm/kernel: shape \(3,\)"):
        place(template, "head/arm/kernel", np.zeros(3))


def seen(batch):
    """The batch's observation as the model sees it."""
    images = {c: jnp.asarray(x, jnp.float32) / 255 for c, x in batch.observation.images.items()}
    mean, std = jnp.asarray(Toy.image.mean), jnp.asarray(Toy.image.std)
    return dataclasses.replace(
        batch.observation, images={c: (x - mean) / std for c, x in images.items()}
    )


def test_evaluation_is_exact_over_uneven_batches():
    config, mesh, template, state = set_up((2, 2, 2))
    halves = np.full(2, 0.5, np.float32)
    baseline = evaluate.Baseline(np.full((2, 6), 0.1, np.float32), np.array([True, False]), halves)
    step = evaluate.make_eval_step(Toy(), config, mesh, template, baseline)
    batches = [make_batch(i) for i in range(3)]
    batches[2].actions.mask[3:] = False  # what a loader does to the rows that fill up
    result = evaluate.evaluate(step, state, batches, mesh, ("even", "odd"))
    full = jax.tree.map(lambda *x: np.concatenate(x)[:19], *batches)
    prediction = Toy().predict({"params": jax.tree.map(np.asarray, state.params)}, seen(full))
    prediction = jax.tree.map(np.asarray, prediction)
    mask, target = full.actions.mask, full.actions.chunk
    assert result["count"] == mask.sum()
    l1 = np.abs(prediction.arm - target[..., :-1])[mask].mean(0)
    np.testing.assert_allclose(result["l1"], l1, rtol=1e-5)
    assert result["l1_mean"] == pytest.approx(l1.mean(), rel=1e-5)
    right = ((prediction.gripper > 0) == (target[..., -1] > 0.5))[mask].mean()
    assert result["gripper"] == pytest.approx(right, rel=1e-6)
    total, parts = loss(prediction, full.actions, config.optim.gripper_weight)
    assert result["loss"] == pytest.approx(float(total), rel=1e-5)
    assert result["loss_arm"] == pytest.approx(float(parts["loss_arm"]), rel=1e-5)
    fixed = np.abs(0.1 - target[..., :-1])[mask].mean(0)
    np.testing.assert_allclose(result["baseline_l1"], fixed, rtol=1e-5)
    always = np.broadcast_to((full.dataset == 0)[:, None, None], mask.shape)
    guess = (always == (target[..., -1] > 0.5))[mask].mean()
    assert result["baseline_gripper"] == pytest.approx(guess, rel=1e-6)
    for number, name in enumerate(("even", "odd")):
        actual = mask & (full.dataset == number)[:, None, None]
        l1 = np.abs(prediction.arm - target[..., :-1])[actual].mean()
        assert result[f"l1_mean/{name}"] == pytest.approx(l1, rel=1e-5)
        right = ((prediction.gripper > 0) == (target[..., -1] > 0.5))[actual].mean()
        assert result[f"gripper/{name}"] == pytest.approx(right, rel=1e-6)


ODD = {"augment.shift": {"primary": 1}, "model.dropout": False}


def first_step(accumulate: int, shape=(2, 2, 1), names=("even", "odd")):
    config = make_config(**ODD, **{"train.accumulate": accumulate, "optim.clip_norm": 0.0})
    mesh = make_mesh(MeshConfig(*shape), jax.devices()[: int(np.prod(shape))])
    optimizer = make_optimizer(config.optim, config.train.steps)
    template = abstract(Toy().init, (), optimizer, mesh, min_sharded=64)
    state = create(Toy().init, optimizer, template, config.seed)
    batch = make_batch(3, rows=16)
    batch.actions.mask[::4] = False  # parts with very different numbers of supervised actions
    batch.actions.mask[1] = True
    step = make_train_step(Toy(action_loss), config, mesh, template, names)
    return step, state, batch, mesh


@pytest.mark.slow
def test_parts_of_a_batch_give_the_gradient_of_the_whole(capsys):
    results = {}
    for parts in (1, 2, 4):
        step, state, batch, mesh = first_step(parts)
        after, metrics = step(state, shard_batch(batch, mesh))
        moment = optax.tree_utils.tree_get(after.opt_state, "mu")
        # Adam's first moment after one step is a tenth of the gradient.
        results[parts] = (
            {path: 10 * np.asarray(x) for path, x in moment.items()},
            {name: float(x) for name, x in metrics.items()},
        )
    full, numbers = results.pop(1)
    assert numbers["loss/even"] != numbers["loss/odd"]
    errors = {}
    for parts, (grads, metrics) in results.items():
        errors[parts] = max(np.abs(grads[path] - x).max() for path, x in full.items())
        assert errors[parts] <= 1e-6
        assert max(np.abs(x).max() for x in full.values()) > 0.05
        for name, x in numbers.items():
            assert metrics[name] == pytest.approx(x, abs=1e-6), name
    with capsys.disabled():
        print(f"\naccumulation against one batch: max abs gradient error by parts {errors}")


@pytest.mark.slow
def test_the_loss_of_each_dataset_is_the_mean_over_its_actions():
    step, state, batch, mesh = first_step(1)
    params = jax.tree.map(np.array, state.params)
    _, metrics = step(state, shard_batch(batch, mesh))
    config = make_config(**ODD)
    device = jax.tree.map(jnp.asarray, batch)
    observed = jax.jit(
        lambda seen, sample: augment(
            seen, sample, config.seed, config.augment, Toy.image, train=True
        )
    )(device.observation, device.sample)
    prediction = Toy().predict({"params": params}, observed)
    for number, name in enumerate(("even", "odd")):
        mask = batch.actions.mask & (batch.dataset == number)[:, None, None]
        actual = dataclasses.replace(device.actions, mask=jnp.asarray(mask))
        expected, _ = action_loss(prediction, actual, config.optim.gripper_weight)
        assert float(metrics[f"loss/{name}"]) == pytest.approx(float(expected), rel=1e-4)
    step, state, batch, mesh = first_step(1, names=("even", "odd", "absent"))
    _, metrics = step(state, shard_batch(batch, mesh))
    assert np.isnan(metrics["loss/absent"])


MOVES = ("all-to-all", "collective-permute")


def moved(function, batch, mesh) -> list[str]:
    where = batch_sharding(mesh)
    text = jax.jit(function, in_shardings=where).lower(batch).compile().as_text() or ""
    return [line for line in text.splitlines() if any(f" {m}(" in line for m in MOVES)]


def test_no_image_leaves_its_device_when_a_batch_is_cut():
    mesh = make_mesh(MeshConfig(4, 2, 1))
    images = jnp.zeros((32, 3, 4, 4, 3), jnp.uint8)

    def contiguous(x: jax.Array) -> jax.Array:
        parts = x.reshape(2, 16, *x.shape[1:])
        where = jax.NamedSharding(mesh, jax.P(None, *batch_sharding(mesh).spec))
        return jax.lax.with_sharding_constraint(parts, where)

    assert moved(contiguous, images, mesh)  # so the search finds what it looks for
    assert not moved(lambda x: split_rows(x, 2, mesh), images, mesh)
    step, state, batch, mesh = first_step(2, (4, 2, 1))
    compiled: Any = step
    text = compiled.lower(state, shard_batch(batch, mesh)).compile().as_text()
    lines = [line for line in text.splitlines() if "u8[" in line]
    assert lines
    assert not [x for x in lines if any(f" {m}(" in x for m in (*MOVES, "all-gather"))]


def test_evaluation_survives_an_empty_batch_but_not_an_empty_split():
    config, mesh, template, state = set_up((1, 1, 1))
    step = evaluate.make_eval_step(Toy(), config, mesh, template)
    full, empty = make_batch(0), make_batch(1)
    empty.actions.mask[:] = False
    alone = evaluate.evaluate(step, state, [full], mesh)
    assert evaluate.evaluate(step, state, [empty, full, empty], mesh) == alone
    for batches in ([], [empty]):
        with pytest.raises(ValueError, match="no supervised action"):
            evaluate.evaluate(step, state, batches, mesh)


def test_baseline_is_the_mean_action_of_each_dataset():
    means = [np.array([0.1, 0.2, 0.3]), np.array([0.4, 0.5, -0.1])]
    baseline = evaluate.mean_actions(means, [0.5, -0.5])
    np.testing.assert_allclose(baseline.arm, [[0.1, 0.2], [0.4, 0.5]])
    assert np.asarray(baseline.gripper).tolist() == [False, True]
    assert baseline.middle.tolist() == [0.5, -0.5]


def test_a_gripper_that_is_a_number_is_compared_in_its_own_units():
    config, mesh, template, state = set_up((1, 1, 1))
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, head=HeadConfig(gripper="number"))
    )
    batch, results = make_batch(0), []
    prediction = Toy().predict({"params": jax.tree.map(np.asarray, state.params)}, seen(batch))
    for middle in (0.5, -0.25):
        middles = np.full(2, middle, np.float32)
        baseline = evaluate.Baseline(np.zeros((2, 6), np.float32), np.ones(2, bool), middles)
        step = evaluate.make_eval_step(Toy(), config, mesh, template, baseline)
        results.append(evaluate.evaluate(step, state, [batch], mesh)["gripper"])
        actual = np.asarray(prediction.gripper) > middle
        right = actual == (batch.actions.chunk[..., -1] > middle)
        assert results[-1] == pytest.approx(right[batch.actions.mask].mean(), rel=1e-6)
    assert results[0] != results[1]


def test_report_writes_what_it_says(tmp_path):
    result = {"l1_mean": 0.25, "gripper": 0.9, "count": 7, "baseline_l1_mean": 0.5}
    text = evaluate.report({**result, "baseline_gripper": 0.6}, tmp_path)
    assert "0.2500" in text
    assert "0.5000" in text
    saved = json.loads((tmp_path / "eval.json").read_text(encoding="utf-8"))
    assert saved == {**result, "baseline_gripper": 0.6}
    assert [p.name for p in tmp_path.iterdir()] == ["eval.json"]


def test_a_step_that_is_not_finite_leaves_everything_but_its_number_as_it_was():
    _, mesh, _, state = set_up((2, 2, 2), (), 0.9)
    step = compiled((2, 2, 2), (), 0.9)
    state, metrics = step(state, shard_batch(make_batch(0), mesh))
    assert float(metrics["skipped"]) == 0
    before = jax.tree.map(np.asarray, (state.trainable, state.ema, state.opt_state))
    bad = make_batch(1)
    bad.actions.chunk[3, 0, 0, 2] = np.nan
    bad.actions.mask[3, 0, 0] = True
    state, metrics = step(state, shard_batch(bad, mesh))
    assert float(metrics["skipped"]) == 1
    assert int(state.step) == 2
    jax.tree.map(
        np.testing.assert_array_equal, (state.trainable, state.ema, state.opt_state), before
    )
    state, metrics = step(state, shard_batch(make_batch(2), mesh))
    assert float(metrics["skipped"]) == 0
    assert np.isfinite(float(metrics["loss"]))
