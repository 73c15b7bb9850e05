"""The pages in docs: their code runs, in the order of the page."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
NAMED = re.compile(r"# (\S+\.py)\n")


def blocks(page):
    return BLOCK.findall((ROOT / "docs" / page).read_text())


def run(page, folder, environment):
    """Writes the files a page shows and runs its commands; returns what they print."""
    env = {**environment, "PYTHONPATH": str(ROOT)}
    printed = []
    for language, text in blocks(page):
        if language == "python":
            named = NAMED.match(text)
            assert named, f"{page}: a block without a file's name:\n{text}"
            (folder / named[1]).write_text(text)
            continue
        for line in text.splitlines():
            program, script, *flags = line.split()
            assert program == "python", line
            path = script if (folder / script).exists() else str(ROOT / script)
            command = [sys.executable, path, *flags]
            done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
            assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
            printed.append(done.stdout)
    return printed


def test_your_dataset(tmp_path, one_device):
    _, report, trained = run("your_dataset.md", tmp_path, one_device)
    assert "12 trajectories, 240 frames (10 Hz)" in report
    assert "camera wrist: 64 x 64" in report
    assert "0 warnings" in report
    for name in ("cameras", "actions"):
        assert min(Image.open(tmp_path / "runs" / "inspect" / f"{name}.png").size) > 300
    assert "held-out action L1" in trained
    statistics = (tmp_path / "runs" / "my_robot" / "eval.json").read_text()
    assert "l1_mean" in statistics


def test_a_dataset_takes_fifteen_lines():
    (spec,) = [text for _, text in blocks("your_dataset.md") if "DatasetSpec(" in text]
    lines = [line for line in spec.splitlines() if line.strip() and not line.startswith("#")]
    assert len(lines) <= 15


@pytest.mark.parametrize("page", sorted(p.name for p in (ROOT / "docs").glob("*.md")))
def test_pages_name_files_that_exist(page):
    text = (ROOT / "docs" / page).read_text()
    told = re.findall(r"`((?:configs|launch|tests|vla_jax)/[\w/.]+\.py)`", text)
    assert told
    assert all((ROOT / path).exists() for path in told)
