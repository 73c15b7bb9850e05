"""Test environment: eight virtual CPU devices and a compilation cache that outlives the run.

Both must be set before jax is imported, which is why they stand at module level here.
"""

import gc
import importlib.metadata
import os
import signal
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Eight devices on few cores wait for one another longer than the 40 s after which XLA aborts.
# Two thirds of the suite's time is compiling small models: the older emitters, in one
# piece, take two thirds of what the default takes for it.
_FLAGS = {
    "--xla_force_host_platform_device_count": 8,
    "--xla_cpu_collective_call_terminate_timeout_seconds": 600,
    "--xla_cpu_use_fusion_emitters": "false",
    "--xla_cpu_parallel_codegen_split_count": 1,
}
# An unknown flag ends the process: jaxlib 0.12 has the newer emitters alone.
if int(importlib.metadata.version("jaxlib").split(".")[1]) >= 12:
    del _FLAGS["--xla_cpu_use_fusion_emitters"]
for _flag, _value in _FLAGS.items():
    if _flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flag}={_value}".strip()
# Without most of the optimisations results differ by rounding at most.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Of each operation the compiler would be told the Python lines it comes from: 3 % of the suite.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
_CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vla_jax" / "xla-tests"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
# Tiny programs compile in less than the default second and would never be kept.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# Tracing makes millions of small objects, hardly any of them garbage.
gc.set_threshold(50_000, 20, 20)
# A shell starts background jobs with Ctrl-C ignored, and their children inherit that; the runs of
# these tests are to hear it. pytest-xdist's workers inherit it from here.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
    # pytest has a --fixtures of its own (list fixtures; also --funcargs): ours replaces it.
    parser.optparser.conflict_handler = "resolve"
    group = parser.getgroup("vla_jax")
    group.addoption("--fixtures", metavar="DIR", help="folder of golden outputs for tests/parity")
    parser.optparser.conflict_handler = "error"


@pytest.fixture(autouse=True, scope="module")
def _frozen():
    """What jax keeps of traced programs grows to gigabytes, which collections need not walk."""
    yield
    gc.freeze()


@pytest.fixture(scope="session")
def one_device():
    """The environment of a child process with a single device, as most machines have."""
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=1"  # the last counts
    return {**os.environ, "XLA_FLAGS": flags}
