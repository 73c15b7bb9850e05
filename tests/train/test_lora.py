import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import quickstart
from tests.models import tiny
from tests.train.toy import make_config
from vla_jax.config import ConfigError, LoraConfig, MeshConfig, resolve
from vla_jax.models import vla
from vla_jax.models.towers.layers import Dense
from vla_jax.rules import flatten, unflatten
from vla_jax.train import lora, split, state
from vla_jax.train.mesh import make_mesh
from vla_jax.train.optim import make_optimizer
from vla_jax.types import Observation

RANK, ALPHA = 3, 5.0
EVERYWHERE = LoraConfig(RANK, ALPHA, 0.0, ("^backbone/.*/kernel$",))


@pytest.fixture(scope="module")
def config():
    raw = quickstart.get_config()
    raw.model.structure.update({"window": 2, "chunk": 2, "text_len": 9})
    raw.model.backbone.arch["vision_config"].update({"hidden_size": 16, "intermediate_size": 24})
    raw.model.backbone.arch["text_config"].update({"embed_dim": 16, "ffn_dim": 24})
    raw.model.head.update({"hidden": 16})
    raw.model.dropout = True
    with raw.unlocked():
        raw.lora.update({"rank": RANK, "alpha": ALPHA, "targets": EVERYWHERE.targets})
    return resolve(raw)


@pytest.fixture(scope="module")
def params(config):
    """With factors that are not at their start, so that they show."""
    _, tree = tiny.build(config.model)
    flat = flatten(jax.jit(lora.extend(lambda key: tree, config.lora))(jax.random.key(0)))
    rng = np.random.default_rng(0)
    for path, x in flat.items():
        if path.endswith("lora_b"):
            assert not np.any(x)
            flat[path] = jnp.asarray(0.3 * rng.standard_normal(x.shape), jnp.float32)
    return unflatten(flat)


def observe() -> Observation:
    rng = np.random.default_rng(0)
    names, observed = ("primary", "wrist"), jnp.ones((2, 2), bool)
    pixels = {c: jnp.asarray(rng.normal(size=(2, 2, 32, 32, 3)), jnp.float32) for c in names}
    text = jnp.asarray(rng.integers(5, 100, (2, 9)), jnp.int32)
    return Observation(pixels, dict.fromkeys(names, observed), text, jnp.ones((2, 9), bool))


def run(config, params, **rngs) -> Any:
    model = vla.build(config.model)
    return jax.jit(lambda p: model.apply({"params": p}, observe(), rngs=rngs))(params)


def test_count_is_the_formula_and_kernels_are_frozen(config, params, capsys):
    base = lora.without(flatten(params))
    kernels = {path: x.shape for path, x in base.items() if path.endswith("/kernel")}
    formula = 0
    for path, shape in kernels.items():
        if path.startswith("backbone/"):
            layers, shape = (shape[0], shape[1:]) if "/layers/" in path else (1, shape)
            inputs = 2 if "/o/" in path else 1
            formula += layers * RANK * (math.prod(shape[:inputs]) + math.prod(shape[inputs:]))
    assert lora.count(flatten(params)) == formula > 0
    targeted = {path for path in kernels if path.startswith("backbone/")}
    kernels_only = dataclasses.replace(config, lora=dataclasses.replace(config.lora, freeze=False))
    parts = split.split(params, lora.train_rules(kernels_only))
    assert set(parts.frozen) == targeted
    # By default all of the VLM stays as it is, and the factors and the head train.
    parts = split.split(params, lora.train_rules(config))
    assert set(parts.frozen) == {path for path in base if path.startswith("backbone/")}
    optim = dataclasses.replace(config.optim, trained=(("^backbone/vision/.*bias$", -1),))
    parts = split.split(params, lora.train_rules(dataclasses.replace(config, optim=optim)))
    biases = {p for p in base if p.startswith("backbone/vision/") and p.endswith("bias")}
    assert biases <= set(parts.trainable)
    assert targeted <= set(parts.frozen)
    with capsys.disabled():
        print(f"\nLoRA rank {RANK}: {formula} numbers beside {len(targeted)} kernels")


def test_merged_equals_unmerged(config, params, capsys):
    ours = run(config, lora.active(params, config.lora, train=False))
    merged = lora.merge(params, config.lora)
    assert set(flatten(merged)) == set(lora.without(flatten(params)))
    reference = run(config, merged)
    plain = run(config, unflatten(lora.without(flatten(params))))
    error = max(
        float(jnp.abs(a - b).max())
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(reference), strict=True)
    )
    assert error <= 1e-5
    assert float(jnp.abs(ours.arm - plain.arm).max()) > 1e-2  # the factors do matter
    with capsys.disabled():
        print(f"\nmerged against unmerged: max abs error {error:.1e} (tolerance 1e-5)")


@pytest.mark.slow
def test_it_starts_as_the_base_model_and_every_factor_learns(config, params):
    flat = flatten(params)
    start = unflatten(
        {p: jnp.zeros_like(x) if p.endswith("lora_b") else x for p, x in flat.items()}
    )
    plain = unflatten(lora.without(flat))
    a, b = run(config, lora.active(start, config.lora, train=False)), run(config, plain)
    assert np.array_equal(a.arm, b.arm)

    model = vla.build(config.model)

    def total(params: Any) -> Any:
        out = model.apply({"params": lora.active(params, config.lora, train=False)}, observe())
        return jnp.sum(out.arm * jnp.arange(6)) + jnp.sum(out.gripper)  # type: ignore[union-attr]

    grads = flatten(jax.jit(jax.grad(total))(params))
    for path, x in lora.without(grads).items():
        if path.endswith("/kernel") and path.startswith("backbone/") and "_b" not in path:
            folder = path.removesuffix("kernel")
            for factor in "ab":
                assert np.any(grads[f"{folder}lora_{factor}"]), (folder, factor, x.shape)


def test_dropout_is_on_activations_of_each_token(config, params):
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 400, 8)), jnp.float32)
    x = jnp.broadcast_to(x[:, :1], x.shape)  # the same token many times
    rng = np.random.default_rng(2)
    tree = {
        "kernel": jnp.zeros((8, 4)), "bias": jnp.zeros(4),
        "lora_a": jnp.asarray(rng.normal(size=(8, 2)), jnp.float32),
        "lora_b": jnp.asarray(rng.normal(size=(2, 4)), jnp.float32),
        "lora_rate": jnp.asarray(0.25),
    }  # fmt: skip
    still: Any = Dense((4,)).apply({"params": tree}, x)
    np.testing.assert_allclose(still, x @ tree["lora_a"] @ tree["lora_b"], rtol=1e-5, atol=1e-5)
    rngs = {"dropout": jax.random.key(3)}
    noisy = np.asarray(Dense((4,)).apply({"params": tree}, x, rngs=rngs))[0]
    assert len(np.unique(noisy.round(5), axis=0)) > 50  # a draw for each token
    spread = noisy.std(0) / np.sqrt(400)
    assert np.all(np.abs(noisy.mean(0) - np.asarray(still)[0, 0]) < 4 * spread)
    # And through the whole model it acts exactly when training.
    rate = LoraConfig(RANK, ALPHA, 0.5, EVERYWHERE.targets)
    quiet = run(config, lora.active(params, rate, train=False))
    again = run(config, lora.active(params, rate, train=True))
    assert np.array_equal(quiet.arm, again.arm)  # no rng, no dropout


@pytest.mark.slow
def test_dropout_reaches_the_layers_of_a_stack(config, params):
    # The backbone's own dropout is off, so all that moves is LoRA's.
    arch = vla.build(config.model).arch
    still = {
        **arch,
        "text_config": {**arch["text_config"], "dropout": 0.0, "attention_dropout": 0.0},
    }
    model = vla.build(config.model, still)

    def out(rate: float, seed: int) -> np.ndarray:
        c = LoraConfig(RANK, ALPHA, rate, EVERYWHERE.targets)
        tree = {"params": lora.active(params, c, train=True)}
        rngs = {"dropout": jax.random.key(seed)}
        return np.asarray(jax.jit(lambda p: model.apply(p, observe(), rngs=rngs))(tree).arm)  # type: ignore[union-attr]

    assert np.array_equal(out(0.0, 1), out(0.0, 2))
    assert not np.array_equal(out(0.5, 1), out(0.5, 2))


def test_factors_shard_resume_and_leave_the_base_untouched(config):
    model = vla.build(config.model)
    mesh = make_mesh(MeshConfig(1, 4, 2))
    init = lora.extend(lambda key: vla.initial_params(model, key), config.lora)
    optimizer = make_optimizer(config.optim, config.train.steps)
    template = state.abstract(init, lora.train_rules(config), optimizer, mesh, min_sharded=64)
    q = "backbone/text/layers/attn/q/"
    assert template.trainable[q + "lora_a"].sharding.spec == jax.P(None, "fsdp", None)
    assert template.trainable[q + "lora_b"].sharding.spec == jax.P(None, None, "fsdp")
    assert q + "kernel" in template.frozen
    moments = {
        getattr(path[-1], "key", None)
        for path, _ in jax.tree_util.tree_leaves_with_path(template.opt_state)
    }
    assert q + "lora_a" in moments
    assert q + "kernel" not in moments


def test_what_cannot_be_is_refused():
    shapes = {"backbone/a/kernel": (4, 4), "backbone/norm/scale": (4,)}
    with pytest.raises(ConfigError) as error:
        lora.factor_shapes(shapes, LoraConfig(2, 1.0, 0.0, ("attn", "backbone")))
    assert "'attn' matches none of 2" in str(error.value)
    assert "backbone/norm/scale is no kernel" in str(error.value)
    changes = {"lora.rank": 4, "lora.targets": (), "lora.dropout": 0.5, "model.dropout": False}
    with pytest.raises(ConfigError) as error:
        make_config(**changes)
    assert "lora.targets: name at least one" in str(error.value)
    assert "no effect without model.dropout" in str(error.value)
