"""Loops over tokens of a control step on a GPU: the same numbers, no stack of layers in them."""

import contextlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import use_abstract_mesh

from tests.models.towers.test_decoder import SPEC, random_params
from vla_jax.config import load_config
from vla_jax.models import layers_apart
from vla_jax.models.structures.interleaved import ReadHistory
from vla_jax.models.towers.decoder import Decoder, empty_cache
from vla_jax.plan import machines, programs

B, N, MORE = 2, 3, 5
DEVICE = machines.stand_ins(machines.parse("h100:1"))[0]
MESH = layers_apart.serving_mesh(DEVICE)


def write(model: Decoder, prompt: Any) -> Any:
    """Each token is the hidden state of the one before."""
    run = layers_apart.loop_methods(model)
    first = run("run", prompt, jnp.ones((B, N), bool), cache=empty_cache(SPEC, B, N + MORE))

    def one(state: Any, _: None) -> Any:
        cache, hidden = state
        result = run("run", hidden, jnp.ones((B, 1), bool), cache=cache)
        return (result.cache, result.hidden), hidden

    return jax.lax.scan(one, (first.cache, first.hidden[:, -1:]), None, length=MORE)


def traced(mesh: Any, *args: Any) -> Any:
    with contextlib.nullcontext() if mesh is None else use_abstract_mesh(mesh):
        return jax.jit(nn.apply(write, Decoder(SPEC, "none"))).trace(*args)


def test_numbers_of_a_loop_are_the_same_and_no_stack_enters_it():
    prompt = jax.random.normal(jax.random.key(0), (B, N, SPEC.width))
    args = random_params(Decoder(SPEC, "none"), prompt, jnp.ones((B, N), bool)), prompt
    stacked, apart = traced(None, *args), traced(MESH, *args)
    (expected_state, expected), (state, tokens) = (
        each.lower().compile()(*args) for each in (stacked, apart)
    )
    np.testing.assert_allclose(tokens, expected, atol=1e-5)
    # The caches are taken apart as well.
    np.testing.assert_allclose(
        jnp.stack(state[0].keys), expected_state[0].keys, rtol=1e-5, atol=1e-5
    )
    for each, is_stacked in ((stacked, True), (apart, False)):
        scan = [eqn for eqn in each.jaxpr.eqns if eqn.params.get("length") == MORE]
        shapes = [x.aval.shape for x in scan[0].invars]
        assert any(len(s) > 2 and s[0] == SPEC.layers for s in shapes) == is_stacked, shapes


def test_a_history_comes_back_as_it_went_in():
    # Else every second control step would be of another program.
    changes = ["model.structure.kind=interleaved", "model.head.kind=mlp"]
    config = load_config("configs/tiny.py:kosmos2", changes)
    program = programs.control_program(config, DEVICE)
    _, (history,) = jax.eval_shape(program.step, *program.arguments)
    (before,) = program.arguments[5]
    assert isinstance(history, ReadHistory)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), history) == jax.tree.map(
        lambda x: (x.shape, x.dtype), before
    )
