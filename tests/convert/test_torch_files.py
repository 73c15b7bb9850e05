"""The .pt reader and writer: every layout torch.save produces, and nothing that runs code.

Pickles are made with stand-ins for torch's modules, so that they hold exactly the names and
arguments torch writes; tests/convert/test_transformers.py lets torch itself read and write them.
"""

import io
import os
import pathlib
import pickle
import sys
import tracemalloc
import types
import zipfile
from collections import OrderedDict

import jax.numpy as jnp
import numpy as np
import pytest

from vla_jax.convert.formats import torch_write
from vla_jax.convert.formats.torch_read import TorchFile
from vla_jax.models.weights import WeightError


class Storage:
    def __init__(self, kind, data):
        self.kind, self.data = kind, data


class Tensor:
    def __init__(self, storage, offset, size, stride):
        self.storage, self.args = storage, (offset, size, stride)

    def __reduce__(self):
        rebuild = sys.modules["torch._utils"]._rebuild_tensor_v2
        return rebuild, (self.storage, *self.args, False, OrderedDict())


@pytest.fixture
def torch(monkeypatch):
    """Modules with the names a .pt file refers to; only pickling uses them."""
    package, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")

    def named(module, name, value):
        value.__module__, value.__qualname__, value.__name__ = module.__name__, name, name
        setattr(module, name, value)
        return value

    for kind in ("FloatStorage", "HalfStorage", "BFloat16Storage", "LongStorage"):
        named(package, kind, type(kind, (), {}))
    named(utils, "_rebuild_tensor_v2", lambda *args: args)
    named(utils, "_rebuild_parameter", lambda *args: args)
    monkeypatch.setitem(sys.modules, "torch", package)
    monkeypatch.setitem(sys.modules, "torch._utils", utils)
    return package


def save(path, tree, torch, drop=(), compress=(), byteorder=b"little"):
    storages = {}

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            if not isinstance(obj, Storage):
                return None
            key = storages.setdefault(id(obj), (str(len(storages)), obj))[0]
            return ("storage", getattr(torch, obj.kind), key, "cpu", obj.data.size)

    out = io.BytesIO()
    Pickler(out, protocol=2).dump(tree)
    entries = {"data.pkl": out.getvalue(), "version": b"3\n", "byteorder": byteorder}
    entries |= {f"data/{key}": x.data.tobytes() for key, x in storages.values() if key not in drop}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            how = zipfile.ZIP_DEFLATED if name in compress else zipfile.ZIP_STORED
            archive.writestr(f"name/{name}", data, how)
    return path


def floats(n):
    return Storage("FloatStorage", np.arange(n, dtype=np.float32))


def test_layouts(tmp_path, torch):
    joint = floats(24)
    state = OrderedDict(
        plain=Tensor(joint, 0, (2, 3), (3, 1)),
        tied=Tensor(joint, 0, (2, 3), (3, 1)),
        transposed=Tensor(joint, 6, (3, 2), (1, 3)),
        expanded=Tensor(joint, 12, (4, 2), (0, 1)),
        scalar=Tensor(joint, 13, (), ()),
        empty=Tensor(joint, 0, (0, 3), (3, 1)),
        brain=Tensor(Storage("BFloat16Storage", np.arange(4).astype(jnp.bfloat16)), 0, (4,), (1,)),
    )
    file = TorchFile(save(tmp_path / "x.pt", state, torch))
    assert file.wrapper == ""
    np.testing.assert_array_equal(file.read("plain"), np.arange(6).reshape(2, 3))
    np.testing.assert_array_equal(file.read("transposed"), np.arange(6, 12).reshape(2, 3).T)
    np.testing.assert_array_equal(file.read("expanded"), np.tile([12, 13], (4, 1)))
    assert file.read("scalar") == 13
    assert file.read("scalar").shape == ()
    assert file.read("empty").shape == (0, 3)
    assert file.dtypes["brain"] == jnp.bfloat16
    np.testing.assert_array_equal(file.read("brain").astype(int), np.arange(4))
    assert file.place("plain") == file.place("tied") != file.place("transposed")
    assert file.read("transposed").flags.c_contiguous


@pytest.mark.parametrize("wrapper", ["state_dict", "model_state_dict", "module"])
def test_training_checkpoints_keep_their_metadata_to_themselves(tmp_path, torch, wrapper):
    from argparse import Namespace

    tree = {
        "epoch": 3,
        "hyper_parameters": Namespace(path=pathlib.PurePosixPath("/x"), rate=np.float64(0.1)),
        "callbacks": {"seen": {1, 2}},
        wrapper: OrderedDict(w=Tensor(floats(4), 0, (4,), (1,))),
    }
    file = TorchFile(save(tmp_path / "x.pt", tree, torch))
    assert file.wrapper == wrapper
    np.testing.assert_array_equal(file.read("w"), np.arange(4))


class Call:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def test_code_is_refused_and_not_run(tmp_path, torch):
    mark = tmp_path / "ran"
    state = {"w": Tensor(floats(4), 0, (4,), (1,))}
    tree = {"state_dict": state, "a": Call(os.system, f"touch {mark}"), "b": Call(eval, "1")}
    with pytest.raises(WeightError, match=r"pickled code, .*builtin.*eval, posix\.system") as info:
        TorchFile(save(tmp_path / "x.pt", tree, torch))
    assert "nothing of it was run" in str(info.value)
    assert not mark.exists()


@pytest.mark.parametrize("value", [Call(getattr, "", "upper"), Call(__import__, "os"), TorchFile])
def test_no_name_is_imported(tmp_path, torch, value):
    with pytest.raises(WeightError, match="pickled code"):
        TorchFile(save(tmp_path / "x.pt", {"w": value}, torch))


def test_not_a_state_dict(tmp_path, torch):
    with pytest.raises(WeightError, match=r"no state dict; .* found \['epoch'\]"):
        TorchFile(save(tmp_path / "x.pt", {"epoch": 1}, torch))
    mixed = {"state_dict": {"w": Tensor(floats(4), 0, (4,), (1,)), "n": 3}}
    with pytest.raises(WeightError, match=r"not tensors, in its state dict: \['n'\]"):
        TorchFile(save(tmp_path / "x.pt", mixed, torch))


@pytest.mark.parametrize(
    ("size", "stride", "offset"), [((5,), (1,), 0), ((2, 2), (4, 1), 0), ((4,), (1,), 1)]
)
def test_tensors_outside_their_storage(tmp_path, torch, size, stride, offset):
    tree = {"w": Tensor(floats(4), offset, size, stride)}
    with pytest.raises(WeightError, match="outside its storage"):
        TorchFile(save(tmp_path / "x.pt", tree, torch))


def test_damaged_files(tmp_path, torch):
    path = tmp_path / "x.pt"
    tree = {"w": Tensor(floats(400), 0, (400,), (1,))}
    data = save(path, tree, torch).read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(WeightError, match=r"x\.pt: truncated"):
        TorchFile(path)
    path.write_bytes(pickle.dumps({"w": 1}))
    with pytest.raises(WeightError, match=r"bare pickle \(torch before 1\.6\)"):
        TorchFile(path)
    path.write_bytes(b"not weights")
    with pytest.raises(WeightError, match=r"neither a \.pt file"):
        TorchFile(path)
    with pytest.raises(WeightError, match="No such file"):
        TorchFile(tmp_path / "missing.pt")
    with pytest.raises(WeightError, match="name/data/0: missing"):
        TorchFile(save(path, tree, torch, drop={"0"}))
    with pytest.raises(WeightError, match="name/data/0: compressed"):
        TorchFile(save(path, tree, torch, compress={"data/0"}))
    with pytest.raises(WeightError, match="big-endian"):
        TorchFile(save(path, tree, torch, byteorder=b"big"))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02garbage")
    with pytest.raises(WeightError, match="its pickle is damaged"):
        TorchFile(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", b"")
    with pytest.raises(WeightError, match=r"not one torch\.save wrote"):
        TorchFile(path)


def test_nothing_grows_while_it_is_read(tmp_path, torch):
    """Zip bombs: what is small on disk must be small in memory too."""
    path, tree = tmp_path / "x.pt", {"w": Tensor(floats(4), 0, (4,), (1,)), "n": [0] * 10**6}
    bomb = save(path, tree, torch, compress={"data.pkl"})
    assert bomb.stat().st_size < 20_000
    with pytest.raises(WeightError, match="its pickle is compressed"):
        TorchFile(bomb)
    bomb = save(path, {}, torch, byteorder=b"l" * 10**8, compress={"byteorder"})
    tracemalloc.start()
    with pytest.raises(WeightError, match="big-endian"):
        TorchFile(bomb)
    assert tracemalloc.get_traced_memory()[1] < 10**7
    tracemalloc.stop()
    with zipfile.ZipFile(path, "w") as archive:  # None, remembered as number 2^32 - 1
        archive.writestr("x/data.pkl", b"\x80\x02Nr\xff\xff\xff\xff.")
    with pytest.raises(WeightError, match=r"damaged .*memo number 4294967295"):
        TorchFile(path)


def test_written_files_read_back(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {
        "w": rng.normal(size=(3, 4)).astype(np.float32),
        "b": rng.normal(size=5).astype(jnp.bfloat16),
        "s": np.array(1.5, np.float16),
    }
    shapes = {k: v.shape for k, v in tensors.items()} | {"tied": (3, 4)}
    dtypes = {k: v.dtype for k, v in tensors.items()} | {"tied": np.dtype("f4")}
    path, sizes = tmp_path / "x.pt", []
    pairs = tensors.items()
    torch_write.write(path, shapes, dtypes, {"tied": "w"}, lambda: iter(pairs), sizes.append)
    file = TorchFile(path)
    assert (file.wrapper, list(file.shapes)) == ("state_dict", ["w", "b", "s", "tied"])
    assert all(file.read(name).tobytes() == value.tobytes() for name, value in pairs)
    assert file.place("tied") == file.place("w")
    assert sum(sizes) == sum(x.nbytes for x in tensors.values())


def test_a_tensor_of_more_than_two_gigabytes(tmp_path, monkeypatch):
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 1000)  # as if these few numbers were as many
    values = {"big": np.arange(400, dtype=np.float32), "small": np.arange(3, dtype=np.float32)}
    path = tmp_path / "model.pt"
    shapes = {name: value.shape for name, value in values.items()}
    dtypes = {name: value.dtype for name, value in values.items()}
    torch_write.write(path, shapes, dtypes, {}, lambda: iter(values.items()))
    read = TorchFile(path)
    for name, value in values.items():
        np.testing.assert_array_equal(read.read(name), value)
    # Mapped files stay aligned, with the further field of the header as without.
    content = path.read_bytes()
    for value in values.values():
        assert content.index(value.tobytes()) % 64 == 0
