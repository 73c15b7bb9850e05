"""A run that cannot be says so in a line, names the key, and leaves no folder behind."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch import programs
from vla_jax.config import ConfigError, load_config
from vla_jax.train.checkpoint import CheckpointError
from vla_jax.train.opening import open_run

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "fixtures" / "bridge_dataset" / "1.0.0"


def refused(folder, environment, cases):
    """Each case with how its run ended."""
    flags = [["--workdir=run", *each[0]] for each in cases]
    for done, case in zip(
        programs.runs("train.py", folder, environment, *flags), cases, strict=True
    ):
        assert done.returncode == 1, done.stderr
        assert "Traceback" not in done.stderr
        assert not (folder / "run").exists()
        yield done, case


def test_data_that_are_not_there_or_do_not_fit(tmp_path, one_device):
    (tmp_path / "seven.py").write_text(
        "from vla_jax.data.oxe import get_spec\nseven = get_spec('bridge_dataset')\n"
    )
    cases = (
        ([f"--config=first_run:seven.py:seven:{tmp_path}"], "data.datasets[0] (seven.py:seven): "),
        (
            [f"--config=first_run:seven.py:seven:{DATA}", "--config.model.action_dim=26"],
            "model.action_dim: 26 is set, the datasets have {'seven': 7}",
        ),
    )
    for done, (_, problem) in refused(tmp_path, one_device, cases):
        assert f"train.py: {problem}" in done.stderr


def test_names_and_keys_that_there_are_not(tmp_path, one_device):
    cases = (
        (["--config=quickstrt"], ["--config=quickstrt: no such file, and none is shipped: base, "]),
        (
            [
                "--config=quickstart",
                "--config.train.batch_sze=4",
                "--config.model.head.name=mlp",
                "--config.optim.lr=1e-4",
            ],
            [
                "train.batch_sze: unknown key (did you mean 'batch_size'?); legal keys of train: [",
                "optim.lr: unknown key (did you mean 'learning_rate'?); legal keys of optim: [",
                "model.head.name: unknown key; legal keys of model.head: [",
            ],
        ),
        (["--config=oxe:foo:/nope"], ["no mixture 'foo'; "]),
        (
            ["quickstart"],
            ["quickstart: only flags are read here; did you mean --config=quickstart?"],
        ),
        (["--config=quickstart", "--workdir="], ["--workdir: name the folder of the run"]),
        (["--config=quickstart", "--config.train.keep=a"], ["flag --config.train.keep=a: "]),
    )
    for done, (_, problems) in refused(tmp_path, one_device, cases):
        assert all(problem in done.stderr for problem in problems), done.stderr


def test_what_checks_apart_from_one_another_refuse_is_told_together(tmp_path, one_device):
    (tmp_path / "file").touch()
    cases = (
        (
            ["--config=quickstart", "--config.train.batch_size=0", "--workdir=file"],
            ["2 problems:", "problem(s) in the config:\n    train.batch_size", "\n  --workdir"],
        ),
        (
            ["--config=first_run:bridge_dataset:nowhere", "--config.mesh.fsdp=3", "--init=none"],
            ["3 problems:", "\n  mesh: ", "\n  --init: ", "\n  data.datasets[0]"],
        ),
    )
    for done, (_, problems) in refused(tmp_path, one_device, cases):
        assert all(problem in done.stderr for problem in problems), done.stderr


SPECS = """
import numpy as np
from vla_jax.data.oxe import get_spec
from vla_jax.data.spec import DatasetSpec, Trajectory

def made(change=lambda action: action, images=None):
    original = get_spec("bridge_dataset")
    def standardize(episode):
        done = original.standardize(episode)
        return Trajectory(change(np.array(done.action)), done.language, done.proprio)
    return DatasetSpec(images or original.images, original.features, standardize, (-1.0, 1.0))

def with_nan(action):
    action[1, 2] = np.nan
    return action

nan = made(with_nan)
short = made(lambda action: action[:-1])
state = made(images={"primary": "observation/state"})
columns = made(lambda action: action[:, :0])
"""
SIDED = """
import dataclasses
from vla_jax.data.oxe import get_spec
sided = dataclasses.replace(get_spec("bridge_dataset"), gripper_env=(0.04, None))
"""
# As `main` does it, for many specs in one process.
RUNS = """
import sys
from pathlib import Path
from configs import first_run
from launch import train
from vla_jax.train.peers import Peers

for name in sys.argv[2:]:
    try:
        config = first_run.get_config(f"{name}:{sys.argv[1]}")
        train.train(config, Path("run"), None, Peers())
    except train.USER_ERRORS as error:
        print(f"{name}: {error}; the folder: {Path('run').exists()}")
"""


def test_what_is_wrong_with_a_spec_leaves_no_folder_behind(tmp_path, one_device):
    # An index is made beside the data before anything is found wrong with them.
    data = shutil.copytree(DATA, tmp_path / "bridge_dataset" / "1.0.0")
    (tmp_path / "mine.py").write_text(SPECS)
    (tmp_path / "other.py").write_text(SIDED)
    problems = {
        "mine.py:nan": "frame 1: nan: the action is not finite",
        "mine.py:short": "rows, the episode",
        "mine.py:state": "camera 'primary' (steps/observation/state) is stored as numbers",
        "mine.py:columns": "(mine.py:columns): ",
        "other.py:sided": "gripper_env=(0.04, None): two different commands",
    }
    command = [sys.executable, "-c", RUNS, str(data), *problems]
    env = {**one_device, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(problems), lines
    for line, (name, problem) in zip(lines, problems.items(), strict=True):
        assert line.startswith(f"{name}: ")
        assert problem in line
        assert line.endswith("the folder: False")


def test_a_start_that_is_not_there_names_its_flag(tmp_path):
    with pytest.raises(CheckpointError, match=f"^--init: {tmp_path}/nope: no such folder"):
        open_run(load_config("first_run:calvin:none"), f"{tmp_path}/nope", {}, 0)
    config = load_config("first_run:calvin:none", ["model.backbone.hf_dir=nope"])
    with pytest.raises(ConfigError, match=r"^model.backbone.hf_dir: nope: no such folder"):
        open_run(config, None, {}, 0)
