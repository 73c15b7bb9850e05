"""Write a .pt file that `torch.load(..., weights_only=True)` reads, without PyTorch.

The layout is the one `torch_read` reads back: see there.
"""

import io
import math
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vla_jax.convert.formats.torch_read import STORAGES

SUFFIX = ".pt"
_STEM = "archive"
_ALIGN = 64  # bytes, torch's own: mapped files stay aligned
_NAMES = {dtype: name for name, dtype in STORAGES.items()}


def write(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, np.dtype],
    aliases: Mapping[str, str],
    tensors: Callable[[], Iterator[tuple[str, np.ndarray]]],
    done: Callable[[int], Any] = lambda count: None,
    wrapper: str = "state_dict",
) -> None:
    """One state dict, streamed.

    Args:
        path: the new file.
        shapes: name -> shape, in the order the state dict will have.
        dtypes: name -> type.
        aliases: name -> the name whose storage it shares, as tied weights do.
        tensors: gives every name that is not an alias once, in any order.
        done: called with the bytes just written.
        wrapper: the state dict stands under this key; "" = bare.
    """
    keys = {name: str(i) for i, name in enumerate(n for n in shapes if n not in aliases)}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        _entry(archive, "data.pkl", _pickle(shapes, dtypes, aliases, keys, wrapper))
        _entry(archive, "byteorder", b"little")
        left = set(keys)
        for name, value in tensors():
            if name not in left or (value.shape, value.dtype) != (shapes[name], dtypes[name]):
                raise ValueError(f"{name}: {value.shape} {value.dtype} was not announced")
            left.discard(name)
            data = np.ascontiguousarray(value).reshape(-1).view(np.uint8).data
            _entry(archive, f"data/{keys[name]}", data)
            done(data.nbytes)
        if left:
            raise ValueError(f"{len(left)} tensors not written: {sorted(left)[:5]}")
        # torch's reader refuses an archive without this entry.
        _entry(archive, "version", b"3\n")


def _entry(archive: zipfile.ZipFile, name: str, data: bytes | memoryview) -> None:
    info = zipfile.ZipInfo(f"{_STEM}/{name}")
    # Beyond 2 GiB, with zipfile's own margin, sizes stand in a further extra field of 20 bytes.
    is_large = memoryview(data).nbytes * 1.05 > zipfile.ZIP64_LIMIT
    # A local header is 30 bytes and the name, the extra field's own header 4.
    start = archive.start_dir + 30 + len(info.filename) + 4 + 20 * is_large
    padding = -start % _ALIGN
    info.extra = struct.pack("<HH", 0x4246, padding) + b"Z" * padding  # "FB", as torch pads
    with archive.open(info, "w", force_zip64=is_large) as stream:
        stream.write(data)


def _pickle(
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, np.dtype],
    aliases: Mapping[str, str],
    keys: Mapping[str, str],
    wrapper: str,
) -> bytes:
    """What pickle protocol 2 makes of {wrapper: OrderedDict of tensors}."""
    out = io.BytesIO()
    # Protocol 2, the one that torch.save uses.
    out.write(b"\x80\x02")
    if wrapper:
        out.write(b"}(" + _text(wrapper))
    out.write(_ORDERED_DICT + b"(")
    for name, shape in shapes.items():
        # torch counts strides in elements, and rows lie one behind the other.
        stride = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        # `c` names a function; one mark opens the tuple of its arguments, the other that of the
        # storage.
        out.write(_text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n((")
        out.write(_text("storage") + f"ctorch\n{_NAMES[dtypes[name]]}\n".encode())
        out.write(_text(keys[aliases.get(name, name)]) + _text("cpu"))
        # `t` closes the storage's tuple and `Q` makes a reference to a file of it; 0 is the offset.
        out.write(_integer(math.prod(shape)) + b"tQ" + _integer(0))
        # 0x89 is pickle's False, for requires_grad.
        out.write(_integers(shape) + _integers(stride) + b"\x89" + _ORDERED_DICT + b"tR")
    # `u` puts the pairs since the last mark into a dict, once for the tensors, once for the
    # wrapper.
    out.write(b"u" + (b"u" if wrapper else b"") + b".")
    return out.getvalue()


# `c` names the class and `R` calls it with the empty tuple `)`.
_ORDERED_DICT = b"ccollections\nOrderedDict\n)R"


def _text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _integer(value: int) -> bytes:
    if value < 2**31:
        return b"J" + struct.pack("<i", value)
    # LONG1 with eight bytes, because BININT ends at 31 bits.
    return b"\x8a\x08" + struct.pack("<q", value)


def _integers(values: tuple[int, ...] | list[int]) -> bytes:
    return b"(" + b"".join(map(_integer, values)) + b"t"
