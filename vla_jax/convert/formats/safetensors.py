"""Safetensors files, tensor by tensor, in both directions.

Nothing is mapped or held: a tensor is read by one `pread`, and a file is laid out before the first
tensor is known, so peak memory is one tensor either way. Format: eight bytes n, n bytes of JSON
(name -> dtype, shape, data_offsets), then the data (github.com/huggingface/safetensors).
"""

import json
import math
import os
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

from vla_jax.files import explain_file
from vla_jax.models.weights import WeightError

SUFFIX = ".safetensors"
INDEX = ".safetensors.index.json"
# The reference implementation refuses longer headers.
_MAX_HEADER = 100_000_000
DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(jnp.bfloat16),
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "F8_E5M2": np.dtype(jnp.float8_e5m2),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class _Entry:
    file: Path
    start: int


class Safetensors:
    """The tensors of a folder or of one file, by name; see `tensors.Source`."""

    def __init__(self, path: str | Path):
        """Reads the headers.

        Args:
            path: a .safetensors file, or a folder with model.safetensors or
                model.safetensors.index.json and its shards.

        Raises:
            WeightError: naming every file that is missing, truncated or not safetensors, and
                every tensor the index promises and its file lacks.
        """
        path = Path(path)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, np.dtype] = {}
        self._entries: dict[str, _Entry] = {}
        files, promised, problems = _files(path)
        for file in files:
            try:
                self._open(file)
            except OSError as error:
                problems.append(f"{file}: {error.strerror or error}")
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                other = explain_file(file)
                problems.append(f"{file}: {other or f'not a whole safetensors file ({error})'}")
        if not problems:
            problems = [
                f"{name}: {'absent from' if name not in self._entries else 'not in'} {file}, "
                "where the index promises it"
                for name, file in promised.items()
                if name not in self._entries or self._entries[name].file.name != file
            ]
        if problems:
            raise WeightError("\n".join(problems))

    def _open(self, file: Path) -> None:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            # Checked before it is read, as the first bytes of another format give a huge length.
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise ValueError("truncated, or of another format")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        used = []
        for name, entry in header.items():
            dtype = DTYPES.get(entry["dtype"])
            if dtype is None:
                raise ValueError(f"{name}: type {entry['dtype']} is none of {sorted(DTYPES)}")
            shape, (start, stop) = tuple(entry["shape"]), entry["data_offsets"]
            # Not isinstance, for which JSON's true is the int 1.
            if not all(type(x) is int and x >= 0 for x in (*shape, start, stop)):
                raise ValueError(f"{name}: {entry['shape']} at {entry['data_offsets']} cannot be")
            if stop - start != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{name}: {stop - start} bytes cannot be {entry['shape']}")
            # With one name in two shards the result would depend on their order.
            if name in self._entries:
                raise ValueError(f"{name}: also in {self._entries[name].file.name}")
            used.append((start, stop))
            self.shapes[name], self.dtypes[name] = shape, dtype
            self._entries[name] = _Entry(file, 8 + length + start)
        end = max((stop for _, stop in used), default=0)
        if size < 8 + length + end:
            raise ValueError(f"truncated: {size} bytes of {8 + length + end}")
        # As the reference implementation: every byte belongs to one tensor.
        edges = sorted(used)
        is_gapless = [0, *(stop for _, stop in edges)] == [*(start for start, _ in edges), end]
        if not is_gapless or size != 8 + length + end:
            raise ValueError("its tensors overlap, or leave bytes between or behind them")

    def read(self, name: str) -> np.ndarray:
        """One tensor; bfloat16 comes as jax's numpy type of that name."""
        entry, shape, dtype = self._entries[name], self.shapes[name], self.dtypes[name]
        count = math.prod(shape) * dtype.itemsize
        data = np.fromfile(entry.file, np.uint8, count, offset=entry.start)
        if data.size != count:
            raise WeightError(f"{entry.file}: shortened while it was read")
        return data.view(dtype).reshape(shape)

    def place(self, name: str) -> Hashable:
        """Names never share bytes in this format."""
        return name


def _files(path: Path) -> tuple[list[Path], dict[str, str], list[str]]:
    """Files to open, tensor -> file the index promises, problems."""
    index = path / f"model{INDEX}"
    if path.is_file():
        return [path], {}, []
    if index.is_file():
        try:
            promised = dict(json.loads(index.read_text())["weight_map"])
            promised = {str(name): str(file) for name, file in promised.items()}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            other = explain_file(index)
            return [], {}, [f"{index}: {other or f'not an index of shards ({error!r})'}"]
        # A path in a stranger's index could otherwise name any file of this machine.
        outside = sorted({name for name in promised.values() if Path(name).name != name})
        if outside:
            return [], {}, [f"{index}: names files outside its folder: {outside[:3]}"]
        return [path / name for name in sorted(set(promised.values()))], promised, []
    if (path / f"model{SUFFIX}").is_file():
        return [path / f"model{SUFFIX}"], {}, []
    return [], {}, [f"{path}: holds neither model{SUFFIX} nor model{INDEX}"]


def _shards(sizes: Mapping[str, int], limit: int | None) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        # A file ends before the tensor that does not fit, as none is cut in two.
        if limit is not None and shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


class Writer:
    """Writes a folder of safetensors of known names, shapes and types, in any order."""

    def __init__(
        self,
        path: Path,
        shapes: Mapping[str, tuple[int, ...]],
        dtypes: Mapping[str, np.dtype],
        limit: int | None = None,
    ):
        """Lays out the files and creates them at full size.

        Args:
            path: a folder that exists, for model.safetensors, or model-00001-of-0000N.safetensors
                and so on with their index; with `limit` None the one file to write.
            shapes: name -> shape; also the order in which shards are filled.
            dtypes: name -> type.
            limit: bytes of data a file at most (a larger single tensor gets a file to itself).
        """
        sizes = {name: math.prod(shapes[name]) * dtypes[name].itemsize for name in shapes}
        self._shapes, self._dtypes = dict(shapes), dict(dtypes)
        self._left = set(shapes)
        self._where: dict[str, tuple[BinaryIO, int]] = {}
        self._streams: list[BinaryIO] = []
        shards = _shards(sizes, limit)
        files = [path if limit is None else path / f"model{SUFFIX}"]
        if len(shards) > 1:
            of = f"of-{len(shards):05d}{SUFFIX}"
            files = [path / f"model-{i + 1:05d}-{of}" for i in range(len(shards))]
            index: dict[str, Any] = {
                "metadata": {"total_size": sum(sizes.values())},
                "weight_map": {
                    name: file.name
                    for file, names in zip(files, shards, strict=True)
                    for name in names
                },
            }
            (path / f"model{INDEX}").write_text(json.dumps(index, indent=2, sort_keys=True))
        for file, names in zip(files, shards, strict=True):
            self._create(file, names, sizes)

    def _create(self, file: Path, names: list[str], sizes: Mapping[str, int]) -> None:
        # Widest type first, so that every tensor is aligned to its own size.
        names = sorted(names, key=lambda name: -self._dtypes[name].itemsize)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
        offset = 0
        for name in names:
            header[name] = {
                "dtype": _NAMES[self._dtypes[name]],
                "shape": list(self._shapes[name]),
                "data_offsets": [offset, offset + sizes[name]],
            }
            offset += sizes[name]
        text = json.dumps(header, separators=(",", ":")).encode()
        # Spaces after the JSON are legal and make the data start at a multiple of eight.
        text += b" " * (-len(text) % 8)
        stream = file.open("wb")
        self._streams.append(stream)
        stream.write(len(text).to_bytes(8, "little") + text)
        # At full size, tensors can be written in any order, each at its own offset.
        stream.truncate(8 + len(text) + offset)
        for name in names:
            self._where[name] = stream, 8 + len(text) + header[name]["data_offsets"][0]

    def write(self, name: str, value: np.ndarray) -> None:
        """One tensor, once.

        Raises:
            ValueError: if it was not announced so, or was written before.
        """
        expected = (self._shapes.get(name), self._dtypes.get(name))
        if name not in self._left or (value.shape, value.dtype) != expected:
            raise ValueError(f"{name}: {value.shape} {value.dtype}, announced {expected}")
        stream, start = self._where[name]
        stream.seek(start)
        # Through bytes, because Python's buffers know no bfloat16.
        stream.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
        self._left.discard(name)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for stream in self._streams:
            if kind is None:
                stream.flush()
                # The rename that follows must not reach the disk before the data.
                os.fsync(stream.fileno())
            stream.close()
        if kind is None and self._left:
            raise ValueError(f"{len(self._left)} tensors not written: {sorted(self._left)[:5]}")
