"""What a person, a disk or a machine causes is one line; with --debug it is a traceback."""

import contextlib
import errno
import importlib
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
from absl import flags

from vla_jax import cli, refusal
from vla_jax.config import ConfigError
from vla_jax.data.language.tokenizer import Tokenizer
from vla_jax.train import runtime

ROOT = Path(__file__).resolve().parents[1]
# Launcher -> flags that cannot be fulfilled, and a part of what is said; {tmp} is an empty folder.
REFUSED = {
    "serve": (["--checkpoint={tmp}/none"], "{tmp}/none"),
    "evaluate": (
        ["tabletop", "--server=ws://127.0.0.1:1", "--out={tmp}/out", "--python={tmp}/python"],
        "{tmp}/python: no such program",
    ),
    "convert": (["import-hf", "{tmp}/none", "{tmp}/out"], "{tmp}/none"),
    "convert_data": (["lerobot", "{tmp}/none", "{tmp}/out"], "{tmp}/none"),
    "inspect_data": (["{tmp}/none"], "{tmp}/none"),
    "replay": (["--checkpoint={tmp}/none"], "{tmp}/none"),
    "record_demos": (["--out={tmp}/file/1.0.0", "--episodes=1", "--workers=1"], "{tmp}/file"),
}


@pytest.fixture
def launch(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("in the way of a folder")

    def call(name, *more):
        flags, message = REFUSED[name]
        flags = [flag.format(tmp=tmp_path) for flag in flags]
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *flags, *more])
        status = importlib.import_module(f"launch.{name}").main()
        return status, message.format(tmp=tmp_path)

    return call


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_mistake_is_one_line(launch, capsys, name):
    try:
        status, _ = launch(name)
    except SystemExit as error:
        status = error.code
    expected = REFUSED[name][1].rpartition("{tmp}")[2]
    lines = capsys.readouterr().err.strip().splitlines()
    assert status == 1
    assert lines[-1].startswith(f"{name}.py: ")
    assert expected in lines[-1]


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_debug_lets_it_pass(launch, name):
    with pytest.raises(refusal.CAUSED):
        launch(name, "--debug")


@pytest.mark.parametrize(("flags", "is_shown"), [([], False), (["--debug"], True)])
def test_a_device_that_is_not_there(tmp_path, flags, is_shown):
    command = [sys.executable, "launch/train.py", "--config=quickstart", f"--workdir={tmp_path}/a"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cuda"}
    done = subprocess.run(
        [*command, *flags], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert ("Traceback" in done.stderr) == is_shown
    assert "JAX_PLATFORMS=cuda asks for them; unset it, or install" in done.stderr
    if not is_shown:
        assert done.stderr.strip().splitlines()[-1].startswith("train.py: ")


@pytest.mark.parametrize("name", ["SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"])
def test_a_number_of_processes_that_is_none(name):
    with pytest.raises(ConfigError, match=f"{name}=many is not a number"):
        runtime.multi_process({name: "many", "SLURM_PROCID": "0"})


def test_words_of_an_error(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        (tmp_path / "none").read_text()
    assert refusal.describe(caught.value) == f"{tmp_path}/none: No such file or directory"
    assert refusal.describe(ConfigError("data.clip: 2 is wrong")) == "data.clip: 2 is wrong"
    with pytest.raises(ValueError, match="vocab_size") as caught:
        Tokenizer.build(["a"], 0)
    assert refusal.describe(caught.value) == str(caught.value)
    # Those of other code do not always say what they are about.
    with pytest.raises(ValueError, match="reshape") as caught:
        np.zeros(2).reshape(3)
    assert refusal.describe(caught.value).endswith("(ValueError; --debug shows where)")
    assert refusal.describe(MemoryError()) == "MemoryError; --debug shows where"


def start_in_foreground(command, stdout=subprocess.DEVNULL):
    """Starts a Python program as a terminal does, which sends Ctrl-C to it and its workers."""
    # Where this runs in the background, SIGINT is ignored, and would be there too.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
            stderr=subprocess.PIPE,
            stdout=stdout,
            text=True,
            start_new_session=True,
        )
    finally:
        signal.signal(signal.SIGINT, before)


def _lines_of_interrupted(command, started):
    """What a program prints that gets Ctrl-C, as a terminal sends it, once `started()` is true."""
    process = start_in_foreground(command)
    try:
        end = time.monotonic() + 60
        while not started() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        # One that has ended by itself is gone.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        text = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == -signal.SIGINT, text
    return text.strip().splitlines()


def test_ctrl_c_is_one_line_and_leaves_nothing(tmp_path):
    command = ["launch/record_demos.py", f"--out={tmp_path}/1.0.0", "--size=8", "--workers=2"]
    shard = lambda: any(p.stat().st_size for p in tmp_path.glob(".1.0.0.*/*"))  # noqa: E731
    lines = _lines_of_interrupted(command, shard)
    assert lines[-1] == "record_demos.py: interrupted"
    assert not [line for line in lines if "Traceback" in line or "Error" in line]
    assert not list(tmp_path.iterdir())


def test_ctrl_c_with_debug_shows_where(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    refusal.quiet_interrupt()
    for argv, is_shown in ((["convert.py"], False), (["convert.py", "--debug"], True)):
        monkeypatch.setattr(sys, "argv", argv)
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            sys.excepthook(KeyboardInterrupt, error, error.__traceback__)
        message = capsys.readouterr().err
        assert ("Traceback" in message) == is_shown
        assert is_shown or message == "convert.py: interrupted\n"


def test_ctrl_c_within_a_garbage_collection_is_not_lost(tmp_path):
    # jax has such a callback.
    program = tmp_path / "program.py"
    program.write_text(
        "import gc, os, signal, sys, time\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from vla_jax import refusal\n"
        "refusal.quiet_interrupt()\n"
        "sent = []\n"
        "def callback(*_):\n"
        "    if not sent:\n"
        "        sent.append(os.kill(os.getpid(), signal.SIGINT))\n"
        "        time.sleep(0)\n"
        "gc.callbacks.append(callback)\n"
        "gc.collect()\n"
        "time.sleep(30)\n"
    )
    lines = _lines_of_interrupted([str(program)], lambda: False)
    assert lines == ["program.py: interrupted"]


def test_a_config_file_that_fails_is_one_line(tmp_path, monkeypatch):
    path = tmp_path / "mine.py"
    path.write_text("def get_config():\n    return 1 / 0\n")
    monkeypatch.setattr(sys, "argv", ["train.py", f"--config={path}"])
    # absl runs the file while it reads the flags of a launcher.
    run = lambda _: runpy.run_path(str(path))["get_config"]()  # noqa: E731
    monkeypatch.setattr("absl.flags.FLAGS", run)
    with pytest.raises(SystemExit) as ended:
        cli._parse_flags(sys.argv)
    text = f"train.py: {path}, line 2: ZeroDivisionError: division by zero; --debug shows more"
    assert ended.value.code == text
    with pytest.raises(ZeroDivisionError):
        cli._parse_flags([*sys.argv, "--debug"])


def test_a_config_file_that_absl_words_anew_is_one_line(tmp_path, monkeypatch):
    """Absl puts its own words and a stack around an error of the file's while it sets a flag."""
    path = tmp_path / "mine.py"
    path.write_text("def get_config():\n    raise ValueError('no')\n")
    monkeypatch.setattr(sys, "argv", ["train.py", f"--config={path}"])

    def run(_):
        try:
            runpy.run_path(str(path))["get_config"]()
        except ValueError as error:
            raise flags.IllegalFlagValueError(f"flag: {traceback.format_exc()}") from error

    monkeypatch.setattr("absl.flags.FLAGS", run)
    with pytest.raises(SystemExit) as ended:
        cli._parse_flags(sys.argv)
    expected = f"train.py: {path}, line 2: ValueError: no; --debug shows more"
    assert ended.value.code == expected


def test_a_full_disk_names_the_way_out():
    error = OSError(errno.ENOSPC, "No space left on device")
    assert refusal.describe(error).endswith("device: free some space, or write elsewhere")
