"""The GPU kernels that drop, run as plain operations, against their definition."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vla_jax.models.towers import dropping_attention
from vla_jax.models.towers.dropping_attention import How

RNG = np.random.default_rng(0)


def attend(*args: Any) -> Any:
    return dropping_attention.attend(*args)


def mixed(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x21F0AAAD)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x735A2D97)
    return x ^ (x >> np.uint32(15))


def kept(seed, rows: int, heads: int, n: int, s: int, rate: float) -> np.ndarray:
    """What the kernels keep, [b, h, n, s], written out."""
    first, second, row, head = np.asarray(seed, np.uint32)
    units = (row + np.arange(rows, dtype=np.uint32))[:, None] * np.uint32(heads)
    units = (units + head + np.arange(heads, dtype=np.uint32))[..., None]
    queries, keys = (np.arange(size, dtype=np.uint32) * np.uint32(0x9E3779B9) for size in (n, s))
    queries = mixed(mixed(first ^ mixed(units)) + queries)[..., None]
    keys = mixed(mixed(second ^ mixed(~units)) + keys)[..., None, :]
    word = (queries ^ keys) * np.uint32(0x21F0AAAD)
    word = (word ^ (word >> np.uint32(15))) * np.uint32(0x735A2D97)
    return word >= np.uint32(round(rate * 2**32))


def definition(how: How, qkv, mask, keep):
    q, k, v = qkv
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("bnhw,bshw->bhns", q, k) * how.scale
    allowed = jnp.ones((1, *scores.shape[2:]), bool)
    allowed = jnp.tril(allowed) if how.causal else allowed
    allowed = allowed if mask is None else allowed & mask
    weights = jax.nn.softmax(jnp.where(allowed[:, None], scores, -1e30), -1)
    weights = jnp.where(keep, weights / (1 - how.rate), 0)
    return jnp.einsum("bhns,bshw->bnhw", weights, v)


@pytest.fixture
def blocks(monkeypatch):
    """Small blocks, so that short sequences have several, and the last one a tail."""
    monkeypatch.setattr(dropping_attention, "FORWARD", (16, 8))
    monkeypatch.setattr(dropping_attention, "BACKWARD", (8, 16))


def numbers(rows: int, n: int, s: int, heads: int, groups: int, width: int = 16):
    shapes = (rows, n, heads, width), (rows, s, groups, width), (rows, s, groups, width)
    return [jnp.asarray(RNG.normal(size=shape), jnp.float32) for shape in shapes]


@pytest.mark.parametrize(
    ("n", "s", "heads", "groups", "causal", "mask"),
    [
        (21, 21, 4, 2, True, (2, 1)),
        (21, 21, 2, 2, True, None),
        (9, 30, 2, 1, False, (1, 9)),
        (24, 32, 2, 2, False, (2, 24)),
        (17, 8, 1, 1, False, None),
    ],
)
def test_numbers_and_gradients_are_those_of_the_definition(
    blocks, n, s, heads, groups, causal, mask
):
    q, k, v = numbers(2, n, s, heads, groups)
    weight = jnp.asarray(RNG.normal(size=q.shape), jnp.float32)
    if mask is not None:
        mask = jnp.asarray(RNG.random((*mask, s)) < 0.6).at[..., 0].set(True)
    seed, how = jnp.array([7, 2**31, 5, 1], jnp.uint32), How(0.3, causal, 0.25, heads, True)
    keep = kept(seed, 2, heads, n, s, how.rate)

    def both(function):
        def total(*qkv):
            out = function(*qkv)
            return (out * weight).sum(), out

        return jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(q, k, v)

    attended = both(lambda *qkv: attend(how, *qkv, mask, seed))
    expected = both(lambda *qkv: definition(how, qkv, mask, keep))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5), attended, expected
    )


def test_a_token_that_may_attend_to_nothing_gets_zeros_and_gives_no_gradient(blocks):
    q, k, v = numbers(1, 12, 12, 1, 1)
    mask, how = jnp.arange(12)[None, None] >= 3, How(1.0, True, 0.1, 1, True)  # padding in front

    def total(q, k, v):
        out = attend(how, q, k, v, mask, jnp.zeros(4, jnp.uint32))
        return (out * jnp.arange(12.0)[:, None, None]).sum(), out

    gradients, out = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))(q, k, v)
    assert np.isfinite(out).all()
    assert not np.asarray(out[:, :3]).any()
    assert all(np.isfinite(x).all() for x in gradients)
    assert all(not np.asarray(x[:, :3]).any() for x in gradients)
    assert all(np.asarray(x[:, 4:]).any() for x in gradients)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_as_near_as_it_can_be(blocks, dtype):
    q, k, v = (x.astype(dtype) for x in numbers(1, 20, 20, 2, 1))
    seed, how = jnp.arange(4, dtype=jnp.uint32), How(0.25, True, 0.1, 2, True)
    attended = jax.jit(lambda *x: attend(how, *x, None, seed))(q, k, v)
    wide = (x.astype(jnp.float32) for x in (q, k, v))
    expected = definition(how, wide, None, kept(seed, 1, 2, 20, 20, how.rate))
    assert attended.dtype == dtype
    np.testing.assert_allclose(attended.astype("float32"), expected, atol=0.03)


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """In standard deviations of what independent draws would show."""
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum()) * np.sqrt(a.size))


RATE = 0.1
ROWS, HEADS, N = 3, 4, 256


def pattern(first: int, second: int = 1) -> np.ndarray:
    return kept([first, second, 0, 0], ROWS, HEADS, N, N, RATE).astype(np.float64)


@pytest.mark.parametrize("seed", [(0, 0), (1, 0), (0, 1), (2**32 - 1, 2**31), (123456789, 42)])
def test_every_part_keeps_its_share(seed):
    keep = pattern(*seed)
    for axes in [(), *itertools.combinations(range(4), 1), (0, 1), (1, 2), (0, 3)]:
        averaged = tuple(axis for axis in range(4) if axis not in axes)
        density = keep.mean(averaged)
        deviation = np.sqrt(RATE * (1 - RATE) * density.size / keep.size)
        # Of 256 queries or keys one in all tests together should be so far off by chance.
        assert abs(density - (1 - RATE)).max() < 4.8 * deviation, axes
        # Nor too even: a draw that spreads what it drops is none.
        if density.size >= 100:
            assert 0.75 < density.std() / deviation < 1.25, axes


@pytest.mark.parametrize("seed", [(0, 0), (77, 2**20)])
def test_neighbors_heads_rows_and_seeds_are_independent(seed):
    keep = pattern(*seed)
    for axis, step in itertools.product(range(4), (1, 2, 3)):
        if step < keep.shape[axis]:
            a = np.take(keep, range(step, keep.shape[axis]), axis)
            b = np.take(keep, range(keep.shape[axis] - step), axis)
            assert abs(correlation(a, b)) < 5, (axis, step)
    assert abs(correlation(keep, keep.swapaxes(2, 3))) < 5
    first, second = seed
    for other in [
        (first + 1, second),
        (first, second + 1),
        (second, first + 5),
        (first ^ 2**31, 0),
    ]:
        assert abs(correlation(keep, pattern(*other))) < 5, other
    # Words are combined of one of the query and one of the key: four that share two of each.
    deviations = keep - keep.mean()
    square = deviations[..., ::2, ::2] * deviations[..., 1::2, ::2]
    square = square * deviations[..., ::2, 1::2] * deviations[..., 1::2, 1::2]
    assert abs(square.mean()) < 5 * square.std() / np.sqrt(square.size)


def test_which_weights_are_dropped_does_not_hang_on_the_rate():
    """The kernels compare a word with a threshold: what 0.1 drops, 0.3 drops too."""
    few, many = (kept([3, 4, 0, 0], 1, 1, 64, 64, rate) for rate in (0.1, 0.3))
    assert not (many & ~few).any()


def test_kernels_are_accepted_by_the_language_of_gpus():
    """Lowered, not compiled; newer versions of jax ask which GPU it is for."""
    x = jax.ShapeDtypeStruct((2, 100, 4, 64), jnp.bfloat16)
    mask, seed = jax.ShapeDtypeStruct((2, 1, 100), bool), jax.ShapeDtypeStruct((4,), jnp.uint32)
    how = How(0.125, True, 0.1, 4)

    def total(q, k, v, mask, seed):
        return attend(how, q, k, v, mask, seed).astype(jnp.float32).sum()

    device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", 1, "gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("a",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(jax.grad(total, (0, 1, 2))).trace(x, x, x, mask, seed)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    for name in ("forward", "query", "key"):
        assert f"dropping_{name}_kernel" in text
