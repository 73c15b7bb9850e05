"""The memory that C code has freed and keeps for later."""

import ctypes
import functools
from collections.abc import Callable


def trim() -> None:
    """Gives pages that nothing uses back to the system; does nothing without glibc.

    glibc returns only the end of a heap by itself. XLA's compiler, checkpoints and evaluations
    leave hundreds of MB of holes in front of it, and as these get other sizes every time, a long
    run grows although it holds no more. Takes some ms, and the pages are cleared on their next use.
    """
    _malloc_trim()(0)


@functools.cache
def _malloc_trim() -> Callable[[int], object]:
    try:
        return ctypes.CDLL(None).malloc_trim
    # musl and macOS lack it; Windows has no library of the name None.
    except (AttributeError, OSError, TypeError):
        return lambda padding: None
