"""Gradients that wait for each other, or for which memory waits."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from vla_jax.models import sharding
from vla_jax.models.towers import order


def equations(function, *args) -> list:
    return jax.make_jaxpr(function)(*args).eqns


def test_gradients_of_parameters_come_with_that_of_the_input_and_frozen_ones_not_at_all():
    a, frozen, x = (jax.random.normal(jax.random.key(i), (4, 4)) for i in range(3))

    def loss(a, x, through: Any = order.together):
        params, x = through(({"a": a, "frozen": frozen}, x))
        return jnp.sum(jnp.sin(x @ params["a"]) @ params["frozen"])

    last = equations(jax.grad(loss, (0, 1)), a, x)[-1]
    assert last.primitive.name == "optimization_barrier"
    assert len(last.outvars) == 2
    ordered, expected = (
        jax.grad(functools.partial(loss, through=through), (0, 1))(a, x)
        for through in (order.together, lambda values: values)
    )
    jax.tree.map(np.testing.assert_array_equal, ordered, expected)


def test_a_row_that_is_looked_up_twice_gets_both_gradients_and_a_table_begins_with_them():
    table, ids = jnp.arange(12.0).reshape(4, 3), jnp.array([[1, 1], [3, 0]])
    weight = jax.random.normal(jax.random.key(0), (2, 2, 3))

    def loss(table, lookup):
        return jnp.sum(lookup(table, ids) ** 2 * weight)

    ordered, expected = (
        jax.grad(loss)(table, lookup)
        for lookup in (order.lookup, lambda table, ids: jnp.take(table, ids, axis=0))
    )
    np.testing.assert_array_equal(ordered, expected)
    names = [x.primitive.name for x in equations(lambda t: jax.grad(loss)(t, order.lookup), table)]
    # The zeros of the table are spread behind the barrier, then added to.
    behind = names[names.index("optimization_barrier") :]
    assert behind.index("broadcast_in_dim") < behind.index("scatter-add")


@pytest.mark.parametrize(("shape", "count"), [((1, 8, 1), 1), ((1, 4, 2), 0), ((8, 1, 1), 0)])
def test_a_kernel_is_gathered_once_and_its_gradient_is_not(shape, count):
    mesh = AbstractMesh(shape, ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3)
    kernel = jnp.ones((8, 8))
    with jax.sharding.use_abstract_mesh(mesh):
        program = str(jax.make_jaxpr(jax.grad(lambda k: jnp.sum(sharding.whole(k) ** 2)))(kernel))
    assert program.count("sharding_constraint[") == count
