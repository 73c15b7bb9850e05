"""`launch/fit_fast.py` on the four trajectories that the tests have."""

import subprocess
import sys
from pathlib import Path

from vla_jax.data.units.fast import FastTokenizer

ROOT = Path(__file__).parents[1]
SET = (
    f"--config={ROOT / 'configs/bridge_smoke.py'}:{ROOT / 'tests/fixtures/bridge_dataset/1.0.0'}",
)


def fit(tmp_path, *args):
    command = [sys.executable, str(ROOT / "launch/fit_fast.py"), *SET, *args]
    command += [f"--config.data.cache_dir={tmp_path / 'index'}", "--chunks=300"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_fits_a_tokenizer_and_tries_it(tmp_path):
    out = tmp_path / "fast"
    done = fit(tmp_path, f"--out={out}", "--vocab=300")
    assert done.returncode == 0, done.stderr
    assert "lost: 0.00% of 300 chunks" in done.stdout
    tokenizer = FastTokenizer.from_dir(out)
    assert tokenizer.size <= 300
    assert (tokenizer.horizon, tokenizer.dim) == (4, 7)
    again = fit(tmp_path, f"--tokenizer={out}")
    assert again.returncode == 0, again.stderr
    # Other chunks would be lost here and there; the draw is that of the same seed.
    assert again.stdout.splitlines()[1:4] == done.stdout.splitlines()[1:4]
    wrong = fit(tmp_path, f"--out={out}")
    assert wrong.returncode != 0
    assert "exists" in wrong.stderr
