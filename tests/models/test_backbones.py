"""Every backbone in every structure that takes it: trains, streams, writes, or is refused."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench import support
from configs.tiny import ARCHS
from tests.models import tiny
from vla_jax.config import ConfigError
from vla_jax.models import legality, vla
from vla_jax.models.backbones import BACKBONES
from vla_jax.models.structures import STRUCTURES

# The head each structure is run with.
CASES = {
    "policy_head": "lstm",
    "one_step": "mlp",
    "interleaved": "mlp",
    "discrete": "detokenizer",
    "video": "mlp",
}
CELLS = list(itertools.product(ARCHS, CASES))
LEGAL = [cell for cell in CELLS if not legality.refusal(*cell, CASES[cell[1]])]


def config(name, structure):
    spliced = BACKBONES[name].LAYOUT.images == "spliced"
    changes = {} if spliced or structure != "discrete" else {"structure.window": 1}
    return tiny.config(structure, CASES[structure], backbone=name, **changes)


# For the fast suite; two ways to keep a stream's context.
QUICK = ("paligemma2", "qwen2_vl")


def cells():
    for name, structure in LEGAL:
        quick = structure == "policy_head" and name in QUICK
        marks = [] if quick else [pytest.mark.slow]
        yield pytest.param(name, structure, marks=marks)


def test_every_backbone_has_a_small_one():
    assert set(ARCHS) == set(BACKBONES)
    # These go with few backbones; see test_expert and test_parallel.
    assert set(CASES) == set(STRUCTURES) - {"expert", "parallel"}


@pytest.mark.parametrize(("name", "structure"), list(cells()))
def test_streaming_equals_the_window(name, structure):
    """Past the window's end too."""
    model, params = tiny.build(config(name, structure))
    window, key = model.config.structure.window, jax.random.key(9)
    size = model.image.size
    full = tiny.observe(window=window + 1, size=size)
    step = jax.jit(lambda p, o, h: model.apply({"params": p}, o, h, key, method="step"))
    history = model.empty_history(2)
    got: Any = None
    for t in range(window + 1):
        got, history = step(params, tiny.steps(full, t, t + 1), history)
        if structure == "discrete" and t == window - 1:
            break  # what was written before the window began is in the stream's context
    begin = 0 if structure == "discrete" else 1
    last = tiny.steps(full, begin, begin + window)
    expected = jax.jit(lambda p, o: model.apply({"params": p}, o, key))(params, last)
    np.testing.assert_allclose(got.arm, expected.arm[:, -1:], atol=1e-5)
    np.testing.assert_allclose(got.gripper, expected.gripper[:, -1:], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "structure"), LEGAL)
def test_trains(name, structure):
    before, after = support.train(support.build(name, structure, CASES[structure]))
    assert 0 < after < support.LEFT * before


def each():
    for name in ARCHS:
        yield pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow])


@pytest.mark.parametrize("name", list(each()))
def test_padding_changes_nothing(name):
    """A row's prediction does not depend on how far its text is padded, nor on the ids there."""
    model, params = tiny.build(config(name, "policy_head"))
    observation = tiny.observe(window=1, size=model.image.size)
    run = jax.jit(lambda o: model.apply({"params": params}, o, method="features")[0])
    features = [
        run(jax.tree.map(lambda x: x, dataclasses.replace(observation, text=text)))
        for text in (observation.text, jnp.where(observation.text_mask, observation.text, 7))
    ]
    np.testing.assert_allclose(*features, atol=1e-5)


@pytest.mark.parametrize(("name", "structure"), [cell for cell in CELLS if cell not in LEGAL])
def test_refused(name, structure):
    with pytest.raises(ConfigError) as error:
        vla.build(config(name, structure))
    reason = "its images are not part of the sequence, so one sequence holds one step"
    assert f"{name} + {structure}: {reason}; {name} takes" in str(error.value)
