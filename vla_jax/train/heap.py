"""The memory that C code has freed and keeps for later; all of this is glibc's.

Its heaps hold what XLA's compiler and steps, checkpoints, evaluations and decoders take and free,
in other sizes and by other threads every time. Left alone, a run that holds no more at its end than
at its beginning grows by a tenth for tens of minutes.
"""

import ctypes
import functools
import os
from collections.abc import Callable

_ARENA_MAX = -8  # M_ARENA_MAX of glibc's malloc.h


def limit() -> None:
    """Has the threads of this process share one heap a core; to be called before they start.

    glibc makes up to eight, and gives a new thread the one that is used least, with its holes. It
    keeps what MALLOC_ARENA_MAX says where a person has set it.
    """
    if "MALLOC_ARENA_MAX" not in os.environ:
        _glibc("mallopt")(_ARENA_MAX, os.cpu_count() or 1)


def trim() -> None:
    """Gives pages that nothing uses back to the system; does nothing without glibc.

    glibc returns only the end of a heap by itself, and the compiler alone leaves hundreds of MB of
    holes in front of it. Takes some ms, and the pages are cleared on their next use.
    """
    _glibc("malloc_trim")(0)


@functools.cache
def _glibc(name: str) -> Callable[..., object]:
    try:
        return getattr(ctypes.CDLL(None), name)
    # musl and macOS lack it; Windows has no library of the name None.
    except (AttributeError, OSError, TypeError):
        return lambda *numbers: None
