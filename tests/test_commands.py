"""Programs are named in messages and help texts as they were started: `vla NAME` or a script."""

import importlib
import re
import runpy
import sys
from pathlib import Path

import jax
import pytest

import vla_jax
from vla_jax import cli, refusal
from vla_jax.commands import COMMANDS, as_typed
from vla_jax.config import ConfigError

ROOT = Path(__file__).resolve().parents[1]
BRIDGE = ROOT / "tests" / "fixtures" / "bridge_dataset" / "1.0.0"


@pytest.fixture
def by_vla(monkeypatch):
    """Sets the command line as `cli.main` does for somebody who has typed `vla`."""

    def start(command: str, *flags: str) -> None:
        monkeypatch.setattr(sys, "argv", [f"vla {command}", *flags])

    return start


def test_scripts_become_commands_for_those_who_typed_one(monkeypatch, by_vla):
    text = "python launch/inspect_data.py A, launch/train.py, /b/launch/train.py, launch/other.py"
    monkeypatch.setattr(sys, "argv", ["launch/train.py"])
    assert as_typed(text) == text
    by_vla("train")
    assert as_typed(text) == "vla data inspect A, vla train, /b/launch/train.py, launch/other.py"


# absl reads the flags of the others, whose names may be defined once a process.
ARGPARSE = [words for words in COMMANDS if words not in {("train",), ("plan",), ("data", "fast")}]


@pytest.mark.parametrize("words", ARGPARSE)
def test_no_help_names_a_script_to_those_who_typed_a_command(words, by_vla, capsys):
    by_vla(" ".join(words), "--help")
    with pytest.raises(SystemExit):
        importlib.import_module(f"launch.{COMMANDS[words][0]}").main()
    printed = capsys.readouterr().out
    assert f"    vla {' '.join(words)}" in printed
    assert not re.search(r"launch/\w+\.py", printed)


def test_nor_does_the_help_of_absl(by_vla, monkeypatch, capsys):
    monkeypatch.setattr(
        sys.modules["__main__"], "__doc__", "    python launch/plan.py --config=..."
    )
    by_vla("plan", "--help")
    with pytest.raises(SystemExit, match="0"):
        cli.run_with_flags(lambda _: None)
    assert capsys.readouterr().out.startswith("    vla plan --config=...")


@pytest.mark.parametrize(
    ("started", "inspect", "train"),
    [
        ("vla data inspect", "vla data inspect", "vla train"),
        ("inspect_data.py", "python launch/inspect_data.py", "python launch/train.py"),
    ],
)
def test_hints_of_an_inspection(tmp_path, monkeypatch, capsys, started, inspect, train):
    inspect_data = importlib.import_module("launch.inspect_data")
    monkeypatch.chdir(tmp_path)
    Path("data").symlink_to(BRIDGE)
    monkeypatch.setattr(sys, "argv", [started, "data"])
    inspect_data.main()
    assert f"A first spec: {inspect} data --write-spec=my_robot.py" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [started, "data", "--write-spec=mine.py"])
    inspect_data.main()
    printed = capsys.readouterr().out
    assert f"  {inspect} data --spec=mine.py:mine" in printed
    assert f"  {train} --config=configs/first_run.py:mine.py:mine:data --workdir=" in printed
    assert inspect.removeprefix("python ") in runpy.run_path("mine.py")["__doc__"]


def test_an_error_is_of_the_program_that_was_typed(by_vla, capsys):
    by_vla("data inspect")
    assert refusal.tell(ConfigError("fit it with launch/fit_fast.py"), debug=False) == 1
    assert capsys.readouterr().err == "vla data inspect: fit it with vla data fast\n"


def test_the_version(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["vla", "--version"])
    cli.main()
    assert capsys.readouterr().out == f"vla_jax {vla_jax.__version__}, jax {jax.__version__}\n"
