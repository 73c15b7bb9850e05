"""A run that cannot be says so in a line, names the key, and leaves no folder behind."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "fixtures" / "bridge_dataset" / "1.0.0"


def test_data_that_are_not_there_or_do_not_fit(tmp_path, one_device):
    (tmp_path / "seven.py").write_text(
        "from vla_jax.data.oxe import get_spec\nseven = get_spec('bridge_dataset')\n"
    )
    for flags, problem in (
        ([f"--config=first_run:seven.py:seven:{tmp_path}"], "data.datasets[0] (seven.py:seven): "),
        (
            [f"--config=first_run:seven.py:seven:{DATA}", "--config.model.action_dim=26"],
            "model.action_dim: 26 is set, the datasets have {'seven': 7}",
        ),
    ):
        command = [sys.executable, str(ROOT / "launch/train.py"), *flags, "--workdir=run"]
        env = {**one_device, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 1, done.stderr
        assert f"train.py: {problem}" in done.stderr
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "run").exists()


def test_names_and_keys_that_there_are_not(tmp_path, one_device):
    for flags, problems in (
        (["--config=quickstrt"], ["--config=quickstrt: no such file, and none is shipped: base, "]),
        (
            ["--config=quickstart", "--config.train.batch_sze=4", "--config.model.head.name=mlp"],
            [
                "train.batch_sze: unknown key (did you mean 'batch_size'?); legal keys of train: [",
                "model.head.name: unknown key; legal keys of model.head: [",
            ],
        ),
        (["--config=oxe:foo:/nope"], ["no mixture 'foo'; "]),
        (["--config=quickstart", "--config.train.keep=a"], ["flag --config.train.keep=a: "]),
    ):
        command = [sys.executable, str(ROOT / "launch/train.py"), *flags, "--workdir=run"]
        env = {**one_device, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 1, done.stderr
        assert all(problem in done.stderr for problem in problems), done.stderr
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "run").exists()
