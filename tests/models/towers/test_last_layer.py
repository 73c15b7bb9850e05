"""Hidden states of some columns: those that all columns have, for less work."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.towers.test_decoder import BLOCK, SPEC, VALID, B, Gate, N, embeds, random_params
from vla_jax.models.towers.block import BlockSpec
from vla_jax.models.towers.decoder import Decoder, bidirectional_mask
from vla_jax.models.towers.decoder_spec import Insert
from vla_jax.rules import flatten

COLUMNS = jnp.array([[1, 5, 3], [6, 0, 2]])
LEFT = VALID.at[1, :2].set(False)


def block(**facts) -> BlockSpec:
    return dataclasses.replace(BLOCK, **facts)


def deep(layers: int) -> jax.Array:
    return jax.random.normal(jax.random.key(7), (layers, B, N, SPEC.width))


# What a decoder is made of, and what its run is given.
CASES = {
    "rope": ({}, {}),
    "no positions": ({"rope": None}, {}),
    "alibi": ({"rope": None, "alibi": 8.0}, {}),
    "local": ({"window": 2, "local": (True, False, False, True)}, {}),
    "global at the end": ({"window": 2, "local": (True, True, True, False)}, {}),
    "parallel": ({"block": block(residual="parallel")}, {}),
    "shared": ({"block": block(residual="parallel_shared")}, {}),
    "after": ({"block": block(post_norm=True, qk_norm="rms", sub_norm=True)}, {}),
    "own mask": ({}, {"mask": bidirectional_mask(LEFT)}),
    "prefix": ({}, {"prefix": jnp.broadcast_to(jnp.arange(N) < 4, (B, N))}),
    "gain": ({}, {"gain": 1.0 + jnp.arange(N)[None] / N}),
    "deep at the end": ({}, {"deep": deep(4)}),
    "deep at the start": ({}, {"deep": deep(2)}),
    "raw": ({}, {"skip_last": True}),
    "one layer": ({"layers": 1}, {}),
}
# Several of them at once, as a case takes two seconds: each part shows in the states.
SEVERAL = {
    "rope, local, gain, after, deep": (
        CASES["local"][0] | CASES["after"][0],
        CASES["gain"][1] | CASES["deep at the end"][1],
    ),
    "alibi, parallel": (CASES["alibi"][0] | CASES["parallel"][0], {}),
    "own mask": CASES["own mask"],
    "raw": CASES["raw"],  # in which the last layer, and all that is its own, does not show
}


def compared(model: Decoder, more: dict, valid: jax.Array = LEFT) -> None:
    """States and gradients of all parameters, against those of a run of all columns."""
    x = embeds(model.spec)
    context = {"context": embeds(seed=5)} if model.insert else {}
    inputs: Any = functools.partial(model.apply, method="run", **more, **context)
    params = random_params(model, x, valid, None, None, *context.values())

    def some(params, x):
        return inputs(params, x, valid, columns=COLUMNS).hidden

    def all_taken(params, x):
        return jnp.take_along_axis(inputs(params, x, valid).hidden, COLUMNS[..., None], axis=1)

    def both(run):
        weigh = jax.random.normal(jax.random.key(3), (*COLUMNS.shape, model.spec.width))

        def loss(*args):
            hidden = run(*args)
            return jnp.sum(hidden * weigh), hidden

        (_, hidden), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), True))(params, x)
        return hidden, gradients

    (got, gradients), (expected, wanted) = both(some), both(all_taken)
    # Padding attends to nothing, and what comes of it is not defined.
    is_real = np.take_along_axis(np.asarray(valid), np.asarray(COLUMNS), 1)
    np.testing.assert_allclose(got[is_real], expected[is_real], rtol=1e-5, atol=1e-5)
    for path, value in flatten(wanted[0]).items():
        np.testing.assert_allclose(flatten(gradients[0])[path], value, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(gradients[1], wanted[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("facts", "more"),
    [
        *(pytest.param(*case, id=name) for name, case in SEVERAL.items()),
        *(pytest.param(*CASES[n], id=n, marks=pytest.mark.slow) for n in CASES if n not in SEVERAL),
    ],
)
def test_some_columns_are_as_of_all(facts, more):
    compared(Decoder(dataclasses.replace(SPEC, **facts)), more, VALID if "mask" in more else LEFT)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "dots"])
def test_whatever_is_recomputed(remat):
    compared(Decoder(SPEC, remat), {})


@pytest.mark.parametrize(
    ("every", "raw"),
    [(2, False), *(pytest.param(*c, marks=pytest.mark.slow) for c in ((1, False), (2, True)))],
)
def test_with_inserts(every, raw):
    compared(Decoder(SPEC, insert=Insert(every, Gate)), {"skip_last": raw})


def test_no_column_still_gives_keys_and_values():
    params = random_params(Decoder(SPEC), embeds(), VALID)
    run = functools.partial(Decoder(SPEC).apply, method="run", export=True)
    run = jax.jit(run)
    result, full = (
        run(params, embeds(), VALID, columns=columns) for columns in (COLUMNS[:, :0], None)
    )
    assert result.hidden.shape == (B, 0, SPEC.width)
    np.testing.assert_allclose(result.cache.keys, full.cache.keys, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(result.cache.values, full.cache.values, rtol=1e-5, atol=1e-6)


def test_dropout_is_drawn_for_every_layer():
    model = Decoder(dataclasses.replace(SPEC, block=block(dropout=0.5)))
    params = jax.tree.map(jnp.zeros_like, random_params(model, embeds(), VALID))
    params["params"]["layers"]["attn"]["o"]["bias"] += 1.0
    raw = Decoder(dataclasses.replace(model.spec, norm_in_head=True))
    run = jax.jit(functools.partial(raw.apply, method="run"))
    args = params, embeds(), VALID
    drawn = run(*args, columns=COLUMNS, rngs={"dropout": jax.random.key(0)})
    added = np.asarray(drawn.hidden - run(*args, columns=COLUMNS).hidden)
    # Of four layers each adds 1 or, where it is kept, 2.
    assert set(np.unique(np.round(added, 3))) == {-4.0, -2.0, 0.0, 2.0, 4.0}


def test_nothing_of_the_size_of_all_layers_is_kept():
    """Neither a copy of all layers but one, nor the whole stack once for every layer."""
    model = Decoder(dataclasses.replace(SPEC, layers=5))
    params = random_params(model, embeds(), VALID)

    def loss(params):
        return model.apply(params, embeds(), VALID, columns=COLUMNS, method="run").hidden.sum()  # type: ignore

    program = str(jax.make_jaxpr(jax.grad(loss))(params))
    # The inputs of the four layers in the loop are all that it stacks up.
    assert set(re.findall(r"f32\[4,[\d,]*\]", program)) == {f"f32[4,{B},{N},{SPEC.width}]"}
    assert not re.search(r"f32\[\d+,5,", program)


def test_gradients_of_kernels_wait_in_the_type_of_the_products():
    """Of each layer they come once, and so are exact in it; all layers' wait for the optimizer."""
    model = Decoder(SPEC, dtype=jnp.bfloat16)
    params = random_params(model, embeds(), VALID)

    def loss(params):
        hidden = model.apply(params, embeds(), VALID, columns=COLUMNS, method="run").hidden  # type: ignore
        return hidden.astype(jnp.float32).sum()

    program = str(jax.make_jaxpr(jax.grad(loss))(params))
    for path, value in flatten(params["params"]["layers"]).items():
        shape = ",".join(map(str, value.shape))
        kinds = set(re.findall(rf"(\w+)\[{shape}\] = dynamic_update_slice", program))
        assert ("bf16" if path.endswith("kernel") else "f32") in kinds, path
    gradients = jax.eval_shape(jax.grad(loss), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype("float32")}


def test_less_work():
    model = Decoder(dataclasses.replace(SPEC, layers=1))  # the compiler counts loops once
    params = random_params(model, embeds(), VALID)

    def flops(columns):
        run = functools.partial(model.apply, method="run", columns=columns)
        compiled: Any = jax.jit(lambda p: run(p, embeds(), VALID).hidden).lower(params).compile()  # type: ignore
        return compiled.cost_analysis()["flops"]

    assert flops(COLUMNS[:, :1]) < 0.8 * flops(None)
