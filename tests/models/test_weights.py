"""Weight maps: every layout of fused matrices in, and back bit for bit."""

import numpy as np
import pytest

from tests import arrays
from vla_jax.models import weights
from vla_jax.models.weights import Weight

WIDTH, HEADS, GROUPS, K = 12, 4, 2, 3
RNG = np.random.default_rng(0)


def separate(groups: int = HEADS) -> list[np.ndarray]:
    """q, k, v as torch.nn.Linear would hold them: [out, in]."""
    return [RNG.normal(size=(h * K, WIDTH)).astype(np.float32) for h in (HEADS, groups, groups)]


def kernels(parts: list[np.ndarray]) -> list[np.ndarray]:
    """As our projections hold them: [in, heads, head width], from x @ kernel = torch's W x."""
    return [
        np.stack([part[i * K : (i + 1) * K].T for i in range(len(part) // K)], 1) for part in parts
    ]


def blocks(parts):
    """MPT's and Moondream's Wqkv, Qwen's c_attn, torch's in_proj_weight: one after the other."""
    return np.concatenate(parts)


def conv1d(parts):
    """GPT-2's c_attn: the same, transposed."""
    return np.concatenate([part.T for part in parts], axis=1)


def head_by_head(parts):
    """GPT-NeoX's query_key_value: q, k, v of head 0, then of head 1, ..."""
    rows = [part[h * K : (h + 1) * K] for h in range(HEADS) for part in parts]
    return np.concatenate(rows)


LAYOUTS = [
    ("linear", blocks, HEADS),
    ("linear", blocks, GROUPS),
    ("conv1d", conv1d, HEADS),
    ("conv1d", conv1d, GROUPS),
    ("interleaved_linear", head_by_head, HEADS),
]


@pytest.mark.parametrize(("kind", "fuse", "groups"), LAYOUTS)
@pytest.mark.parametrize("stacked", [False, True])
def test_fused_kernels(kind, fuse, groups, stacked):
    layers = [separate(groups) for _ in range(3 if stacked else 1)]
    name = "h.{}.qkv.weight" if stacked else "qkv.weight"
    row = Weight(name, "attn/{q,k,v}/kernel", kind)
    reference = {n: fuse(parts) for n, parts in zip(row.expand(len(layers)), layers, strict=True)}
    expected = [kernels(parts) for parts in layers]
    ours = {}
    for i, path in enumerate(row.targets):
        stack = [single[i] for single in expected]
        ours[path] = np.stack(stack) if stacked else stack[0]
    shapes = {path: value.shape for path, value in ours.items()}
    assert list(shapes) == ["attn/q/kernel", "attn/k/kernel", "attn/v/kernel"]

    results = {n: value.shape for n, value in reference.items()}
    assert str(weights.check([row], shapes, results)) == ""
    got = weights.to_ours(row, shapes, reference.__getitem__)
    for path, value in ours.items():
        np.testing.assert_array_equal(got[path], value)
    back = arrays.to_theirs(row, got)
    assert set(back) == set(reference)
    for n, value in reference.items():
        assert back[n].tobytes() == value.tobytes()
        assert back[n].flags.c_contiguous


@pytest.mark.parametrize("kind", ["flat", "interleaved_flat"])
def test_fused_biases(kind):
    parts = [RNG.normal(size=(HEADS * K,)).astype(np.float32) for _ in range(3)]
    fused = np.concatenate(parts) if kind == "flat" else head_by_head(parts)
    row = Weight("qkv.bias", "attn/{q,k,v}/bias", kind)
    shapes = dict.fromkeys(row.targets, (HEADS, K))
    got = weights.to_ours(row, shapes, {"qkv.bias": fused}.__getitem__)
    for part, path in zip(parts, row.targets, strict=True):
        np.testing.assert_array_equal(got[path], part.reshape(HEADS, K))
    assert arrays.to_theirs(row, got)["qkv.bias"].tobytes() == fused.tobytes()


def test_fused_pairs():
    """Any number of parts: key and value of a perceiver, gate and up of an MLP."""
    k, v = RNG.normal(size=(2, 6, 5)).astype(np.float32)
    row = Weight("to_kv.weight", "{k,v}/kernel", "linear")
    got = weights.to_ours(
        row, {"k/kernel": (5, 2, 3), "v/kernel": (5, 2, 3)}, lambda _: np.concatenate([k, v])
    )
    np.testing.assert_array_equal(got["v/kernel"], v.T.reshape(5, 2, 3))
    np.testing.assert_array_equal(
        arrays.to_theirs(row, got)["to_kv.weight"], np.concatenate([k, v])
    )


@pytest.mark.parametrize("kind", ["conv1d", "conv1d_from_heads"])
def test_conv1d(kind):
    x = RNG.normal(size=(HEADS * K, 5)).astype(np.float32)
    shape = (HEADS, K, 5) if kind == "conv1d_from_heads" else (HEADS * K, 5)
    forward, back = weights.TRANSFORMS[kind]
    np.testing.assert_array_equal(forward(x, shape), x.reshape(shape))
    np.testing.assert_array_equal(back(forward(x, shape)), x)


def test_every_second_layer():
    """Towers with inserts stack the layers of a group apart."""
    rows = [Weight("h.{}.w", f"blocks_{i}/w", first=i, step=2) for i in range(2)]
    reference = {f"h.{i}.w": np.full(3, i) for i in range(6)}
    ours = {"blocks_0/w": (3, 3), "blocks_1/w": (3, 3)}
    assert str(weights.check(rows, ours, {k: v.shape for k, v in reference.items()})) == ""
    got = weights.to_ours(rows[1], ours, reference.__getitem__)["blocks_1/w"]
    np.testing.assert_array_equal(got[:, 0], [1, 3, 5])
    assert set(arrays.to_theirs(rows[1], {"blocks_1/w": got})) == {"h.1.w", "h.3.w", "h.5.w"}


def test_report_of_a_fused_row():
    row = Weight("qkv.weight", "attn/{q,k,v}/kernel", "linear")
    ours = {f"attn/{c}/kernel": (WIDTH, HEADS, K) for c in "qkv"}
    report = weights.check([row], ours, {"qkv.weight": (35, WIDTH)})
    assert report.misshaped == (f"qkv.weight: [35, {WIDTH}], expected [36, {WIDTH}]",)
    del ours["attn/k/kernel"]
    report = weights.check([row], ours, {"qkv.weight": (36, WIDTH)})
    assert "(ours) attn/k/kernel: the map names it, the model lacks it" in report.missing
    twice = weights.check(
        [row, row], {**ours, "attn/k/kernel": (WIDTH, HEADS, K)}, {"qkv.weight": (36, WIDTH)}
    )
    assert "(ours) attn/v/kernel: mapped twice" in twice.misshaped


def test_prefixes_keep_the_row():
    row = Weight("h.{}.qkv", "attn/{q,k}", "linear", first=1, step=2)
    (moved,) = weights.prefixed([row], "lm.", "text/")
    assert moved.expand(2) == ["lm.h.1.qkv", "lm.h.3.qkv"]
    assert moved.targets == ("text/attn/q", "text/attn/k")
