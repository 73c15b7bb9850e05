"""The memory that C code has freed and keeps for later; all of this is glibc's.

Its heaps hold what XLA's compiler and steps, checkpoints, evaluations and decoders take and free,
in other sizes and by other threads every time. Left alone, a run that holds no more at its end than
at its beginning grows by a tenth for tens of minutes.
"""

import ctypes
import functools
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable

import jax

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # of glibc's malloc.h
# What a person may have set in glibc's own ways, which then stays.
_VARIABLES = ("MALLOC_ARENA_MAX", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_",
              "MALLOC_TRIM_THRESHOLD_")  # fmt: skip


def limit() -> None:
    """Has the threads of this process share one heap a core; to be called before they start.

    glibc makes up to eight, and gives a new thread the one that is used least, with its holes.
    Nothing is changed where a person has set glibc's memory by its variables.
    """
    if not _is_set():
        _glibc("mallopt")(_ARENA_MAX, os.cpu_count() or 1)


def keep() -> bool:
    """On CPUs, keeps what a step frees for the next one; to be called before jax starts.

    A step's temporaries are one block of gigabytes. glibc maps one of that size anew at every step
    and gives it back after it, so that the kernel zeroes every page of it again: a quarter of a
    step's CPU time, measured. All threads share one heap from then on, as the block would not fit
    into another thread's. On other devices nothing of the kind is taken.

    Returns:
        Whether it is so now; False without glibc, where jax may find other devices, and where a
        person has set glibc's memory by its variables.
    """
    if not _on_cpus() or _is_set():
        return False
    settings = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1))
    # 1 of each that is taken; other libraries say nothing.
    return [_glibc("mallopt")(name, value) for name, value in settings] == [1, 1, 1]


def _is_set() -> bool:
    tunables = "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    return tunables or any(name in os.environ for name in _VARIABLES)


def _on_cpus() -> bool:
    """Whether jax will run on CPUs, as far as it can be said before it has started."""
    asked = jax.config.jax_platforms  # pyrefly: ignore[missing-attribute]
    if asked:
        return asked.split(",")[0] == "cpu"
    # What brings other devices is installed beside jax.
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return not plugins and not any(map(importlib.util.find_spec, ("jax_plugins", "libtpu")))


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
