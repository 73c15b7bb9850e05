from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.train.test_checkpoint import META, assert_same, bits
from tests.train.toy import Toy, make_batch, make_config
from vla_jax.config import ConfigError, MeshConfig
from vla_jax.rules import flatten
from vla_jax.train import split, state
from vla_jax.train.checkpoint import Checkpoints, load_params
from vla_jax.train.mesh import make_mesh, shard_batch
from vla_jax.train.optim import make_optimizer
from vla_jax.train.step import make_train_step

QUERY = "backbone/text/layers/attn/q/kernel"
# Frozen but for the head, the vision tower and the last of the two text layers.
LAST = {
    "optim.frozen": ("^backbone/",),
    "optim.trained": (("^backbone/vision/", -1), ("^backbone/text/layers/", 1)),
    "optim.learning_rate": 1e-3,
}


def shapes() -> Any:
    return jax.eval_shape(Toy().init, jax.random.key(0))


def build(**changes: Any):
    config = make_config(**changes)
    mesh = make_mesh(MeshConfig(2, 2, 2))
    optimizer = make_optimizer(config.optim, config.train.steps)
    table = split.train_rules(config.optim)
    ema = config.optim.ema_decay > 0
    template = state.abstract(Toy().init, table, optimizer, mesh, min_sharded=64, ema=ema)
    current = state.create(Toy().init, optimizer, template, config.seed)
    return mesh, template, current, make_train_step(Toy(), config, mesh, template)


def test_split_casts_and_merges_back():
    parts = split.split(shapes(), [("backbone/vision", 0), (r"norm/scale$", 0)])
    assert set(parts.frozen) == {
        "backbone/vision/patch/kernel",
        "backbone/text/layers/norm/scale",
    }
    assert {x.dtype for x in parts.frozen.values()} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in parts.trainable.values()} == {jnp.dtype(jnp.float32)}
    assert jax.tree.structure(split.merge(*parts)) == jax.tree.structure(shapes())


def test_the_first_rule_wins_and_a_stack_is_cut():
    config = make_config(**LAST).optim
    params = Toy().init(jax.random.key(0))
    full = flatten(params)
    parts = split.split(params, split.train_rules(config))
    stacks = {path for path in full if "/layers/" in path}
    assert set(parts.trainable) == stacks | {
        "backbone/vision/patch/kernel", "head/arm/kernel", "head/gripper/kernel"
    }  # fmt: skip
    assert set(parts.frozen) == stacks | {"backbone/text/embedding"}
    np.testing.assert_array_equal(parts.trainable[QUERY], full[QUERY][1:])
    np.testing.assert_array_equal(parts.frozen[QUERY], full[QUERY][:1].astype(jnp.bfloat16))
    joined = flatten(split.merge(*parts))
    assert {p: x.shape for p, x in joined.items()} == {p: x.shape for p, x in full.items()}
    np.testing.assert_array_equal(joined[QUERY][1:], full[QUERY][1:])
    again = split.split_like(joined, parts)
    assert_same(bits(again), bits(parts))


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        ([("visoin", 0), ("head", 0)], "'visoin' matches none of 10"),
        ([("backbone", 0), ("head", 0)], "no parameter to train"),
        ([("text/layers/norm", 3)], "layers/norm/scale has 2 layers, not 3 to train"),
        ([("text/layers/norm", -2)], "layers/norm/scale has 2 layers, not -2 to train"),
        ([("head/arm", 1)], "head/arm/kernel is no stack of layers"),
    ],
)
def test_tables_that_cannot_be_are_refused(table, problem):
    with pytest.raises(ConfigError, match=problem):
        split.split(shapes(), table)


def test_frozen_layers_keep_every_bit_for_50_steps_and_cost_no_optimizer_memory(capsys):
    mesh, template, current, step = build(**LAST)
    frozen = bits(current.frozen)
    first = {path: np.array(x) for path, x in current.trainable.items()}
    for i in range(50):
        current, metrics = step(current, shard_batch(make_batch(i), mesh))
        jax.block_until_ready(metrics)  # see train.mesh.InFlight
    assert_same(bits(current.frozen), frozen)
    for path, x in current.trainable.items():
        assert not np.array_equal(x, first[path]), path
    _, everything, _, _ = build()
    trained = sum(x.size for x in first.values())
    counters = 2 * 4  # Adam's and the schedule's step numbers
    assert state.nbytes(current.opt_state) == 8 * trained + counters
    assert (
        state.nbytes(everything.opt_state)
        == 8 * sum(map(np.size, everything.trainable.values())) + 8
    )
    with capsys.disabled():
        print(
            f"\noptimizer bytes: {state.nbytes(everything.opt_state)} with all parameters, "
            f"{state.nbytes(current.opt_state)} with one layer of two, vision and head"
        )
    assert "optimizer state" in state.summary(template)


def test_a_cut_stack_is_saved_whole_and_resumes_to_the_bit(tmp_path):
    mesh, template, current, step = build(**LAST, **{"optim.ema_decay": 0.5})
    current, _ = step(current, shard_batch(make_batch(0), mesh))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, current, {}, META)
        checkpoints.wait()
        again, _ = checkpoints.restore(template)
    assert_same(bits(again), bits(current))
    assert jax.tree.map(lambda x: x.sharding, again) == jax.tree.map(lambda x: x.sharding, template)
    stored = flatten(load_params(tmp_path))
    assert (
        stored[QUERY].shape == shapes()["backbone"]["text"]["layers"]["attn"]["q"]["kernel"].shape
    )
    np.testing.assert_array_equal(stored[QUERY], flatten(current.averaged)[QUERY])


def test_loaded_stacks_are_cut(tmp_path):
    config = make_config(**LAST)
    _, template, _, _ = build(**LAST)
    value = np.random.default_rng(0).standard_normal((2, 16, 4, 4))
    loaded = {QUERY: state.place(template, QUERY, value)}
    optimizer = make_optimizer(config.optim, config.train.steps)
    current = state.create(Toy().init, optimizer, template, config.seed, loaded)
    np.testing.assert_array_equal(current.trainable[QUERY], value[1:].astype(np.float32))
    np.testing.assert_array_equal(current.frozen[QUERY], value[:1].astype(jnp.bfloat16))
