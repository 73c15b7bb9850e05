import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from launch import inspect_data
from tests.data.conftest import write_calvin
from vla_jax.config import ConfigError, load_config_file
from vla_jax.data import errors
from vla_jax.data.find_spec import find_spec, short_name
from vla_jax.data.inspection import action_dim, check_images, inspect
from vla_jax.data.oxe import get_spec
from vla_jax.data.spec import DatasetSpec, Trajectory

ROOT = Path(__file__).resolve().parents[2]


def spec(change=lambda action: action, **changes):
    """A spec over `write_calvin`'s data that spoils the actions."""

    def standardize(episode):
        action = episode["action"].astype(np.float32).copy()
        action[:, 6] = (action[:, 6] + 1) / 2
        return Trajectory(change(action), episode["text"], episode["state"])

    results: dict[str, Any] = {
        "images": {"primary": "observation/rgb_static", "wrist": "observation/rgb_gripper"},
        "features": {
            "action": "rel_actions",
            "state": "observation/robot_obs",
            "text": "language_instruction",
        },
        "standardize": standardize,
        "gripper_env": (-1.0, 1.0),
    }
    return DatasetSpec(**{**results, **changes})


@pytest.fixture
def folder(tmp_path):
    return write_calvin(tmp_path / "calvin" / "1.0.0", [9, 12, 15, 8, 11], seed=3)


@pytest.fixture
def warnings(folder, tmp_path):
    def run(*args, data=folder, **changes):
        return inspect("robot", spec(*args, **changes), data, "train", str(tmp_path / "c")).warnings

    return run


def with_gripper(values):
    def change(action):
        action[:, 6] = values(action[:, 6], np.arange(len(action)))
        return action

    return change


def test_sound_data_warn_of_nothing(folder, tmp_path):
    sound = with_gripper(lambda gripper, t: np.where(t == 0, 1, gripper))
    report = inspect("robot", spec(sound, hz=5.0), folder, "train", str(tmp_path / "c"))
    assert report.warnings == []
    assert report.summary[0].startswith("5 trajectories, 55 frames (5 Hz); length 8 to 15")
    assert "camera wrist: 8 x 12" in report.summary
    shares = np.array(report.gripper)
    assert shares[[0, 9]].sum() == pytest.approx(1)
    assert shares[9] == pytest.approx(report.statistics["action"]["mean"][6], abs=1e-6)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (lambda g, t: np.where(t % 3 == 0, 0.5, g), "not binary: 3[0-9].[0-9]% of its values"),
        (lambda g, t: np.where(t == 0, 0, g), "only 0% of the trajectories begin .* polarity"),
        (lambda g, t: np.where(t == 0, 1, 2 * g - 1), "goes from -1 to 1; 0 is closed"),
    ],
)
def test_gripper(warnings, values, message):
    result = warnings(with_gripper(values))
    assert any(re.search(message, warning) for warning in result), result


def test_constant_dimensions_and_outliers(tmp_path, warnings):
    data = write_calvin(tmp_path / "long" / "1.0.0", [300])

    def change(action):
        action[:, 2] = 0.25
        action[:, 3] = 0
        action[0, 3:5] = 1e3
        return action

    result = warnings(change, data=data)
    assert "action dimensions [0, 2] are constant" in result  # 0 names the episode
    assert "action dimensions [3] are constant in 98 % of the frames" in result
    assert any(warning.startswith("action dimensions [4] have outliers") for warning in result)


def test_texts_cameras_and_broken_parts(tmp_path, warnings):
    texts = ["open", "", "open ", "open\nit", "  "]
    data = write_calvin(tmp_path / "t" / "1.0.0", [5, 6, 7, 8, 9], texts=texts)
    images = {"primary": "observation/rgb_static", "secondary": "observation/none"}

    def change(action):
        if len(action) == 8:
            action[2, 2] = np.nan
        return action

    result = warnings(change, data=data, images=images)
    assert any(
        w.startswith("parts are skipped: 1 ActionError: ") and "frame 2" in w for w in result
    )
    assert "no camera 'secondary': there is no 'observation/none'" in result
    assert any("1 instructions have blanks at an end" in w for w in result)


def test_when_nothing_is_left_every_cause_is_named(warnings):
    def change(action):
        action[2, 2] = np.nan
        return action

    problem = (
        r"no trajectory is left: 5 ActionError: .*episode 0, frame 2: robot: the action is not"
    )
    with pytest.raises(errors.DataError, match=problem):
        warnings(change)


def test_idle_robots(tmp_path, warnings):
    data = write_calvin(tmp_path / "i" / "1.0.0", [10, 10], idle=((0, 2, 8),))
    assert any("the robot idles in 30% of the frames" in w for w in warnings(data=data))


def test_images(folder, tmp_path):
    report = inspect("robot", spec(), folder, "train", str(tmp_path / "c"))
    images, more = check_images(report.dataset, rows=3, columns=4)
    assert more == []
    assert images["primary"].shape == (3, 4, 24, 24, 3)
    assert images["primary"][:, :, 0, 0, :2].tolist() == [
        [[0, t] for t in (0, 3, 5, 8)], [[2, t] for t in (0, 5, 9, 14)],
        [[4, t] for t in (0, 3, 7, 10)],
    ]  # fmt: skip


def test_action_dim(folder, tmp_path):
    def longer(action):
        if len(action) == 9:
            raise ValueError("the first is broken")
        return np.concatenate([action, action], 1)

    assert action_dim(spec(), folder, "train", str(tmp_path)) == 7
    assert action_dim(spec(longer), folder, "train", str(tmp_path)) == 14
    assert action_dim(spec(action="eef_pos"), folder, "train", str(tmp_path)) == 7
    with pytest.raises(errors.FeatureError, match=r"no feature \['nothing'\]"):
        action_dim(spec(features={"action": "nothing"}), folder, "train", str(tmp_path))


def test_the_command_writes_two_pictures(folder, tmp_path):
    pytest.importorskip("matplotlib")
    command = [sys.executable, ROOT / "launch" / "inspect_data.py", folder, "--out", tmp_path / "o"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"calvin in {folder}\n5 trajectories, 55 frames")
    assert "gripper, from 0 = closed to 1 = open in tenths" in done.stdout
    for name in ("cameras.png", "actions.png"):
        picture = np.asarray(Image.open(tmp_path / "o" / name).convert("RGB"))
        assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 20
    command = [*command[:2], tmp_path / "none"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "a dataset of the registry takes --root" in done.stderr


def test_locate(folder, tmp_path):
    assert inspect_data.locate(str(folder), "", "") == (folder, "calvin")
    assert inspect_data.locate(str(folder), "", "bridge_orig") == (folder, "bridge_orig")
    assert inspect_data.locate("calvin", str(tmp_path), "") == (folder, "calvin")
    with pytest.raises(errors.DataError, match=r"bridge_dataset/VERSION does not exist"):
        inspect_data.locate("bridge_dataset", str(tmp_path), "")


def test_specs_of_ones_own(tmp_path):
    path = tmp_path / "my_robot.py"
    path.write_text("from vla_jax.data.oxe import get_spec\nmine = get_spec('calvin')\nother = 3\n")
    assert find_spec(f"{path}:mine") == get_spec("calvin")
    assert find_spec("calvin") == get_spec("calvin")
    assert short_name(f"{path}:mine") == "mine"
    assert short_name("calvin") == "calvin"
    with pytest.raises(KeyError, match=r"no DatasetSpec 'other' in .*it has \['mine'\]"):
        find_spec(f"{path}:other")
    with pytest.raises(KeyError, match="is no Python file"):
        find_spec(f"{tmp_path}/none.py:mine")
    with pytest.raises(KeyError, match="did you mean 'calvin'"):
        find_spec("calvn")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("x = (\n", "line 1: SyntaxError"),
        ("y = 1\nx = 1 / 0\n", "line 2: ZeroDivisionError: division by zero"),
        ("import no_such_module\n", "line 1: ModuleNotFoundError: No module named"),
    ],
)
def test_a_spec_file_that_fails_names_its_line(tmp_path, text, told):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(KeyError, match=rf"mine\.py, {told}"):
        find_spec(f"{tmp_path}/mine.py:x")
    with pytest.raises(ConfigError, match=rf"mine\.py, {told}"):
        load_config_file(f"{tmp_path}/mine.py")
