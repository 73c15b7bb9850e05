"""Opened data files, few descriptors over all datasets of a process."""

import contextlib
import functools
import itertools
import os
import resource
from typing import Protocol, runtime_checkable

from vla_jax.data.places import DataPath, RemoteFile, is_remote

_MOST = 256  # files kept open
_numbers = itertools.count()


@runtime_checkable
class Bytes(Protocol):
    """A file of which any number of threads read parts."""

    @property
    def size(self) -> int:
        """Bytes of the file."""
        ...

    def read(self, size: int, at: int) -> bytes:
        """Up to `size` bytes from `at` on.

        Raises:
            OSError: they cannot be read.
        """
        ...


class OpenFile:
    """A file descriptor that closes with its last reference, so that evicting it is safe."""

    def __init__(self, path: DataPath):
        """Opens it for reading.

        Raises:
            OSError: it cannot be opened.
        """
        self.fd = os.open(path, os.O_RDONLY)

    @property
    def size(self) -> int:
        """See `Bytes`."""
        return os.fstat(self.fd).st_size

    def read(self, size: int, at: int) -> bytes:
        """See `Bytes`; no position moves."""
        return os.pread(self.fd, size, at)

    def __del__(self, close=os.close, quiet=contextlib.suppress):
        # At the interpreter's end `os` is gone; the descriptor is absent when the open failed.
        with quiet(OSError, AttributeError):
            close(self.fd)


def limit() -> int:
    """How many files may be kept open: a quarter of what the process may open, `_MOST` at most."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST if soft == resource.RLIM_INFINITY else max(4, min(_MOST, soft // 4))


# Evicting only drops a reference: whoever reads the file meanwhile holds its own.
@functools.lru_cache(maxsize=limit())
def shared_file(path: DataPath, owner: int) -> Bytes:
    """An opened file, kept for the next read while there is room.

    Args:
        path: of the file.
        owner: a `new_owner`, so that a file that has been replaced since is opened anew by whoever
            opens the dataset anew.

    Raises:
        OSError: it cannot be opened.
    """
    return RemoteFile(path) if is_remote(path) else OpenFile(path)


def new_owner() -> int:
    """A number that nobody else in this process has."""
    return next(_numbers)
