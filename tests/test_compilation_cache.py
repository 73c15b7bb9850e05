import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch import doctor
from vla_jax import compilation_cache

CODE = (
    "import sys, jax, jax.numpy as jnp\n"
    "from vla_jax import compilation_cache\n"
    "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)\n"
    "print(compilation_cache.enable(sys.argv[1]))\n"
    "jax.jit(lambda x: jnp.tanh(x @ x.T).sum())(jnp.ones((50, 50))).block_until_ready()\n"
)


def compile_with(setting, home):
    env = {k: v for k, v in os.environ.items() if k != compilation_cache.VARIABLE}
    env |= {"XDG_CACHE_HOME": str(home), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", CODE, setting]
    done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_programs_are_kept_by_default_and_not_when_it_is_off(tmp_path):
    assert compile_with("off", tmp_path) == "None"
    assert not list(tmp_path.rglob("*"))
    where = Path(compile_with("auto", tmp_path))
    assert where.parent == tmp_path / "vla_jax" / "xla"
    assert where.name.startswith("cpu-")
    assert list(where.glob("jit*-cache"))


@pytest.mark.parametrize(
    ("setting", "variable", "expected"),
    [
        ("auto", "", "~/.cache/vla_jax/xla"),
        ("auto", "/given", "/given"),
        ("/here", "/given", "/here"),
        ("off", "/given", None),
    ],
)
def test_the_folder(setting, variable, expected, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv(compilation_cache.VARIABLE, variable)
    folder = compilation_cache.folder(setting)
    assert folder == (Path(expected).expanduser() if expected else None)


def test_a_user_without_a_home_folder_goes_without(monkeypatch):
    def no_home(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv(compilation_cache.VARIABLE, raising=False)
    monkeypatch.setattr(Path, "expanduser", no_home)
    assert compilation_cache.folder() is None
    finding = doctor.compiled_programs()
    assert finding.level == "warn"
    assert "there is no home folder" in finding.text
