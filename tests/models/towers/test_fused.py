"""One-kernel attention against the plain one, as far as a CPU can run it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from vla_jax.models.towers import fused, layers
from vla_jax.models.towers.block import stack

AXES = ("data", "fsdp", "tensor")
PLAIN = jax.nn.dot_product_attention


def mesh(platform: str, shape: tuple[int, int, int] = (1, 1, 1)) -> AbstractMesh:
    device = AbstractDevice(f"a {platform}", 1, platform)
    return AbstractMesh(shape, AXES, (AxisType.Auto,) * 3, abstract_device=device)


def numbers(rows: int, n: int, heads: int, groups: int, width: int, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = [(rows, n, heads, width)] + [(rows, n, groups, width)] * 2
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def plainly(q, k, v, mask):
    mask = mask.dense() if isinstance(mask, fused.Rule) else mask
    return PLAIN(q, k, v, mask=None if mask is None else mask[:, None], scale=1.0)


def padding(rows: int, n: int) -> jnp.ndarray:
    return jnp.arange(n) < jnp.array([n, n - 3])[:rows, None]


def masks(rows: int, n: int):
    valid = padding(rows, n)
    return {
        "all": None,
        "causal": fused.Rule(valid),
        "valid": fused.Rule(valid[:1], causal=False),
        "any": jnp.asarray(np.random.default_rng(1).random((rows, n, n)) < 0.5)
        .at[..., 0]
        .set(True),
    }


@pytest.mark.parametrize("n", [8, 9])
@pytest.mark.parametrize("kind", ["all", "causal", "valid", "any"])
def test_on_gpus_the_numbers_are_those_of_the_plain_computation(monkeypatch, kind, n):
    recorded = []

    def instead(*args, implementation, **how):
        recorded.append((implementation, [x.shape[1] for x in args]))
        return PLAIN(*args, implementation="xla", **how)

    monkeypatch.setattr(jax.nn, "dot_product_attention", instead)
    q, k, v = numbers(2, n, 4, 2, 16, jnp.bfloat16)
    mask = masks(2, n)[kind]
    with jax.sharding.use_abstract_mesh(mesh("gpu")):
        result: Any = fused.attend(q, k, v, mask, 0.5)
    assert recorded == [("cudnn", [n + n % 2] * 3)]
    expected: Any = plainly(0.5 * q, k, v, mask)
    np.testing.assert_allclose(result.astype("float32"), expected.astype("float32"), atol=0.02)


def one_device():
    axes = (AxisType.Auto,) * 3
    return jax.make_mesh((1, 1, 1), AXES, axis_types=axes, devices=jax.devices()[:1])


def test_on_tpus_short_sequences_drop_what_the_plain_computation_drops(monkeypatch):
    attention, x = layers.Attention(2, dropout=0.5), numbers(2, 12, 1, 1, 128)[0][:, :, 0]
    params = jax.jit(attention.init)(jax.random.key(0), x, x)
    real, mask = padding(2, 12)[..., None], fused.Rule(padding(2, 12))
    recorded = []

    def short(*args):
        recorded.append(args[-1].rate)
        return original(*args, interpret=True)

    original = fused._short_on_tpu
    monkeypatch.setattr(fused, "_short_on_tpu", short)

    def total(params, attend):
        monkeypatch.setattr(fused, "attend", attend)
        y: Any = attention.apply(params, x, x, mask, rngs={"dropout": jax.random.key(1)})
        return jnp.sum(jnp.where(real, y, 0) ** 2)

    kernel = fused.attend
    # Two functions: what is compiled of one is not taken for the other.
    plain = jax.jit(jax.value_and_grad(functools.partial(total, attend=lambda *_: None)))
    expected = plain(params)
    with jax.set_mesh(one_device()), jax.sharding.use_abstract_mesh(mesh("tpu")):
        result = jax.jit(jax.value_and_grad(total), static_argnums=1)(params, kernel)
    assert recorded == [0.5]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), result, expected)


@pytest.mark.parametrize("kind", ["all", "causal"])
def test_on_tpus_numbers_and_gradients_are_those_of_the_plain_computation(monkeypatch, kind):
    monkeypatch.setattr(fused, "SHORTEST_ON_TPU", 100)
    q, k, v = numbers(2, 130, 2, 1, 8)
    mask, real = masks(2, 130)[kind], padding(2, 130)[..., None, None]
    real = jnp.ones_like(real) if mask is None else real

    def total(attend, *qkv):
        return jnp.sum(jnp.where(real, attend(*qkv, mask), 0) ** 2)

    kernel = functools.partial(fused._on_tpu, interpret=True)
    expected = jax.jit(jax.grad(functools.partial(total, plainly), (0, 1, 2)))(q, k, v)
    with jax.set_mesh(one_device()):
        result = jax.jit(jax.grad(functools.partial(total, kernel), (0, 1, 2)))(q, k, v)
    for a, b in zip(result, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)


@pytest.mark.parametrize(
    ("on", "rows", "n", "width", "dtype", "mask"),
    [
        ("cpu", 8, 640, 64, "bfloat16", None),
        ("gpu", 8, 640, 64, "float32", None),
        ("gpu", 8, 640, 20, "bfloat16", None),
        ("gpu", 8, 640, 256, "bfloat16", None),
        ("gpu", 3, 640, 64, "bfloat16", None),
        ("tpu", 8, 128, 72, "bfloat16", None),
        ("tpu", 8, 128, 64, "bfloat16", "plain"),
        ("tpu", 8, 640, 64, "bfloat16", "plain"),
    ],
)
def test_what_no_kernel_takes_is_left_to_the_plain_computation(on, rows, n, width, dtype, mask):
    q = jnp.zeros((rows, n, 2, width), dtype)
    plain = jnp.ones((1, n, n), bool) if mask else None
    with jax.sharding.use_abstract_mesh(mesh(on, (1, 2, 1))):
        assert fused.attend(q, q, q, plain, 1.0) is None
    assert fused.attend(q, q, q, plain, 1.0) is None


def never(*_):
    raise AssertionError


def dropping(width: int = 64, n: int = 64, dtype: str = "bfloat16") -> Any:
    q = jnp.zeros((8, n, 2, width), dtype)
    drop = fused.Drop(0.1, never, lambda: jnp.zeros(2, jnp.uint32))
    with jax.sharding.use_abstract_mesh(mesh("gpu", (2, 2, 2))):
        return jax.make_jaxpr(lambda q: fused.attend(q, q, q, None, 1.0, drop))(q)


def test_on_gpus_dropout_runs_in_our_own_kernel_and_draws_no_mask():
    assert "pallas_call" in str(dropping())


@pytest.mark.parametrize("case", [{"width": 80}, {"width": 256}, {"n": 63}, {"dtype": "float32"}])
def test_dropout_that_the_gpu_kernel_does_not_take_is_left_to_the_plain_computation(case):
    assert not dropping(**case).eqns


@pytest.mark.parametrize("kind", ["all", "causal", "valid", "any"])
def test_what_gpus_drop_hangs_on_the_seed_and_not_on_the_mesh(kind):
    q, k, v = numbers(8, 70, 4, 2, 16)
    mask = jax.tree.map(lambda x: jnp.tile(x, (len(q) // len(x), 1, 1)[: x.ndim]), masks(2, 70))
    mask = masks(2, 70)["valid"] if kind == "valid" else mask[kind]  # one row for all

    def found(shape, seed):
        axes = (AxisType.Auto,) * 3
        devices = jax.devices()[: shape[0] * shape[1] * shape[2]]
        drop = fused.Drop(0.5, never, lambda: jnp.array([seed, 0], jnp.uint32))
        with jax.set_mesh(jax.make_mesh(shape, AXES, axis_types=axes, devices=devices)):
            run = functools.partial(fused._dropping_on_gpu, scale=0.3, drop=drop, interpret=True)
            return np.asarray(jax.jit(lambda q, k, v: run(q, k, v, mask))(q, k, v))

    one = found((1, 1, 1), 0)
    np.testing.assert_allclose(found((2, 2, 2), 0), one, atol=1e-6)
    assert (np.abs(found((2, 2, 2), 1) - one) > 0.01).mean() > 0.9
    # No two rows and no two heads drop alike, even where they see the same.
    q, k, v = (jnp.ones_like(x) * x[:1, :, :1] for x in (q, k, v))
    alike = found((2, 2, 2), 0).swapaxes(1, 2).reshape(32, -1)
    distance = np.abs(alike[:, None] - alike).max(-1) + np.eye(32)
    assert distance.min() > 0.01


@pytest.mark.parametrize("special", [{"soft_cap": 3.0}, {"bias": True}])
def test_what_a_kernel_lacks_keeps_it_from_being_asked(monkeypatch, special):
    monkeypatch.setattr(fused, "attend", never)
    biased = special.pop("bias", False)
    module, x = layers.Attention(2, **special), jnp.ones((1, 4, 8))
    bias = jnp.zeros((1, 2, 4, 4)) if biased else None
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    jax.eval_shape(lambda: module.init(rngs, x, x, bias=bias))


def test_added_tokens_change_nothing():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 9, 8)), jnp.float32)
    layer = stack(2, "none", "layers", heads=2, hidden=16, activation="gelu")
    with jax.sharding.use_abstract_mesh(mesh("gpu")):
        longer, mask, rope = fused.padded(x, None)
    assert longer.shape == (2, 16, 8)
    assert rope is None
    assert fused.padded(x, None) == (x, None, None)
    params = jax.jit(layer.init)(jax.random.key(0), x)
    run: Any = jax.jit(layer.apply)
    np.testing.assert_allclose(run(params, longer, mask)[0][:, :9], run(params, x)[0], atol=1e-6)


def test_products_on_tpus_are_those_of_elsewhere():
    x, kernel = numbers(2, 5, 1, 1, 6)[0][:, :, 0], numbers(6, 3, 1, 1, 4)[0][:, :, 0]
    params = {"kernel": kernel, "bias": kernel[0]}

    def total(params, x):
        y: Any = layers.Dense((3, 4)).apply({"params": params}, x)
        return jnp.sum(y**2)

    expected = jax.jit(jax.value_and_grad(total, (0, 1)))(params, x)
    with jax.set_mesh(one_device()), jax.sharding.use_abstract_mesh(mesh("tpu")):
        # A function of its own, for which nothing compiled elsewhere is taken.
        result = jax.jit(jax.value_and_grad(lambda *args: total(*args), (0, 1)))(params, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), result, expected)
