"""The building blocks against plain numpy, written from their definitions."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vla_jax.models.towers import layers, norms
from vla_jax.models.towers.block import Block, BlockSpec, stack
from vla_jax.models.towers.softmax import softmax as masked_softmax
from vla_jax.rules import flatten

RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def filled(module, *args, **kwargs):
    """Parameters drawn at random, so that no bias or scale is neutral."""
    args, kwargs = jax.tree.map(jnp.asarray, (args, kwargs))
    shapes = jax.eval_shape(lambda k: module.init(k, *args, **kwargs), jax.random.key(0))["params"]
    return jax.tree.map(lambda leaf: jnp.asarray(0.3 * normal(*leaf.shape)), shapes)


def run(module, params, *args, **kwargs):
    args, kwargs = jax.tree.map(jnp.asarray, (args, kwargs))
    return jax.jit(module.apply)({"params": params}, *args, **kwargs)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def turn(x: np.ndarray, positions: np.ndarray, theta: float, width: int) -> np.ndarray:
    """RoPE as complex numbers, pair (i, i + width / 2), one head and token at a time."""
    out, half = x.copy(), width // 2
    for b, n in np.ndindex(x.shape[:2]):
        for i in range(half):
            spin = np.exp(1j * positions[b, n] * theta ** (-2 * i / width))
            z = (x[b, n, :, i] + 1j * x[b, n, :, i + half]) * spin
            out[b, n, :, i], out[b, n, :, i + half] = z.real, z.imag
    return out


def reference(p, x, keys, mask=None, *, group=1, scale=None, cap=None, bias=None, rope=None):
    """Attention with explicit loops over heads."""
    q, k, v = (
        np.einsum("bnd,dhk->bnhk", y, p[c]["kernel"]) + p[c].get("bias", 0.0)
        for c, y in zip("qkv", (x, keys, keys), strict=True)
    )
    if rope is not None:
        q, k = turn(q, *rope), turn(k, *rope)
    heads, width = q.shape[2:]
    out = np.zeros_like(q)
    for h in range(heads):
        s = np.einsum("bnk,bmk->bnm", q[:, :, h], k[:, :, h // group])
        s *= width**-0.5 if scale is None else scale
        s = s if cap is None else cap * np.tanh(s / cap)
        s = s if bias is None else s + bias[:, h]
        s = s if mask is None else np.where(mask, s, -1e30)
        out[:, :, h] = softmax(s) @ v[:, :, h // group]
    return np.einsum("bnhk,hkd->bnd", out, p["o"]["kernel"]) + p["o"].get("bias", 0.0)


def as_numpy(tree):
    return jax.tree.map(np.asarray, tree)


@pytest.mark.parametrize("kv_heads", [None, 2, 1])
def test_attention_shares_key_heads(kv_heads):
    x, keys = normal(2, 5, 12), normal(2, 7, 10)
    module = layers.Attention(4, kv_heads=kv_heads)
    params = filled(module, x, keys)
    assert params["k"]["kernel"].shape == (10, kv_heads or 4, 3)
    mask = RNG.random((2, 5, 7)) < 0.6
    mask[..., 0] = True
    got = run(module, params, x, keys, mask)
    expected = reference(as_numpy(params), x, keys, mask, group=4 // (kv_heads or 4))
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_attention_scores():
    """Own head width, scale, cap, additive bias, and no projection biases."""
    x, bias = normal(2, 5, 12), normal(1, 3, 5, 5)
    options = {"head_width": 8, "scale": 0.7, "soft_cap": 1.5}
    module = layers.Attention(3, **options, qkv_bias=False, out_bias=False)
    params = filled(module, x, x)
    names = {f"{c}/kernel" for c in "qkvo"}
    assert set(flatten(params)) == names
    got = run(module, params, x, x, bias=jnp.asarray(bias))
    expected = reference(as_numpy(params), x, x, scale=0.7, cap=1.5, bias=bias)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_clip_limits_the_projections():
    x = 10 * normal(1, 4, 8)
    module = layers.Attention(2, clip=0.5, out_bias=False)
    params = filled(module, x, x)
    single = as_numpy(params)
    v = np.clip(
        np.einsum("bnd,dhk->bnhk", x, single["v"]["kernel"]) + single["v"]["bias"], -0.5, 0.5
    )
    matrix = jnp.eye(4, dtype=bool)[None]  # every token sees itself alone: the output is its v
    got = run(module, params, x, x, matrix)
    np.testing.assert_allclose(got, np.einsum("bnhk,hkd->bnd", v, single["o"]["kernel"]), atol=1e-5)


@pytest.mark.parametrize("width", [8, 4])
def test_rotation(width):
    x = normal(2, 5, 24)
    positions = np.array([[0, 1, 2, 3, 4], [7, 9, 100, 2, 2]])
    rope = layers.Rope(100.0, width)
    module = layers.Attention(3)
    params = filled(module, x, x)
    got = run(module, params, x, x, None, rope(jnp.asarray(positions)))
    expected = reference(as_numpy(params), x, x, rope=(positions, 100.0, width))
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_rotation_keeps_relative_scores():
    rope, q, k = layers.Rope(10000.0, 8), normal(1, 1, 1, 8), normal(1, 1, 1, 8)

    def score(i, j):
        turned = [
            layers.rotate(jnp.asarray(x), *rope(jnp.array([[p]]))) for x, p in ((q, i), (k, j))
        ]
        return float(jnp.sum(turned[0] * turned[1]))

    assert score(3, 1) == pytest.approx(score(42, 40), abs=1e-5)
    assert abs(score(3, 1) - score(3, 2)) > 1e-3


@pytest.mark.parametrize(
    ("interleaved", "rows"),
    [(False, (0, 0, 0, 0, 1, 1, 2, 2)), (True, (0, 1, 2, 0, 1, 2, 0, 0))],
)
def test_sections_follow_their_row(interleaved, rows):
    rope = layers.Rope(50.0, 16, sections=(4, 2, 2), interleaved=interleaved)
    assert rope.rows() == rows
    positions = RNG.integers(0, 30, (3, 2, 5))
    plain = layers.Rope(50.0, 16)
    cos, sin = rope(jnp.asarray(positions))
    for i, row in enumerate(rows):
        single = plain(jnp.asarray(positions[row]))
        np.testing.assert_allclose(cos[..., i], single[0][..., i], atol=1e-6)
        np.testing.assert_allclose(sin[..., i], single[1][..., i], atol=1e-6)
    for got, want in zip(
        rope(jnp.asarray(positions[0])), plain(jnp.asarray(positions[0])), strict=True
    ):
        np.testing.assert_array_equal(got, want)


def test_sections_must_fill_the_frequencies():
    with pytest.raises(ValueError, match="must sum to 8"):
        layers.Rope(1e4, 16, sections=(4, 2, 1))


@pytest.mark.parametrize("over", ["head", "all"])
def test_query_and_key_norms(over):
    x = normal(2, 4, 12)
    module = layers.Attention(3, qk_norm="rms", qk_norm_over=over, eps=1e-6)
    params = filled(module, x, x)
    assert params["q_norm"]["scale"].shape == ((4,) if over == "head" else (12,))
    single = as_numpy(params)
    plain = {c: dict(single[c]) for c in "qkvo"}
    # Fold the norms into a reference without them by normalising outside.
    q, k, v = (np.einsum("bnd,dhk->bnhk", x, plain[c]["kernel"]) + plain[c]["bias"] for c in "qkv")

    def rms(y, scale):
        flat = y if over == "head" else y.reshape(2, 4, 12)
        flat = flat / np.sqrt((flat**2).mean(-1, keepdims=True) + 1e-6) * scale
        return flat.reshape(y.shape)

    q, k = rms(q, single["q_norm"]["scale"]), rms(k, single["k_norm"]["scale"])
    weights = softmax(np.einsum("bnhk,bmhk->bhnm", q, k) / 2.0)
    expected = (
        np.einsum("bhnm,bmhk,hkd->bnd", weights, v, single["o"]["kernel"]) + single["o"]["bias"]
    )
    np.testing.assert_allclose(run(module, params, x, x), expected, atol=1e-5)


def test_norms():
    x, scale = normal(3, 7), normal(7)
    root = np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    deviation = np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    centred = (x - x.mean(-1, keepdims=True)) / deviation
    expected = {
        "rms": x / root * scale,
        "rms_plus_one": x / root * (1 + scale),
        "layer_no_bias": centred * scale,
    }
    for kind, want in expected.items():
        module = layers.NORMS[kind](1e-6)
        got = run(module, {"scale": jnp.asarray(scale)}, x)
        np.testing.assert_allclose(got, want, atol=1e-5)
        fresh, _ = module.init_with_output(jax.random.key(0), jnp.asarray(x))
        np.testing.assert_allclose(
            fresh, want / (1 + scale if "plus" in kind else scale), atol=1e-4
        )


def test_gated_mlp():
    x = normal(2, 6)
    module = layers.MLP(10, "silu", gated=True, use_bias=False)
    params = filled(module, x)
    assert set(flatten(params)) == {"gate/kernel", "up/kernel", "down/kernel"}
    p = as_numpy(params)
    gate, up = x @ p["gate"]["kernel"], x @ p["up"]["kernel"]
    expected = (gate / (1 + np.exp(-gate)) * up) @ p["down"]["kernel"]
    np.testing.assert_allclose(run(module, params, x), expected, atol=1e-5)


def test_activations():
    """The formulas: erf and tanh forms of GELU, sigmoids by hand."""
    x = [-3.0, -1.5, 0.0, 0.7, 2.0]
    tanh = [0.5 * v * (1 + math.tanh((2 / math.pi) ** 0.5 * (v + 0.044715 * v**3))) for v in x]
    expected = {
        "gelu": [0.5 * v * (1 + math.erf(v / 2**0.5)) for v in x],
        "gelu_pytorch_tanh": tanh,
        "gelu_new": tanh,
        "quick_gelu": [v / (1 + math.exp(-1.702 * v)) for v in x],
        "silu": [v / (1 + math.exp(-v)) for v in x],
        "relu": [max(v, 0.0) for v in x],
    }
    assert set(expected) == set(layers.ACTIVATIONS)
    for name, want in expected.items():
        np.testing.assert_allclose(layers.ACTIVATIONS[name](jnp.array(x)), want, atol=1e-6)


@pytest.mark.parametrize("residual", ["sequential", "parallel", "parallel_shared"])
def test_residuals(residual):
    x = normal(2, 4, 8)
    spec = BlockSpec(2, 16, "relu", norm="rms", residual=residual)
    params = filled(Block(spec), x)
    assert ("norm2" in params) == (residual != "parallel_shared")

    def part(module, name, *args):
        return np.asarray(run(module, params[name], *args))

    norm, mlp = norms.RMSNorm(1e-5), layers.MLP(16, "relu")
    y = part(norm, "norm1", x)
    attended = x + part(layers.Attention(2), "attn", y, y)
    if residual == "sequential":
        y = part(norm, "norm2", attended)
    elif residual == "parallel":
        y = part(norm, "norm2", x)
    got, _ = run(Block(spec), params, x)
    np.testing.assert_allclose(got, attended + part(mlp, "mlp", y), atol=1e-5)


def test_post_norms_stand_before_the_sum():
    x = normal(1, 3, 8)
    spec = BlockSpec(2, 16, "relu", norm="rms_plus_one", post_norm=True)
    params = filled(Block(spec), x)
    assert {"norm1", "post1", "norm2", "post2"} <= set(params)
    params["post1"]["scale"] = jnp.full(8, -1.0)  # 1 + scale = 0: the branch adds nothing
    params["post2"]["scale"] = jnp.full(8, -1.0)
    got, _ = run(Block(spec), params, x)
    np.testing.assert_array_equal(got, x)


def test_a_layer_lists_all_its_problems():
    with pytest.raises(ValueError, match="transformer layer") as error:
        BlockSpec(3, 8, "tanh", norm="batch", kv_heads=2, residual="none")
    for word in ("'tanh'", "'batch'", "'none'", "2 does not divide 3", "'layer_no_bias'"):
        assert word in str(error.value)


@pytest.mark.parametrize(
    "kind", ["full", *(pytest.param(k, marks=pytest.mark.slow) for k in ("none", "dots"))]
)
def test_stack_equals_a_loop(kind):
    x, mask = jnp.asarray(normal(2, 4, 8)), jnp.tril(jnp.ones((1, 4, 4), bool))
    facts = {"heads": 2, "hidden": 16, "activation": "silu", "gated": True, "kv_heads": 1}
    module = stack(3, kind, "layers", **facts)
    rope = layers.Rope(1e4, 4)(jnp.arange(4)[None])
    params = filled(module, x, mask, rope)

    def loss(p):
        return jnp.sum(run(module, p, x, mask, rope)[0] ** 2)

    def loop(p):
        y = x
        for i in range(3):
            single = jax.tree.map(lambda leaf, i=i: leaf[i], p)
            y, _ = Block(BlockSpec(**facts)).apply({"params": single}, y, mask, rope)
        return jnp.sum(y**2)

    got, expected = (jax.jit(jax.value_and_grad(f))(params) for f in (loss, loop))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, expected)


def same_gradients(found, expected, *args):
    """Of both functions, for a random direction."""
    weight = jnp.asarray(normal(*expected(*args).shape))

    def gradients(function):
        places = tuple(range(len(args)))
        return jax.jit(jax.grad(lambda *x: (function(*x) * weight).sum(), places))(*args)

    for a, b in zip(gradients(found), gradients(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("center", [True, False])
def test_the_gradients_of_norms_are_those_of_their_definition(center):
    def definition(x, scale):
        x = x - x.mean(-1, keepdims=True) if center else x
        return x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-3) * scale + center * scale

    def ours(x, scale):
        if center:
            module, params = norms.LayerNorm(1e-3), {"scale": scale, "bias": scale}
        else:
            module, params = norms.RMSNorm(1e-3), {"scale": scale}
        return module.apply({"params": params}, x)

    same_gradients(ours, definition, jnp.asarray(normal(2, 3, 8)), jnp.asarray(normal(8)))


def test_the_gradients_of_masked_scores_are_those_of_their_definition():
    mask = jnp.asarray(RNG.random((2, 1, 4, 5)) < 0.6).at[0, 0, 0].set(False)

    def definition(x):
        return jax.nn.softmax(jnp.where(mask, x, jnp.finfo(jnp.float32).min), axis=-1)

    scores = jnp.asarray(normal(2, 3, 4, 5))
    same_gradients(lambda x: masked_softmax(jnp.dtype("float32"), x, mask), definition, scores)
    same_gradients(lambda x: masked_softmax(jnp.dtype("float32"), x, None), jax.nn.softmax, scores)


def test_dropout_drops_the_same_in_both_passes():
    keep = jnp.asarray(RNG.random((4, 6)) < 0.5)
    x = jnp.asarray(normal(4, 6))
    same_gradients(lambda x: layers._dropped(0.5, x, keep), lambda x: 2 * x * keep, x)


def test_the_gradient_of_gelu_is_that_of_its_definition():
    x = jnp.asarray(normal(4, 6))
    same_gradients(layers.ACTIVATIONS["gelu"], lambda x: jax.nn.gelu(x, approximate=False), x)
