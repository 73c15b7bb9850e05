"""Runs of launch/train.py that are killed or stopped end as if they had not been."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from launch.record_demos import record
from vla_jax.train.checkpoint import load_params

ROOT = Path(__file__).parents[2]
CLOCK = (
    "samples_per_s", "samples_per_s_per_device", "step_s", "data_wait", "tflops_per_device", "mfu",
    "rss_mb", "device_gb", "wall_s",
)  # fmt: skip
FLAGS = {
    "train.steps": 24, "train.batch_size": 8, "train.save_every": 8, "train.log_every": 1,
    "augment.crop_scale": 0.9, "augment.hue": 0.05, "augment.brightness": 0.1,
    "model.dropout": True, "model.backbone.arch.vision_config.num_hidden_layers": 1,
}  # fmt: skip


def rows(workdir: Path) -> list[dict]:
    path = workdir / "log.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def run(data: Path, workdir: Path, kill: int | None = None) -> int:
    """Trains; sends the signal `kill` once 13 rows are logged; returns the exit status."""
    command = [sys.executable, "launch/train.py", f"--config=configs/quickstart.py:{data}"]
    command += [f"--config.{key}={value}" for key, value in FLAGS.items()]
    env = {**os.environ, "XLA_FLAGS": "", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    with (workdir.parent / "output.txt").open("a") as output:
        process = subprocess.Popen(
            [*command, f"--workdir={workdir}"], cwd=ROOT, env=env, stdout=output, stderr=output
        )
        while process.poll() is None:
            if kill and len(rows(workdir)) >= 13:
                process.send_signal(kill)
                kill = None
            time.sleep(0.05)
    return process.returncode


@pytest.mark.slow
def test_killed_and_stopped_runs_end_with_the_same_bits(tmp_path):
    data = tmp_path / "tabletop" / "1.0.0"
    record(data, episodes=26, size=64, noise=0.0, workers=1)
    whole, killed, stopped = (tmp_path / name for name in ("whole", "killed", "stopped"))
    assert run(data, whole) == 0
    assert run(data, killed, signal.SIGKILL) == -signal.SIGKILL
    assert not (killed / "eval.json").exists()
    assert run(data, killed) == 0
    assert run(data, stopped, signal.SIGTERM) == 0
    assert not (stopped / "eval.json").exists()
    assert run(data, stopped) == 0

    def timeless(workdir: Path) -> list[dict]:
        return [{k: v for k, v in row.items() if k not in CLOCK} for row in rows(workdir)]

    expected = jax.tree.leaves(load_params(whole))
    for workdir in (killed, stopped):
        assert timeless(workdir) == timeless(whole)
        for a, b in zip(jax.tree.leaves(load_params(workdir)), expected, strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
        assert (workdir / "eval.json").read_bytes() == (whole / "eval.json").read_bytes()
