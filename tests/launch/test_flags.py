"""Flags that name what is not there: one sentence that begins with the flag, before any work."""

import importlib
import sys

import pytest

# Launcher -> flags, and what is said of them; the folder that it is called in is empty but for
# `file` and `empty/`.
CALLS = [
    ("serve", ["--checkpoint=nope"], "--checkpoint: {tmp}/nope: no such folder"),
    ("serve", ["--checkpoint=empty"], "--checkpoint: {tmp}/empty: holds neither checkpoints/ nor"),
    ("replay", ["--checkpoint=nope"], "--checkpoint: {tmp}/nope: no such folder"),
    ("evaluate", ["tabletop", "--checkpoint=nope", "--out=o"], "--checkpoint: {tmp}/nope: no such"),
    (
        "evaluate",
        ["calvin", "--server=ws://127.0.0.1:1", "--out=o", "--python=nope"],
        "--python=nope: no such program",
    ),
    (
        "evaluate",
        ["tabletop", "--server=ws://127.0.0.1:1", "--out=o", "--against=early=nope"],
        "--against=early=nope: write NAME=DIR, of a folder with score.json",
    ),
    ("convert", ["import-hf", "empty", "o", "--config=nope"], "--config: nope: no such file, and"),
    (
        "convert",
        ["import-openpi", "empty", "o", "--config=pi05_libero", "--tokenizer=nope"],
        "--tokenizer=nope: no such file or folder",
    ),
    (
        "convert",
        ["import-lerobot", "empty", "o", "--config=smolvla", "--statistics=nope"],
        "--statistics=nope: no such file or folder",
    ),
    ("convert", ["import-robovlms", "file", "file", "o", "--vlm=nope"], "--vlm=nope: no such"),
    (
        "convert",
        ["import-openvla", "empty", "o", "--config=openvla_libero", "--base=nope"],
        "--base=nope: no such file or folder",
    ),
    ("convert", ["import-hf", "nope", "o"], "nope: no such file or folder"),
    (
        "convert",
        ["import-robovlms", "a.pt", "b.json", "o", "--vlm=c"],
        "a.pt: no such file or folder; b.json: no such file or folder; --vlm=c: no such file or",
    ),
    ("convert", ["export-hf", "empty", "o", "--source=nope"], "--source=nope: no such file or"),
    ("convert_data", ["lerobot", "nope", "o/1.0.0"], "nope: no such folder"),
    ("record_demos", ["--out=file/1.0.0", "--episodes=1"], "--out: file/"),
    ("record_demos", ["--out=o", "--episodes=0"], "--episodes, --size and --workers: at least 1"),
    ("inspect_data", ["nope"], "no folder 'nope'; a dataset of the registry takes --root"),
]


@pytest.mark.parametrize(("launcher", "flags", "message"), CALLS)
def test_a_flag_that_names_nothing(launcher, flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(sys, "argv", [f"{launcher}.py", *flags])
    try:
        status = importlib.import_module(f"launch.{launcher}").main()
    except SystemExit as error:
        status = error.code
    assert status in (1, 2)
    last = capsys.readouterr().err.splitlines()[-1].replace(": error: ", ": ")
    assert last.startswith(f"{launcher}.py: {message.format(tmp=tmp_path)}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file"]
