import os
import subprocess
import sys

import pytest

from vla_jax.train import lock


def test_a_second_run_is_told_who_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_PATIENCE", 0.3)
    workdir = tmp_path / "runs" / "one"
    with lock.held(workdir):
        code = (
            "import sys; from pathlib import Path; from vla_jax.train import lock\n"
            "lock._PATIENCE = 0.1\n"
            "try:\n    lock.held(Path(sys.argv[1])).__enter__()\n"
            "except lock.WorkdirError as error: print(error)"
        )
        command = [sys.executable, "-c", code, str(workdir)]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert f"another run is writing there (process {os.getpid()} on " in printed
        with lock.held(workdir, active=False):  # another process of the same run
            pass
    with lock.held(workdir):  # it was let go
        pass


@pytest.mark.parametrize("what", ["a file in the way", "nothing may be written"])
def test_a_folder_that_cannot_be_used_is_a_sentence(tmp_path, what, monkeypatch):
    workdir = tmp_path / "file" / "run"
    (tmp_path / "file").write_text("")
    if what == "nothing may be written":
        workdir = tmp_path / "run"
        monkeypatch.setattr(lock, "_sign", lambda file: (_ for _ in ()).throw(OSError(30, "RO")))
    with (
        pytest.raises(lock.WorkdirError, match=r"--workdir=.*run: cannot be written: "),
        lock.held(workdir),
    ):
        pass


@pytest.mark.parametrize("name", ["file/run", "file", "x" * 300, "new/run"])
def test_a_folder_that_could_not_be_made_is_refused_and_none_is_made(tmp_path, name):
    (tmp_path / "file").write_text("")
    if name == "new/run":
        lock.check(tmp_path / name)
    else:
        with pytest.raises(lock.WorkdirError, match=r"--workdir=.*: cannot be written: "):
            lock.check(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
