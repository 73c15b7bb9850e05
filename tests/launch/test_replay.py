"""launch/replay.py: a real checkpoint over real data, its sums, and what it says of mistakes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from launch import replay

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "tests" / "fixtures"


def run(folder, environment, *flags):
    env = {**environment, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "launch" / "replay.py"), *flags]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def test_a_checkpoint_over_the_data_it_was_trained_on(tmp_path, one_device):
    shutil.copytree(FIXTURES / "checkpoint_format_1", tmp_path / "run")
    data = tmp_path / "data"
    shutil.copytree(FIXTURES / "bridge_dataset" / "1.0.0", data)
    done = run(
        tmp_path, one_device, "--checkpoint=run", f"--data={data}", "--episodes=2", "--out=out"
    )
    assert done.returncode == 0, done.stderr
    assert "no better than the mean action" in done.stdout  # four steps of training
    parsed = json.loads((tmp_path / "out" / "replay.json").read_text())
    assert parsed["episodes"] == 2
    assert len(parsed["policy"]) == len(parsed["mean_action"]) == 7
    assert (tmp_path / "out" / "replay.png").stat().st_size > 10_000
    wrong = run(tmp_path, one_device, "--checkpoint=run", f"--data={tmp_path / 'none'}")
    assert wrong.returncode == 1
    assert wrong.stderr.splitlines()[-1].startswith("replay.py: ")
    assert "Traceback" not in wrong.stderr


def episode(recorded, predicted):
    return replay.Episode(0, "lift", np.asarray(recorded, float), np.asarray(predicted, float))


def test_errors_are_means_over_all_steps_beside_the_mean_action():
    result = replay.errors(
        [episode([[0, 1], [2, 1]], [[1, 1], [2, 1]]), episode([[4, 1]], [[4, 0]])]
    )
    assert result["policy"] == pytest.approx([1 / 3, 1 / 3])
    assert result["mean_action"] == pytest.approx([4 / 3, 0])
    text = replay.report(result)
    assert "0.25" in text
    assert "constant" in text
    assert "it knows these data" in text
