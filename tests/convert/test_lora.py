"""LoRA factors: merged as the layer adds them, and as a PEFT adapter, in both directions."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from vla_jax.convert import lora, maps
from vla_jax.convert.formats.safetensors import Safetensors, Writer
from vla_jax.convert.tensors import Lazy
from vla_jax.models import weights as w
from vla_jax.models.weights import WeightError

RANK, ALPHA = 2, 16.0


def lazy(x):
    return Lazy(x.shape, x.dtype, lambda: x)


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    shapes = {
        "backbone/layers/q/kernel": (3, 4, 2, 5),  # layers, in, heads, width
        "backbone/layers/q/lora_a": (3, 4, RANK),
        "backbone/layers/q/lora_b": (3, RANK, 10),
        "backbone/layers/o/kernel": (3, 2, 5, 4),
        "backbone/layers/o/lora_a": (3, 10, RANK),
        "backbone/layers/o/lora_b": (3, RANK, 4),
        "backbone/dense/kernel": (4, 6),
        "backbone/dense/lora_a": (4, RANK),
        "backbone/dense/lora_b": (RANK, 6),
        "backbone/norm/scale": (4,),
    }
    return {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}


ROWS = [
    w.Weight("layers.{}.q.weight", "backbone/layers/q/kernel", "linear"),
    w.Weight("layers.{}.o.weight", "backbone/layers/o/kernel", "linear_from_heads"),
    w.Weight("dense.weight", "backbone/dense/kernel", "linear"),
    w.Weight("norm.weight", "backbone/norm/scale"),
]


def torch_weights(leaves):
    return dict(maps.outgoing(ROWS, leaves).tensors())


def test_merging_is_what_peft_adds(arrays):
    """In torch's terms: W + alpha / rank * B A, with A [r, in] and B [out, r]."""
    leaves = {path: lazy(x) for path, x in arrays.items()}
    before = {path: leaf for path, leaf in leaves.items() if not lora.is_factor(path)}
    merged = torch_weights(lora.merged(leaves, ALPHA / RANK))
    plain = torch_weights(before)
    adapter = adapter_of(ROWS, leaves)
    for name, weight in plain.items():
        module = "base_model.model." + name.removesuffix(".weight")
        update = 0.0
        if f"{module}.lora_A.weight" in adapter:
            a, b = (adapter[f"{module}.lora_{m}.weight"] for m in "AB")
            assert (a.shape, b.shape) == ((RANK, weight.shape[1]), (weight.shape[0], RANK))
            update = ALPHA / RANK * b @ a
        np.testing.assert_allclose(merged[name], weight + update, atol=2e-5)
    assert not np.array_equal(merged["dense.weight"], plain["dense.weight"])
    np.testing.assert_array_equal(merged["norm.weight"], plain["norm.weight"])
    assert len(adapter) == 2 * (3 + 3 + 1)


def adapter_of(rows, leaves):
    return dict(outgoing(rows, leaves).tensors())


def outgoing(rows, leaves):
    factors = {path: leaf for path, leaf in leaves.items() if lora.is_factor(path)}
    kernels = {path: leaf.shape for path, leaf in leaves.items() if path not in factors}
    return maps.outgoing(lora.adapter_rows(rows, factors, kernels), factors)


def incoming(rows, arrays, source):
    factors = {path: x.shape for path, x in arrays.items() if lora.is_factor(path)}
    kernels = {path: x.shape for path, x in arrays.items() if path not in factors}
    return maps.incoming(lora.adapter_rows(rows, factors, kernels), factors, source).leaves


def there_and_back(rows, arrays, path):
    out = outgoing(rows, {name: lazy(x) for name, x in arrays.items()})
    with Writer(path, out.shapes, out.dtypes) as writer:
        for name, value in out.tensors():
            writer.write(name, value)
    back = incoming(rows, arrays, Safetensors(path))
    assert set(back) == {name for name in arrays if lora.is_factor(name)}
    for name, leaf in back.items():
        np.testing.assert_array_equal(leaf.read(), arrays[name])
    return out


def test_adapters_come_back_to_the_bit(arrays, tmp_path):
    out = there_and_back(ROWS, arrays, tmp_path / "a.safetensors")
    config = lora.adapter_config(
        {"rank": RANK, "alpha": ALPHA, "dropout": 0.1}, out.shapes, "somewhere"
    )
    assert config["target_modules"] == sorted(
        [*(f"layers.{i}.{m}" for i in range(3) for m in "qo"), "dense"]
    )
    assert config["rank_pattern"] == config["alpha_pattern"] == {}


JOINT = "backbone/layers/attn/{q,k,v}/kernel"
HEADS, WIDTH = 3, 4


def joint_arrays(chosen, groups=1, layers=2, inputs=5, dtype: Any = np.float32):
    """Random kernels of a q, k, v in one matrix, k and v with fewer heads; factors for some."""
    rng = np.random.default_rng(1)

    def normal(*shape):
        return rng.normal(size=shape).astype(dtype)

    collected = {}
    for letter in "qkv":
        heads = HEADS if letter == "q" else HEADS // groups
        folder = f"backbone/layers/attn/{letter}"
        collected[f"{folder}/kernel"] = normal(layers, inputs, heads, WIDTH)
        if letter in chosen:
            collected[f"{folder}/lora_a"] = normal(layers, inputs, RANK)
            collected[f"{folder}/lora_b"] = normal(layers, RANK, heads * WIDTH)
    return collected


@pytest.mark.parametrize("chosen", ["qkv", "qv", "k"])
@pytest.mark.parametrize(
    ("kind", "groups"),
    [("linear", 1), ("linear", 3), ("interleaved_linear", 1), ("conv1d", 1)],
)
def test_kernels_that_share_a_module(kind, groups, chosen, tmp_path):
    """W + scale * B A of the module is the module of the merged kernels, and all comes back."""
    arrays = joint_arrays(chosen, groups)
    rows = [w.Weight("layers.{}.qkv.weight", JOINT, kind)]
    out = there_and_back(rows, arrays, tmp_path / "a.safetensors")
    leaves = {path: lazy(x) for path, x in arrays.items()}
    scale = ALPHA / RANK
    plain, merged = (
        dict(maps.outgoing(rows, tree).tensors())
        for tree in (
            {path: leaf for path, leaf in leaves.items() if not lora.is_factor(path)},
            lora.merged(leaves, scale),
        )
    )
    config = lora.adapter_config({"rank": RANK, "alpha": ALPHA, "dropout": 0}, out.shapes, "x")
    adapter, total = dict(out.tensors()), RANK * len(chosen)
    for i in range(2):
        module = f"layers.{i}.qkv"
        a, b = (adapter[f"base_model.model.{module}.lora_{m}.weight"] for m in "AB")
        assert a.shape == (total, 5)
        assert b.shape == ((HEADS + 2 * HEADS // groups) * WIDTH, total)
        reference = config["alpha_pattern"].get(module, ALPHA)
        reference /= config["rank_pattern"].get(module, RANK)
        update = reference * b @ a
        update = update.T if kind == "conv1d" else update
        np.testing.assert_allclose(merged[f"{module}.weight"], plain[f"{module}.weight"] + update,
                                   atol=2e-5)  # fmt: skip
        assert not np.array_equal(merged[f"{module}.weight"], plain[f"{module}.weight"])


def test_half_precision_factors_share_a_module(tmp_path):
    rows = [w.Weight("layers.{}.qkv.weight", JOINT, "linear")]
    there_and_back(rows, joint_arrays("qkv", dtype=jnp.bfloat16), tmp_path / "a.safetensors")


def test_dense_factors_of_a_joint_module_are_refused(tmp_path):
    """As PEFT's own training leaves them: they are no factors of single kernels."""
    rows, arrays = [w.Weight("layers.{}.qkv.weight", JOINT, "linear")], joint_arrays("qkv")
    out = outgoing(rows, {path: lazy(x) for path, x in arrays.items()})
    with Writer(tmp_path / "a.safetensors", out.shapes, out.dtypes) as writer:
        for name, value in out.tensors():
            writer.write(name, value + 1 if "lora_B" in name else value)
    back = incoming(rows, arrays, Safetensors(tmp_path / "a.safetensors"))
    with pytest.raises(WeightError, match=r"layers\..*lora_B\.weight: not block-diagonal"):
        back["backbone/layers/attn/k/lora_b"].read()


@pytest.mark.parametrize(
    "row",
    [
        None,
        w.Weight("layers.{}.in_proj_weight", "backbone/layers/q/kernel", "linear"),
        w.Weight("layers.{}.q.weight", "backbone/layers/q/kernel", "linear_patch"),
    ],
)
def test_kernels_that_are_no_modules_matrix_have_no_adapter(arrays, row):
    rows = [*(r for r in ROWS if "q" not in r.source), *([row] if row else [])]
    leaves = {path: lazy(x) for path, x in arrays.items()}
    with pytest.raises(WeightError, match=r"--lora=merge.*: backbone/layers/q/kernel$"):
        outgoing(rows, leaves)
