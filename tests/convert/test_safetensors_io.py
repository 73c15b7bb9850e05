"""Our reader and writer against the reference implementation, and against damaged files."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from vla_jax.convert.formats.safetensors import INDEX, Safetensors, Writer
from vla_jax.models.weights import WeightError


@pytest.fixture
def tensors():
    rng = np.random.default_rng(0)
    return {
        "a.weight": rng.normal(size=(5, 3)).astype(np.float32),
        "half": rng.normal(size=(7,)).astype(np.float16),
        "brain": rng.normal(size=(3, 1, 2)).astype(jnp.bfloat16),
        "scalar": np.array(2.5, np.float32),
        "empty": np.zeros((0, 4), np.float32),
        "whole": np.arange(6, dtype=np.int64),
    }


def write(path, tensors, limit=None):
    shapes = {k: v.shape for k, v in tensors.items()}
    with Writer(path, shapes, {k: v.dtype for k, v in tensors.items()}, limit) as writer:
        for name in reversed(tensors):
            writer.write(name, tensors[name])


def same(a, b):
    assert set(a) == set(b)
    for name in a:
        assert (a[name].shape, a[name].dtype) == (b[name].shape, b[name].dtype)
        assert a[name].tobytes() == b[name].tobytes()


def test_the_reference_reads_what_we_write(tmp_path, tensors):
    write(tmp_path / "x.safetensors", tensors)
    same(load_file(tmp_path / "x.safetensors"), tensors)


def test_we_read_what_the_reference_writes(tmp_path, tensors):
    save_file(tensors, tmp_path / "model.safetensors")
    for source in (Safetensors(tmp_path), Safetensors(tmp_path / "model.safetensors")):
        same({name: source.read(name) for name in source.shapes}, tensors)


def test_shards_respect_the_limit(tmp_path):
    tensors = {f"t{i}": np.full(10, i, np.float32) for i in range(7)}
    write(tmp_path, tensors, limit=100)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [f.name for f in files] == [f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)]
    assert all(sum(x.nbytes for x in load_file(f).values()) <= 100 for f in files)
    index = json.loads((tmp_path / f"model{INDEX}").read_text())
    assert index["metadata"]["total_size"] == 280
    assert set(index["weight_map"]) == set(tensors)
    source = Safetensors(tmp_path)
    same({name: source.read(name) for name in source.shapes}, tensors)


def test_writer_refuses_what_was_not_announced(tmp_path):
    with (
        pytest.raises(ValueError, match="announced"),
        Writer(tmp_path / "x", {"a": (2,)}, {"a": np.dtype("f4")}) as writer,
    ):
        writer.write("a", np.zeros(3, np.float32))
    with (
        pytest.raises(ValueError, match=r"1 tensors not written: \['a'\]"),
        Writer(tmp_path / "x", {"a": (2,)}, {"a": np.dtype("f4")}),
    ):
        pass


DAMAGE = {
    "empty file": lambda data: b"",
    "half of the data": lambda data: data[: len(data) - 30],
    "half of the header": lambda data: data[:40],
    "a huge header length": lambda data: b"\xff" * 8 + data[8:],
    "no JSON": lambda data: data[:8] + b"\x00" * (len(data) - 8),
    "JSON of another kind": lambda data: (2).to_bytes(8, "little") + b"[]",
    "a web page": lambda data: b"<!DOCTYPE html><html>404</html>",
    "a shape that is a lie": lambda data: data.replace(b'"shape":[5,3]', b'"shape":[9,3]'),
    "an unknown type": lambda data: data.replace(b'"dtype":"F16"', b'"dtype":"Q16"'),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_named(tmp_path, tensors, damage):
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    answers = {"empty file": "the file is empty", "a web page": "is a web page"}
    expected = answers.get(damage, "not a whole safetensors file")
    with pytest.raises(WeightError, match=rf"model\.safetensors: {expected}"):
        Safetensors(tmp_path)


def test_every_missing_shard_is_named(tmp_path):
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / f"model{INDEX}").write_text(json.dumps(index))
    with pytest.raises(WeightError) as caught:
        Safetensors(tmp_path)
    assert "one.safetensors: No such file" in str(caught.value)
    assert "two.safetensors: No such file" in str(caught.value)


def test_index_must_tell_the_truth(tmp_path):
    save_file({"a": np.zeros(2)}, tmp_path / "one.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "one.safetensors"}}
    (tmp_path / f"model{INDEX}").write_text(json.dumps(index))
    with pytest.raises(WeightError, match=r"b: absent from one\.safetensors"):
        Safetensors(tmp_path)
    index = {"weight_map": {"a": "../../etc/passwd"}}
    (tmp_path / f"model{INDEX}").write_text(json.dumps(index))
    with pytest.raises(WeightError, match="outside its folder"):
        Safetensors(tmp_path)
