"""What the simulators' setup.sh share, without downloading anything."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "eval_servers"
SCRIPTS = [FOLDER / name / "setup.sh" for name in ("calvin", "libero", "simpler")]
GIT = ("git", "-c", "user.email=a@b.c", "-c", "user.name=a")


def shell(line, cwd, **environment):
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f'source "{FOLDER}/setup_common.sh"; {line}'],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def source(tmp_path):
    """A repository of one commit, and its name."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "here.py").touch()
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "one"]):
        subprocess.run([*GIT, *command], cwd=folder, check=True)
    commit = subprocess.run([*GIT, "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True)
    return folder, commit.stdout.strip()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.parent.name)
def test_the_scripts_say_how_they_are_used(script):
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    done = subprocess.run(["bash", script], capture_output=True, text=True)
    assert done.returncode == 2
    assert f"{script.parent.name}/setup.sh VENV" in done.stderr
    assert "PYTHON chooses" in done.stderr


def test_another_python_is_refused(tmp_path):
    minor = sys.version_info[1]
    assert shell(f'check_python "{sys.executable}" 8 {minor} "x"', tmp_path).returncode == 0
    for low, high in ((8, minor - 1), (minor + 1, 99)):
        done = shell(f'check_python "{sys.executable}" {low} {high} "x: wheels"', tmp_path)
        assert done.returncode == 1
        assert f"x: wheels for Python 3.{low} to 3.{high}, this is 3.{minor}" in done.stderr


def test_a_tree_is_cloned_once(source, tmp_path):
    folder, commit = source
    line = f'get_tree Simulator "{folder}" {commit} tree here.py'
    assert shell(line, tmp_path).returncode == 0
    (tmp_path / "tree" / "mine").touch()
    assert shell(line, tmp_path).returncode == 0
    assert (tmp_path / "tree" / "mine").exists()


def test_a_clone_that_fails_or_is_something_else_is_not_taken_for_it(source, tmp_path):
    folder, commit = source
    line = 'get_tree Simulator "{}" {} tree {}'.format
    assert shell(line(folder, "0" * 40, "here.py"), tmp_path).returncode != 0
    assert not (tmp_path / "tree").exists()
    assert shell(line(folder, commit, "here.py"), tmp_path).returncode == 0
    done = shell(line(folder, commit, "there.py"), tmp_path)
    assert done.returncode == 1
    assert done.stderr == "tree is no Simulator source tree\n"
