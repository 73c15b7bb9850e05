"""Memory that is given back."""

import ctypes
import sys

import pytest

from vla_jax.train import heap
from vla_jax.train.meter import rss_mb


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_holes_in_front_of_what_is_in_use_go_back_to_the_system():
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
    size = 64 << 10  # below the size from which glibc takes pages of their own for a block
    blocks = [libc.malloc(size) for _ in range(1600)]
    for block in blocks:
        ctypes.memset(block, 1, size)
    # The last one stays, so the heap does not end with what is free.
    for block in blocks[:-1]:
        libc.free(block)
    before = rss_mb()
    heap.trim()
    assert rss_mb() < before - 80
    libc.free(blocks[-1])


def test_without_glibc_nothing_is_done(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    heap._malloc_trim.cache_clear()
    heap.trim()
    heap._malloc_trim.cache_clear()
