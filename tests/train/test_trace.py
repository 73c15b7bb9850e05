from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tests.train import programs
from vla_jax.models.towers import dropping_attention
from vla_jax.plan import compilers, loops
from vla_jax.plan.machines import parse, stand_ins
from vla_jax.plan.programs import control_program
from vla_jax.train import trace
from vla_jax.train.propagation import propagated

ROWS, TOKENS, WIDTH, LAYERS = 26, 5, 16, 3


def test_products_and_convolutions():
    def product(x, w):
        return x @ w

    counted = trace.count(jax.make_jaxpr(product)(jnp.zeros((4, 6)), jnp.zeros((6, 10))))
    assert counted.total == 2 * 4 * 6 * 10
    assert counted.product_bytes == 4 * (4 * 6 + 6 * 10 + 4 * 10)

    def convolution(kernel):
        return jax.lax.conv_general_dilated(jnp.zeros((2, 3, 8, 8)), kernel, (2, 2), "SAME")

    kernel = jnp.zeros((7, 3, 5, 5))  # out, in, height, width
    counted = trace.count(jax.make_jaxpr(convolution)(kernel))
    assert counted.total == 2 * (2 * 7 * 4 * 4) * (3 * 5 * 5)
    assert set(counted.flops) == {"float32"}


def test_loops_multiply_and_conditions_take_the_dearer_branch():
    w = jnp.zeros((WIDTH, WIDTH), jnp.bfloat16)

    def function(x, flag):
        x, _ = jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=LAYERS)
        return jax.lax.cond(flag, lambda x: x @ w @ w, lambda x: x @ w, x)

    x = jnp.zeros((ROWS, WIDTH), jnp.bfloat16)
    counted = trace.count(jax.make_jaxpr(function)(x, True))
    assert counted.flops == {"bfloat16": (LAYERS + 2) * 2 * ROWS * WIDTH * WIDTH}


def test_a_gradient_is_twice_its_forward_pass():
    def loss(w, x):
        return jnp.square(x @ w).sum()

    w, x = jnp.zeros((WIDTH, WIDTH)), jnp.zeros((ROWS, WIDTH))
    forward = trace.count(jax.make_jaxpr(loss)(w, x)).total
    both = trace.count(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(w, x)).total
    assert forward == 2 * ROWS * WIDTH * WIDTH
    assert both == 3 * forward


def test_random_numbers_and_large_values():
    def function(key):
        return jax.random.bits(key, (1000,)).sum() + jax.random.bits(key, (24,)).sum()

    counted = trace.count(jax.make_jaxpr(function)(jax.random.key(0)))
    assert counted.randoms == 1024
    assert counted.top(1)[0][2] >= 4000


def test_a_part_of_the_devices_counts_for_all():
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    rows = PartitionSpec("data")
    product = jax.shard_map(
        lambda x, w: x @ w, mesh=mesh, in_specs=(rows, PartitionSpec()), out_specs=rows
    )
    jaxpr = jax.make_jaxpr(product)(jnp.zeros((8, WIDTH)), jnp.zeros((WIDTH, WIDTH)))
    assert trace.count(jaxpr).total == 2 * 8 * WIDTH * WIDTH


def tower():
    """A loop of layers over rows, and its gradient, lowered for four stand-ins of devices."""
    devices = np.array(stand_ins(parse("h100:4"))).reshape(1, 4, 1)
    mesh = Mesh(devices, ("data", "fsdp", "tensor"))
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    weights = NamedSharding(mesh, PartitionSpec(None, "fsdp", None))

    def loss(w, x):
        def layer(x, w):
            return jnp.tanh(jax.lax.with_sharding_constraint(x, rows) @ w), None

        return jax.lax.scan(layer, x, w)[0].sum()

    w = jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.float32, sharding=weights)
    x = jax.ShapeDtypeStruct((4 * ROWS, TOKENS, WIDTH), jnp.float32, sharding=rows)
    return jax.jit(jax.grad(loss)).trace(w, x).lower(), [w.shape]


def test_what_a_forward_loop_leaves_behind():
    lowered, parameters = tower()
    values = loops.loop_values(propagated(lowered))
    left = loops.residual_bytes(values, parameters, 4 * ROWS)
    layer = ROWS * TOKENS * WIDTH * 4
    stacked = sum(size for name, size in left.items() if name != "held in loops")
    # Inputs and outputs of the product and of tanh, whichever jax keeps.
    assert stacked in [n * LAYERS * layer for n in (1, 2, 3)]
    half = loops.residual_bytes(values, parameters, 4 * ROWS, scale=0.5)
    assert sum(half.values()) == sum(left.values()) / 2


def test_attention_kernels_that_ask_for_a_gpu():
    """CuDNN's is opaque to jax, and its tracing asks what the process's GPU can do."""

    def loss(q):
        return jax.nn.dot_product_attention(q, q, q, implementation="cudnn").sum()

    b, n, h, d = 2, 10, 4, 64
    q = jnp.zeros((b, n, h, d), jnp.bfloat16)
    with compilers.answering_for(parse("h100:8")):
        forward = trace.count(jax.make_jaxpr(loss)(q)).total
        both = trace.count(jax.make_jaxpr(jax.grad(loss))(q)).total
    product = 2 * b * h * n * n * d
    assert (forward, both) == (2 * product, 7 * product)


def test_our_own_attention_kernels_count_as_whole_products():
    """Their loops end where a causal mask does, which no trace can see."""
    how = dropping_attention.How(0.1, True, 0.1, 4)
    seed = jnp.zeros(4, jnp.uint32)

    def loss(q):
        attended: Any = dropping_attention.attend(how, q, q, q, None, seed)
        return attended.sum()

    b, n, h, d = 2, 200, 4, 64
    q = jnp.zeros((b, n, h, d), jnp.bfloat16)
    forward = trace.count(jax.make_jaxpr(loss)(q)).total
    both = trace.count(jax.make_jaxpr(jax.grad(loss))(q)).total
    product = 2 * b * h * n * n * d
    # Scores are computed anew in both kernels of the backward pass.
    assert (forward, both) == (2 * product, 9 * product)


def test_a_policy_that_writes_is_planned_without_its_tokenizer():
    config = programs.config("paligemma", "discrete", "fast", **{"model.dropout": False})
    control = control_program(config, jax.devices()[0])
    single = trace.count(control.step.trace(*control.arguments).jaxpr)
    longer = {"model.dropout": False, "model.fast.length": 16}
    control = control_program(
        programs.config("paligemma", "discrete", "fast", **longer), jax.devices()[0]
    )
    two = trace.count(control.step.trace(*control.arguments).jaxpr)
    assert 0 < single.total <= two.total
