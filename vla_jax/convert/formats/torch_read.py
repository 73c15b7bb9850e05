"""Read PyTorch's .pt files without PyTorch and without running what is pickled in them.

A .pt file (torch >= 1.6) is an uncompressed zip: `*/data.pkl` describes the object, `*/data/KEY`
are the raw storages. The pickle is read by an unpickler that knows tensors, storages and plain
containers. Harmless class names that training frameworks leave in their checkpoints become inert
stand-ins; any other name is refused, and nothing of it is imported or called. So torch is not
needed for its own format, and a file from a stranger cannot run code.
"""

import io
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from vla_jax.files import explain_file
from vla_jax.models.weights import WeightError

STORAGES: dict[str, np.dtype] = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(jnp.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}
# Where a checkpoint keeps its tensors: Lightning, older RoboVLMs tools, DeepSpeed.
WRAPPERS = ("state_dict", "model_state_dict", "module")
# Left in checkpoints beside the tensors (hyper-parameters, loop states); read as inert stand-ins.
_METADATA = (
    "argparse", "datetime", "deepspeed", "lightning", "lightning_fabric", "lightning_utilities",
    "numpy", "omegaconf", "pathlib", "pytorch_lightning",
)  # fmt: skip
_METADATA_NAMES = (
    "_codecs.encode", "collections.Counter", "collections.defaultdict", "torch.device",
    "torch.torch_version.TorchVersion", "torch.dtype", "torch.bfloat16", "torch.float16",
    "torch.float32", "torch.float64", "torch.int64", "builtins.dict", "__builtin__.dict",
    "builtins.list", "__builtin__.list",
)  # fmt: skip
_PLAIN: dict[str, Any] = {
    "collections.OrderedDict": OrderedDict,
    "torch.Size": tuple,
    "builtins.set": set,
    "__builtin__.set": set,
    "builtins.frozenset": frozenset,
}
_MAX_PICKLE = 64 * 2**20  # bytes; a state dict of 10 000 tensors takes 2 MB


@dataclass(frozen=True)
class _Tensor:
    """Where a tensor lies: `offset` and `stride` count elements."""

    key: str
    dtype: np.dtype
    numel: int
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class TorchFile:
    """The tensors of a .pt file's state dict; see `tensors.Source`.

    Attributes:
        wrapper: the key the state dict was found under, "" for a bare one.
    """

    def __init__(self, path: str | Path):
        """Reads the description, no tensor.

        Raises:
            WeightError: not such a file, truncated, pickled code in it, or no tensors in it.
        """
        self.path = Path(path)
        try:
            with zipfile.ZipFile(self.path) as archive, self.path.open("rb") as stream:
                tree = _unpickle(archive, self.path)
                self.wrapper, self._tensors = _state_dict(tree, self.path)
                self._starts = _storages(archive, stream, self._tensors, self.path)
        except zipfile.BadZipFile as error:
            raise WeightError(f"{self.path}: {_why_not_zip(self.path)}") from error
        except OSError as error:
            raise WeightError(f"{self.path}: {error.strerror or error}") from error
        self.shapes = {name: t.shape for name, t in self._tensors.items()}
        self.dtypes = {name: t.dtype for name, t in self._tensors.items()}

    def read(self, name: str) -> np.ndarray:
        """One tensor, contiguous."""
        t = self._tensors[name]
        if 0 in t.shape:
            return np.empty(t.shape, t.dtype)
        # Only what the strides reach is read: a small view of a large storage stays small.
        span = _span(t)
        start = self._starts[t.key] + t.offset * t.dtype.itemsize
        raw = np.fromfile(self.path, np.uint8, span * t.dtype.itemsize, offset=start)
        if raw.size != span * t.dtype.itemsize:
            raise WeightError(f"{self.path}: shortened while it was read")
        flat = raw.view(t.dtype)
        strides = tuple(s * t.dtype.itemsize for s in t.stride)
        return np.asarray(np.lib.stride_tricks.as_strided(flat, t.shape, strides), order="C")

    def place(self, name: str) -> Hashable:
        """Tied tensors have the same storage, offset and strides."""
        return self._tensors[name]


def _span(t: _Tensor) -> int:
    # Elements from the first to the last that the strides reach.
    return 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride, strict=True))


def _why_not_zip(path: Path) -> str:
    with path.open("rb") as stream:
        start = stream.read(2)
    if start == b"PK":
        return "truncated: a .pt file whose end (the table of contents) is missing"
    if start[:1] == b"\x80":
        return (
            "a bare pickle (torch before 1.6), which cannot be read without running it; in torch: "
            "torch.save(torch.load(FILE, weights_only=True), NEW)"
        )
    return explain_file(path) or "neither a .pt file (torch >= 1.6) nor .safetensors"


def _unpickle(archive: zipfile.ZipFile, path: Path) -> Any:
    pickles = [i for i in archive.infolist() if i.filename.endswith("/data.pkl")]
    if len(pickles) != 1 or pickles[0].file_size > _MAX_PICKLE:
        raise WeightError(f"{path}: a zip file, but not one torch.save wrote")
    if pickles[0].compress_type != zipfile.ZIP_STORED:
        # Nor may a small file become a large one while it is read.
        raise WeightError(f"{path}: its pickle is compressed, which torch.save never does")
    stem = pickles[0].filename.removesuffix("data.pkl")
    if stem + "byteorder" in archive.namelist():
        with archive.open(stem + "byteorder") as stream:
            # One byte more than expected, so that a longer text does not pass.
            if stream.read(len(b"little") + 1) != b"little":
                raise WeightError(f"{path}: written on a big-endian machine")
    data = archive.read(pickles[0])
    unpickler = _Unpickler(io.BytesIO(data), stem)
    try:
        _check_memo(data)
        tree = unpickler.load()
    # `unpickler.refused` has the reason; it is raised below.
    except _Refused:
        tree = None
    except Exception as error:  # a hostile or damaged pickle fails in any way
        if not unpickler.refused:
            raise WeightError(f"{path}: its pickle is damaged ({error!r})") from error
        tree = None
    if unpickler.refused:
        raise WeightError(
            f"{path}: contains pickled code, {', '.join(sorted(unpickler.refused))}; nothing of it "
            "was run. Only tensors are read: save a state dict, torch.save(model.state_dict(), ...)"
        )
    return tree


def _check_memo(data: bytes) -> None:
    """Refuse memo numbers a pickler never writes: the unpickler makes an array that long."""
    count = 0
    for code, number, _ in pickletools.genops(data):
        if code.name in ("PUT", "BINPUT", "LONG_BINPUT"):
            count += 1
            # Picklers number their memos one after another; the slack is for those that skip some.
            if int(number or 0) > 2 * count + 1000:
                raise ValueError(f"memo number {number} after {count}")


class _Refused(Exception):  # noqa: N818 - control flow of this file
    pass


class _Unpickler(pickle.Unpickler):
    """Tensors and plain containers; every other name is noted in `refused` and never imported."""

    def __init__(self, stream: Any, stem: str):
        super().__init__(stream, encoding="utf-8")
        self._stem = stem
        self.refused: set[str] = set()

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in _PLAIN:
            return _PLAIN[full]
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if full == "torch._utils._rebuild_tensor_v2":
            return lambda *args: _rebuild(*args)
        if full == "torch._utils._rebuild_parameter":
            # A parameter is its tensor; requires_grad and hooks mean nothing here.
            return lambda data, *_: data
        if module.split(".")[0] not in _METADATA and full not in _METADATA_NAMES:
            self.refused.add(full)
        # Refused names too become stand-ins, so that the message can list all of them.
        return type("Inert", (_Inert,), {})

    def persistent_load(self, pid: Any) -> Any:
        # torch writes ("storage", class, key, device, number of elements).
        kind, dtype, key, _, numel = pid
        if kind != "storage" or not isinstance(dtype, np.dtype):
            self.refused.add(f"a storage of type {dtype!r}"[:80])
            raise _Refused
        return f"{self._stem}data/{key}", dtype, int(numel)


class _Inert:
    """Takes whatever a pickle does to an object, and does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> "_Inert":
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass

    def __setitem__(self, *_: Any) -> None:
        pass

    def __call__(self, *_: Any) -> "_Inert":
        return self

    def append(self, _: Any) -> None:
        pass

    def extend(self, _: Any) -> None:
        pass

    def add(self, _: Any) -> None:
        pass

    def __hash__(self) -> int:
        return id(self)


def _rebuild(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> _Tensor:
    key, dtype, numel = storage
    t = _Tensor(key, dtype, numel, int(offset), tuple(map(int, size)), tuple(map(int, stride)))
    # A forged offset or stride would show bytes from outside the storage.
    if t.offset < 0 or min((*t.shape, *t.stride), default=0) < 0 or len(t.shape) != len(t.stride):
        raise ValueError(f"illegal tensor {t}")
    # An empty tensor touches no byte, whatever its offset.
    if 0 not in t.shape and t.offset + _span(t) > numel:
        raise ValueError(f"tensor outside its storage {t}")
    return t


def _state_dict(tree: Any, path: Path) -> tuple[str, dict[str, _Tensor]]:
    for wrapper in ("", *WRAPPERS):
        part = tree if not wrapper else tree.get(wrapper) if isinstance(tree, Mapping) else None
        if not isinstance(part, Mapping) or not part:
            continue
        tensors = {name: t for name, t in part.items() if isinstance(t, _Tensor)}
        if len(tensors) == len(part) and all(isinstance(name, str) for name in part):
            return wrapper, tensors
        if tensors and (wrapper or not any(w in part for w in WRAPPERS)):
            other_names = [str(name) for name in part if name not in tensors]
            raise WeightError(f"{path}: not tensors, in its state dict: {other_names}")
    keys = sorted(map(str, tree))[:10] if isinstance(tree, Mapping) else type(tree).__name__
    raise WeightError(
        f"{path}: no state dict; looked at the top and under {list(WRAPPERS)}, found {keys}"
    )


def _storages(
    archive: zipfile.ZipFile, stream: Any, tensors: Mapping[str, _Tensor], path: Path
) -> dict[str, int]:
    """Position of every storage in the file."""
    starts, problems = {}, []
    size = path.stat().st_size
    entries = {info.filename: info for info in archive.infolist()}
    # Tensors may share a storage, of which one look is enough.
    for t in {t.key: t for t in tensors.values()}.values():
        info = entries.get(t.key)
        if info is None:
            problems.append(f"{t.key}: missing")
            continue
        # The local header's extra field differs from the directory's: it holds the alignment.
        stream.seek(info.header_offset)
        header = stream.read(30)
        skip = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        starts[t.key] = info.header_offset + 30 + skip
        if info.compress_type != zipfile.ZIP_STORED:
            problems.append(f"{t.key}: compressed")
        elif header[:4] != b"PK\x03\x04" or starts[t.key] + info.file_size > size:
            problems.append(f"{t.key}: outside the file")
        elif info.file_size < t.numel * t.dtype.itemsize:
            problems.append(f"{t.key}: {info.file_size} bytes, {t.numel} {t.dtype} expected")
    if problems:
        raise WeightError(f"{path}: damaged:\n  " + "\n  ".join(problems))
    return starts
