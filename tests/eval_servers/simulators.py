"""Commands in a simulator's own Python, for the tests marked `sim`."""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_in(python, *command, timeout=3600):
    """What the command prints; fails with its last words."""
    done = subprocess.run(
        [python, *map(str, command)],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
