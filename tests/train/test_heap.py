"""Memory that is given back."""

import ctypes
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from vla_jax.train import heap
from vla_jax.train.meter import rss_mb

ROOT = Path(__file__).resolve().parents[2]


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


THREADS = """
import ctypes, os, sys, threading
from vla_jax.train import heap

if sys.argv[1] == "limited":
    heap.limit()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
gate = threading.Barrier(33)

def hold():
    libc.malloc(1000)
    gate.wait()

for _ in range(32):
    threading.Thread(target=hold).start()
gate.wait()
libc.fopen.restype = ctypes.c_void_p
libc.malloc_info.argtypes = [ctypes.c_int, ctypes.c_void_p]
file = libc.fopen(sys.argv[2].encode(), b"w")
libc.malloc_info(0, file)
libc.fflush(None)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_threads_share_a_heap_a_core(tmp_path):
    counts = {}
    for kind in ("limited", "as it is"):
        environment = {k: v for k, v in os.environ.items() if k != "MALLOC_ARENA_MAX"}
        command = [sys.executable, "-c", THREADS, kind, str(tmp_path / kind)]
        subprocess.run(command, check=True, env={**environment, "PYTHONPATH": str(ROOT)})
        counts[kind] = (tmp_path / kind).read_text().count("<heap nr=")
    # Threads that a library has started before keep theirs.
    cores = os.cpu_count() or 1
    assert counts["limited"] <= cores + 1
    assert counts["as it is"] > cores + 1


SIZE = 200 << 20  # bytes, far above what glibc serves from a heap by itself
AGAIN = f"""
import ctypes, resource, sys, threading
from vla_jax.train import heap

heap.limit()
kept = sys.argv[1] == "kept" and heap.keep()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]

def use():
    block = libc.malloc({SIZE})
    ctypes.memset(block, 1, {SIZE})
    libc.free(block)

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    worker = threading.Thread(target=use)
    worker.start()
    worker.join()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
print(kept, faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_what_is_kept_is_not_faulted_in_again():
    environment = {k: v for k, v in os.environ.items() if k != "MALLOC_ARENA_MAX"}
    environment |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    collected = {}
    for kind in ("kept", "as it is"):
        command = [sys.executable, "-c", AGAIN, kind]
        done = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE)
        collected[kind] = done.stdout.decode().split()
    assert collected["kept"][0] == "True"
    assert int(collected["kept"][1]) < 100
    assert int(collected["as it is"][1]) > SIZE // (4 << 20)  # even where pages are huge


@pytest.mark.parametrize("platforms", ["cuda,cpu", "tpu"])
def test_other_devices_are_left_alone(monkeypatch, platforms):
    monkeypatch.delenv("MALLOC_ARENA_MAX", raising=False)
    config = types.SimpleNamespace(jax_platforms=platforms)
    monkeypatch.setattr(heap, "jax", types.SimpleNamespace(config=config))
    monkeypatch.setattr(heap, "_glibc", None)
    assert heap.keep() is False


@pytest.mark.parametrize(
    ("name", "value"),
    [("MALLOC_TRIM_THRESHOLD_", "65536"), ("GLIBC_TUNABLES", "glibc.malloc.arena_max=2")],
)
def test_what_a_person_has_set_stays(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(heap, "_on_cpus", lambda: True)
    monkeypatch.setattr(heap, "_glibc", None)
    heap.limit()
    assert heap.keep() is False


def test_without_glibc_nothing_is_done(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    monkeypatch.delenv("MALLOC_ARENA_MAX", raising=False)
    heap._glibc.cache_clear()
    heap.limit()
    heap.trim()
    assert heap.keep() is False
    heap._glibc.cache_clear()
