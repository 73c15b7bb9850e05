"""Descriptors of data files, few of them over all datasets of a process."""

import contextlib
import functools
import itertools
import os
import resource
from pathlib import PurePath

_MOST = 256  # files kept open
_numbers = itertools.count()


class OpenFile:
    """A file descriptor that closes with its last reference, so that evicting it is safe."""

    def __init__(self, path: PurePath):
        """Opens it for reading.

        Raises:
            OSError: it cannot be opened.
        """
        self.fd = os.open(path, os.O_RDONLY)

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
def shared_file(path: PurePath, owner: int) -> OpenFile:
    """An opened file, kept for the next read while there is room.

    Args:
        path: of the file.
        owner: a `new_owner`, so that a file that has been replaced since is opened anew by whoever
            opens the dataset anew.

    Raises:
        OSError: it cannot be opened.
    """
    return OpenFile(path)


def new_owner() -> int:
    """A number that nobody else in this process has."""
    return next(_numbers)
