"""Arrays that are read only when their turn comes, and where they come from."""

import math
import re
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np

# Bytes compared or copied at a time.
# numpy's comparison makes a truth value for every byte, so a whole tower at once would need as much
# memory again.
_BLOCK = 64 * 2**20


@dataclass(frozen=True)
class Lazy:
    """One array to come.

    Attributes:
        shape: of the array.
        dtype: of the array.
        read: makes it; may be called more than once.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.size * self.dtype.itemsize


@runtime_checkable
class Source(Protocol):
    """Named tensors of a file or folder, in the file's order; read one by one.

    Attributes:
        shapes: name -> shape.
        dtypes: name -> element type.
    """

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, np.dtype]

    def read(self, name: str) -> np.ndarray:
        """The tensor, contiguous and owned by the caller."""
        ...

    def place(self, name: str) -> Hashable:
        """Where its bytes lie; two names of one place are equal without a look."""
        ...


class Renamed:
    """Another source under other names; see `Source`."""

    def __init__(self, source: Source, renames: Iterable[tuple[str, str]]):
        """Applies to each name the first (pattern, replacement) that matches its start."""
        self._source = source
        self._theirs = {renamed(name, tuple(renames)): name for name in source.shapes}
        self.shapes = {name: source.shapes[old] for name, old in self._theirs.items()}
        self.dtypes = {name: source.dtypes[old] for name, old in self._theirs.items()}

    def read(self, name: str) -> np.ndarray:
        """The tensor, contiguous and owned by the caller."""
        return self._source.read(self._theirs[name])

    def place(self, name: str) -> Hashable:
        """Where its bytes lie."""
        return self._source.place(self._theirs[name])


class Without:
    """Another source but for the names that begin with a prefix; see `Source`."""

    def __init__(self, source: Source, prefix: str):
        """Reads nothing."""
        self._source = source
        names = [name for name in source.shapes if not name.startswith(prefix)]
        self.shapes = {name: source.shapes[name] for name in names}
        self.dtypes = {name: source.dtypes[name] for name in names}

    def read(self, name: str) -> np.ndarray:
        """The tensor, contiguous and owned by the caller."""
        return self._source.read(name)

    def place(self, name: str) -> Hashable:
        """Where its bytes lie."""
        return self._source.place(name)


class Joined:
    """Several sources as one: a name means the tensor of the first that has it; see `Source`."""

    def __init__(self, sources: Iterable[Source]):
        """Reads nothing."""
        self._from: dict[str, tuple[int, Source]] = {}
        for number, source in enumerate(sources):
            for name in source.shapes:
                self._from.setdefault(name, (number, source))
        self.shapes = {name: source.shapes[name] for name, (_, source) in self._from.items()}
        self.dtypes = {name: source.dtypes[name] for name, (_, source) in self._from.items()}

    def read(self, name: str) -> np.ndarray:
        """The tensor, contiguous and owned by the caller."""
        return self._from[name][1].read(name)

    def place(self, name: str) -> Hashable:
        """Where its bytes lie."""
        number, source = self._from[name]
        # With the source's number, as places in two files may look the same.
        return number, source.place(name)


def renamed(name: str, renames: Iterable[tuple[str, str]]) -> str:
    """A name after the first (pattern, replacement) that matches its start."""
    for pattern, replacement in renames:
        # Without the anchor a pattern would also change the middle of a name.
        new, changed = re.subn("^" + pattern, replacement, name)
        if changed:
            return new
    return name


def floating(dtype: np.dtype) -> bool:
    """Whether a weight may have this type: float64, float32, float16 or bfloat16."""
    # Whole numbers are quantized weights, which mean nothing without their scales.
    return dtype in (np.float64, np.float32, np.float16, jnp.bfloat16)


def promote(dtypes: list[np.dtype]) -> np.dtype:
    """The narrowest type that holds all of them exactly."""
    widest = dtypes[0]
    for dtype in dtypes[1:]:
        # By jax's rules, as numpy's do not know bfloat16.
        widest = np.dtype(jnp.promote_types(widest, dtype))
    return widest


def holds(wide: np.dtype, narrow: np.dtype) -> bool:
    """Whether every value of `narrow` is one of `wide`."""
    return np.dtype(jnp.promote_types(wide, narrow)) == wide


def same_bytes(a: np.ndarray, b: np.ndarray) -> bool:
    """Bitwise equality of two contiguous arrays; a NaN equals itself."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    # As bytes, because a NaN as a number differs from itself.
    left, right = a.reshape(-1).view(np.uint8), b.reshape(-1).view(np.uint8)
    return all(
        np.array_equal(left[i : i + _BLOCK], right[i : i + _BLOCK])
        for i in range(0, left.size, _BLOCK)
    )


def parameters(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Number of elements of all of them."""
    return sum(math.prod(shape) for shape in shapes.values())
