"""The pages: their code runs, in the order of the page, or is checked where it cannot run here.

Blocks marked python are executed. Blocks marked bash are executed on the pages that come with all
they need; on the others every program must exist and every flag be one of its own. Blocks marked
sh, py, text or yaml need what no test has (a robot, a simulator, a cluster) and are read by people.
"""

import functools
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "fixtures" / "checkpoint_format_1"
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^ *```(\w+)\n(.*?)^ *```$", re.M | re.S)
NAMED = re.compile(r"# (\S+\.py)\n")
LANGUAGES = {"python", "bash", "sh", "py", "text", "yaml", "json"}


def blocks(page):
    return BLOCK.findall((ROOT / page).read_text())


def commands(text):
    """The command lines of a block, without comments."""
    lines = (line.partition("#")[0].split() for line in text.splitlines())
    return [line for line in lines if line]


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
        for program, script, *flags in commands(text):
            assert program == "python", script
            path = script if (folder / script).exists() else str(ROOT / script)
            command = [sys.executable, path, *flags]
            done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
            assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
            printed.append(done.stdout)
    return printed


@functools.cache
def flags_of(script):
    """What a program's --help says, subcommands' included."""
    help_of = functools.partial(subprocess.run, capture_output=True, text=True)
    text = help_of([sys.executable, str(ROOT / script), "--help"]).stdout
    # Words that are indented as subcommands are; an example's "python" is none.
    for word in sorted({*re.findall(r"^    ([a-z][\w-]+)\s", text, re.M)} - {"python"}):
        text += help_of([sys.executable, str(ROOT / script), word, "--help"]).stdout
    return text


@pytest.mark.parametrize("page", PAGES)
def test_commands_exist_and_know_their_flags(page):
    for language, text in blocks(page):
        assert language in LANGUAGES, f"{page}: {language}"
        for words in commands(text) if language == "bash" else ():
            program, *rest = words
            if program == "make":
                assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(), re.M), words
            elif program == "python" and rest[0] != "-m" and (ROOT / rest[0]).exists():
                own = rest[: rest.index("--")] if "--" in rest else rest
                for flag in (word.partition("=")[0] for word in own if word.startswith("--")):
                    known = flag.startswith("--config.") or flag in flags_of(rest[0])
                    assert known, f"{page}: {rest[0]} has no {flag}"
            elif program != "pip":
                file = rest[0] if program == "python" else program
                shown = {NAMED.match(code)[1] for kind, code in blocks(page) if kind == "python"}
                assert (ROOT / file).exists() or file in shown, f"{page}: {' '.join(words)}"


def test_the_readmes_python(tmp_path, one_device):
    """Against the golden checkpoint, whose cameras are the quickstart's."""
    (text,) = [text for language, text in blocks("README.md") if language == "python"]
    shutil.copytree(GOLDEN, tmp_path / "runs" / "quickstart")
    env = {**one_device, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", text]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.match(r"\[\[ *-?\d", done.stdout), done.stdout


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if "://" not in target:
            assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"


def test_your_dataset(tmp_path, one_device):
    _, report, trained = run("docs/your_dataset.md", tmp_path, one_device)
    assert "12 trajectories, 240 frames (10 Hz)" in report
    assert "camera wrist: 64 x 64" in report
    assert "0 warnings" in report
    for name in ("cameras", "actions"):
        assert min(Image.open(tmp_path / "runs" / "inspect" / f"{name}.png").size) > 300
    assert "held-out action L1" in trained
    statistics = (tmp_path / "runs" / "my_robot" / "eval.json").read_text()
    assert "l1_mean" in statistics


def test_your_structure(tmp_path, one_device):
    (printed,) = run("docs/your_structure.md", tmp_path, one_device)
    combined, refused = printed.splitlines()
    assert combined == "None"
    assert refused.startswith("with one step there is nothing to remember")


def test_a_dataset_takes_fifteen_lines():
    (spec,) = [text for _, text in blocks("docs/your_dataset.md") if "DatasetSpec(" in text]
    lines = [line for line in spec.splitlines() if line.strip() and not line.startswith("#")]
    assert len(lines) <= 15


@pytest.mark.parametrize("page", PAGES)
def test_pages_name_files_that_exist(page):
    text = (ROOT / page).read_text()
    for path in re.findall(r"`((?:bench|configs|docs|launch|tests|vla_jax)/[\w/.]+\.\w+)`", text):
        if "BACKBONE" in path:  # stands for any
            continue
        assert (ROOT / path).exists(), f"{page}: {path}"
