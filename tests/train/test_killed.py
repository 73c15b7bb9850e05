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


def run(
    data: Path,
    workdir: Path,
    kill: int | None = None,
    at: int = 13,
    delay: float = 0.0,
    **changes: int,
) -> int:
    """Trains; sends the signal `kill` `delay` seconds after `at` rows; returns the exit status."""
    flags = {**FLAGS, **{key.replace("__", "."): value for key, value in changes.items()}}
    command = [sys.executable, "launch/train.py", f"--config=configs/quickstart.py:{data}"]
    command += [f"--config.{key}={value}" for key, value in flags.items()]
    env = {**os.environ, "XLA_FLAGS": "", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    with (workdir.parent / "output.txt").open("a") as output:
        process = subprocess.Popen(
            [*command, f"--workdir={workdir}"], cwd=ROOT, env=env, stdout=output, stderr=output
        )
        while process.poll() is None:
            if kill and len(rows(workdir)) >= at:
                time.sleep(delay)
                process.send_signal(kill)
                kill = None
            time.sleep(0.05)
    return process.returncode


def timeless(workdir: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in rows(workdir)]


@pytest.mark.slow
def test_killed_and_stopped_runs_end_with_the_same_bits(tmp_path):
    data = tmp_path / "tabletop" / "1.0.0"
    record(data, episodes=26, size=64, noise=0.0, workers=1)
    full, killed, stopped = (tmp_path / name for name in ("whole", "killed", "stopped"))
    assert run(data, full) == 0
    assert run(data, killed, signal.SIGKILL) == -signal.SIGKILL
    assert not (killed / "eval.json").exists()
    assert run(data, killed) == 0
    assert run(data, stopped, signal.SIGTERM) == 0
    assert not (stopped / "eval.json").exists()
    assert run(data, stopped) == 0

    expected = jax.tree.leaves(load_params(full))
    for workdir in (killed, stopped):
        assert timeless(workdir) == timeless(full)
        for a, b in zip(jax.tree.leaves(load_params(workdir)), expected, strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
        assert (workdir / "eval.json").read_bytes() == (full / "eval.json").read_bytes()


@pytest.mark.slow
def test_twenty_kills_at_random_moments_lose_and_repeat_nothing(tmp_path):
    data = tmp_path / "tabletop" / "1.0.0"
    record(data, episodes=26, size=64, noise=0.0, workers=1)
    # Every other step is saved, so that a good part of the kills falls into a save.
    often = {"train__steps": 60, "train__save_every": 2}
    full, killed, rng = tmp_path / "whole", tmp_path / "killed", np.random.default_rng(0)
    assert run(data, full, **often) == 0
    for _ in range(20):
        # A run logs again from its last checkpoint on, and must come further than the one before.
        at = len(rows(killed)) + int(rng.integers(1, 4))
        delay = rng.uniform(0.0, 0.5)
        status = run(data, killed, signal.SIGKILL, min(at, 59), delay, **often)
        assert status == -signal.SIGKILL
    assert run(data, killed, **often) == 0
    # Every step once, on the same samples: its loss and gradients are equal to the last digit.
    assert timeless(killed) == timeless(full)
    assert {row["step"] for row in rows(killed)} == set(range(1, 61))
    pairs = zip(*(jax.tree.leaves(load_params(each)) for each in (killed, full)), strict=True)
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs)
