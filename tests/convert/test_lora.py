"""LoRA factors: merged as the layer adds them, and as a PEFT adapter, in both directions."""

import numpy as np
import pytest

from vla_jax.convert import lora, maps
from vla_jax.convert.safetensors_io import Safetensors, Writer
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
    factors = {path: leaf for path, leaf in leaves.items() if lora.is_factor(path)}
    adapter = dict(maps.outgoing(lora.adapter_rows(ROWS, factors), factors).tensors())
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


def test_adapters_come_back_to_the_bit(arrays, tmp_path):
    factors = {path: lazy(x) for path, x in arrays.items() if lora.is_factor(path)}
    out = maps.outgoing(lora.adapter_rows(ROWS, factors), factors)
    with Writer(tmp_path / "a.safetensors", out.shapes, out.dtypes) as writer:
        for name, value in out.tensors():
            writer.write(name, value)
    source = Safetensors(tmp_path / "a.safetensors")
    kernels = {path: x.shape for path, x in arrays.items() if not lora.is_factor(path)}
    shapes = lora.adapter_shapes(ROWS, kernels, source)
    back = maps.incoming(lora.adapter_rows(ROWS, shapes), shapes, source).leaves
    assert set(back) == set(factors)
    for path, leaf in back.items():
        np.testing.assert_array_equal(leaf.read(), arrays[path])
    config = lora.adapter_config(
        {"rank": RANK, "alpha": ALPHA, "dropout": 0.1}, out.shapes, "somewhere"
    )
    assert config["target_modules"] == sorted(
        [*(f"layers.{i}.{m}" for i in range(3) for m in "qo"), "dense"]
    )


def test_joint_matrices_have_no_adapter(arrays):
    rows = [row for row in ROWS if "q" not in row.source]
    factors = [path for path in arrays if lora.is_factor(path)]
    with pytest.raises(WeightError, match=r"--lora=merge.*: backbone/layers/q/kernel"):
        lora.adapter_rows(rows, factors)
