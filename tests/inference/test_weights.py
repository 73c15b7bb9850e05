"""Weights kept as bfloat16 or whole numbers: what is stored, and that actions hardly change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import tiny
from tests.models.tiny import build
from vla_jax import rules
from vla_jax.config import resolve
from vla_jax.inference import weights
from vla_jax.inference.batched_step import BatchedStep, StepInput
from vla_jax.models import layers_apart, vla


def built(choice):
    config = resolve(tiny.get_config(choice))
    return config, *build(config.model)


def chunk(config, model, params):
    steps, rng = BatchedStep(model, params, model.image, 0, 1), np.random.default_rng(0)
    structure = config.model.structure
    frame = rng.integers(0, 255, (*model.image.shape, 3), np.uint8)
    text = np.arange(structure.text_len, dtype=np.int32) % 7 + 3
    state = np.zeros(structure.proprio, np.float32) if structure.proprio else None
    mask = np.ones(structure.text_len, bool)
    images = dict.fromkeys(structure.cameras, frame)
    return steps.run([StepInput(images, text, mask, state, steps.empty, 0)])[0][0]


@pytest.mark.parametrize(("axes", "lead", "inputs"), [((8, 6), 0, 1), ((3, 4, 2, 6), 1, 2)])
def test_a_kernel_comes_back_within_half_a_step_of_its_scale(axes, lead, inputs):
    kernel = jax.random.normal(jax.random.key(0), axes) * jnp.linspace(0.1, 9, axes[-1])
    full, scale = weights.quantize(kernel, lead, inputs)
    assert full.dtype == jnp.int8
    assert scale.shape == (*axes[:lead], axes[-1])
    wide = scale.reshape(*axes[:lead], *(1,) * inputs, axes[-1])
    assert (jnp.abs(full * wide - kernel) <= wide / 2 + 1e-6).all()
    assert (jnp.abs(full).max(axis=tuple(range(lead, lead + inputs))) == 127).all()


def test_an_output_without_weights_stays_zero():
    full, scale = weights.quantize(jnp.zeros((4, 3)), 0, 1)
    assert not full.any()
    assert (scale == 1).all()


# A compiled step of each costs some seconds; the default suite has two of other towers.
QUICK = ("kosmos2", "moondream")


@pytest.mark.parametrize(
    "choice",
    [*QUICK, *(pytest.param(b, marks=pytest.mark.slow) for b in tiny.ARCHS if b not in QUICK)],
)
def test_every_backbone_serves_whole_numbers(choice):
    config, model, params = built(choice)
    maps = vla.linear_maps(model)
    flat = rules.flatten(params)
    assert set(maps) == {path for path in flat if path.endswith("kernel")}
    for path, (lead, inputs) in maps.items():
        if flat[path].ndim == lead + 4:  # a convolution
            assert inputs == 3
        else:
            assert lead == bool(rules.STACKED.search(path))
            # The LSTM's two kernels have names of their own.
            assert inputs == rules.match(rules.INPUT_AXES, path.replace("_kernel", "/kernel"))
    stored = rules.flatten(weights.store(params, "int8", jnp.float32, maps))
    kernels = [path for path, x in stored.items() if x.dtype == jnp.int8]
    assert any(rules.STACKED.search(path) for path in kernels)
    assert {path + "_scale" for path in kernels} == {p for p in stored if p not in flat}
    before = chunk(config, model, params)
    after = chunk(config, model, rules.unflatten(stored))
    assert not np.array_equal(before, after)
    assert np.abs(before - after).max() < 0.1


def test_layers_apart_and_bfloat16():
    config, model, params = built("kosmos2")
    stored = weights.store(params, "int8", jnp.float32, vla.linear_maps(model))
    again = layers_apart.together(layers_apart.apart(stored))
    for a, b in zip(jax.tree.leaves(stored), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    half = weights.store(params, "bf16", jnp.float32, {})
    assert {x.dtype for x in jax.tree.leaves(half)} == {jnp.dtype("bfloat16")}
    assert np.abs(chunk(config, model, half) - chunk(config, model, params)).max() < 0.05
    plain = weights.store(params, "", jnp.float32, {})
    np.testing.assert_array_equal(chunk(config, model, plain), chunk(config, model, params))
    with pytest.raises(ValueError, match="'int4' is none of"):
        weights.store(params, "int4", jnp.float32, {})
