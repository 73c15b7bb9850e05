"""The other Python, which has torch, and what it says of real weights."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("reference.py")
# Of the Python to be used, and of a folder to keep what it made in.
PYTHON, KEPT = "VLA_JAX_REFERENCE_PYTHON", "VLA_JAX_REFERENCE_DIR"


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """(name, modules, prepare) -> the folder that reference.py fills, after `prepare(folder)`."""
    python = os.environ.get(PYTHON, "")

    def make(name: str, modules: str, prepare: Callable[[Path], object] | None = None) -> Path:
        if not python:
            pytest.skip(f"{PYTHON} names no Python with {modules}")
        tried = subprocess.run([python, "-c", f"import {modules}"], capture_output=True, text=True)
        if tried.returncode:
            last = tried.stderr.strip().splitlines()[-1]
            pytest.skip(f"{PYTHON}: {python} cannot import {modules}: {last}")
        retained = os.environ.get(KEPT)
        out = Path(retained, name) if retained else tmp_path_factory.mktemp(name)
        out.mkdir(parents=True, exist_ok=True)
        if prepare:
            prepare(out)
        done = subprocess.run([python, SCRIPT, name, out], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return out

    return make
