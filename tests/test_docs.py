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

import numpy as np
import pytest
from PIL import Image

from eval_servers.client import PolicyClient
from vla_jax.convert.store import Stored
from vla_jax.data.language.tokenizer import Tokenizer

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


@functools.cache
def flags_of(script):
    """What a program's --help says, subcommands' included."""
    help_of = functools.partial(subprocess.run, capture_output=True, text=True)
    text = help_of([sys.executable, str(ROOT / script), "--help"]).stdout
    # Words that are indented as subcommands are; an example's "python" is none.
    for word in sorted({*re.findall(r"^    ([a-z][\w-]+)\s", text, re.M)} - {"python"}):
        text += help_of([sys.executable, str(ROOT / script), word, "--help"]).stdout
    return text


def test_commands_exist_and_know_their_flags():
    """One test for all pages, so that each program is asked once."""
    everything = [(page, *block) for page in PAGES for block in blocks(page)]
    for page, language, text in everything:
        assert language in LANGUAGES, f"{page}: {language}"
        for words in commands(text) if language == "bash" else ():
            program, *remainder = words
            if program == "make":
                assert re.search(rf"^{remainder[0]}:", (ROOT / "Makefile").read_text(), re.M), words
            elif program == "python" and remainder[0] != "-m" and (ROOT / remainder[0]).exists():
                separate = remainder[: remainder.index("--")] if "--" in remainder else remainder
                for flag in (word.partition("=")[0] for word in separate if word.startswith("--")):
                    expected = flag.startswith("--config.") or flag in flags_of(remainder[0])
                    assert expected, f"{page}: {remainder[0]} has no {flag}"
            elif program != "pip":
                file = remainder[0] if program == "python" else program
                code = [text for language, text in blocks(page) if language == "python"]
                shown = {named[1] for named in map(NAMED.match, code) if named}
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


def walk(page, folder, environment, changes=(), skip=()):
    """Writes the files a page shows and runs its commands, the one that makes recordings first.

    Returns what each of them printed.

    Args:
        page: to run.
        folder: working directory.
        environment: of the commands.
        changes: flags that are added to those of launch/train.py.
        skip: words of commands that are not run.
    """
    texts = blocks(page)
    for text in (text for language, text in texts if language == "python"):
        named = NAMED.match(text)
        assert named, f"{page}: a block without a file's name:\n{text}"
        (folder / named[1]).write_text(text)
    lines = [words for language, text in texts if language == "bash" for words in commands(text)]
    lines = [words for words in lines if not any(word in " ".join(words) for word in skip)]
    lines.sort(key=lambda words: words[1] != "record.py")  # what the page reads comes first
    env, printed = {**environment, "PYTHONPATH": str(ROOT)}, []
    for program, script, *flags in lines:
        assert program == "python", script
        path = script if (folder / script).exists() else str(ROOT / script)
        more = changes if script == "launch/train.py" else ()
        command = [sys.executable, path, *flags, *more]
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
        printed.append(done.stdout)
    return printed


def test_your_dataset(tmp_path, one_device):
    small = [f"--config.train.{key}=4" for key in ("steps", "batch_size", "eval_batches")]
    _, listed, written, report, trained, replayed, checked, gripper = walk(
        "docs/your_dataset.md", tmp_path, one_device, small
    )
    assert "observation/hand   image   uint8 64 x 64 x 3" in listed
    assert "wrote my_robot.py" in written
    assert "12 trajectories, 240 frames (unknown rate)" in report
    assert "gripper: none" in report
    assert "camera wrist: 64 x 64" in report
    assert "pictures of camera wrist: 240 frames of 12 of 12 episodes looked at" in checked
    assert (tmp_path / "runs" / "inspect" / "report.json").is_file()
    for name in ("cameras", "actions"):
        assert min(Image.open(tmp_path / "runs" / "inspect" / f"{name}.png").size) > 300
    assert "held-out action L1" in trained
    assert "gripper" not in trained
    assert "l1_mean" in (tmp_path / "runs" / "my_robot" / "eval.json").read_text()
    assert "mean absolute error in the robot's units" in replayed
    assert "camera wrist: 64 x 64" in gripper
    assert "gripper, from 0 = closed to 1 = open in tenths" in gripper
    assert "0 warnings" in gripper


@pytest.mark.slow
def test_your_dataset_on_a_real_robot(tmp_path, one_device):
    """The page as it is written, on one episode of a humanoid: 26 joints, no gripper."""
    shutil.copytree(ROOT / "tests" / "fixtures" / "unitree_g1", tmp_path / "data" / "my_robot")
    remaining = ("record.py", "with_gripper")  # about another robot
    *_, report, trained, replayed, _ = walk(
        "docs/your_dataset.md", tmp_path, one_device, skip=remaining
    )
    assert "action: 26 numbers" in report
    assert "held-out action L1" in trained
    assert "1 episodes, 221 steps" in replayed
    (serve,) = [
        words
        for language, text in blocks("docs/your_dataset.md")
        if language == "sh"
        for words in commands(text)
        if words[1] == "launch/serve.py"
    ]
    assert answered(serve, tmp_path, one_device).shape == (4, 26)


@pytest.mark.slow
def test_lora_from_an_imported_vlm_on_a_real_robot(tmp_path, one_device):
    """The page's second path, with a very small VLM in place of the released one."""
    shutil.copytree(ROOT / "tests" / "fixtures" / "unitree_g1", tmp_path / "data" / "my_robot")
    vlm = tmp_path / "models" / "kosmos-2"
    shutil.copytree(ROOT / "tests" / "fixtures" / "hf_kosmos2", vlm)
    instruction = "Pick up the yellow bottle on the table."
    (vlm / "tokenizer.json").write_text(Tokenizer.build([instruction], 64).to_json())
    env = {**one_device, "PYTHONPATH": str(ROOT)}
    texts = [text for language, text in blocks("docs/your_dataset.md") if language == "sh"]
    lines = [words for text in texts for words in commands(text) if words[1] != "launch/serve.py"]
    write_spec = commands(blocks("docs/your_dataset.md")[0][1])[1]
    small = ("head.hidden=16", "head.layers=1", "structure.window=2")
    changes = [f"--config.model.{change}" for change in small]
    changes += ["--config.train.steps=4", "--config.train.batch_size=4"]
    for _, script, *flags in [write_spec, *lines]:
        more = changes if script == "launch/train.py" else []
        command = [sys.executable, str(ROOT / script), *flags, *more]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
    # The head of the import was of another robot.
    assert "head/output/arm/fc3/kernel" in done.stderr
    assert "starts anew" in done.stderr
    meta = Stored(tmp_path / "runs" / "mine").meta
    model = meta["config"]["model"]
    assert (model["action_dim"], model["gripper"]) == (26, "none")
    # The folder of the weights may be gone when the run goes on, and when it is served.
    shutil.rmtree(tmp_path / "models")
    shutil.rmtree(tmp_path / "runs" / "kosmos2")
    more = [*flags, *changes, "--config.train.steps=5"]
    command = [sys.executable, str(ROOT / "launch/train.py"), *more]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "resumed at step 4" in done.stderr
    serve = ["python", "launch/serve.py", "--checkpoint=runs/mine"]
    assert answered(serve, tmp_path, one_device).shape == (10, 26)
    # Out again, the factors merged, and without a folder to copy from.
    command = [sys.executable, str(ROOT / "launch/convert.py"), "export-hf", "runs/mine", "out"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    from transformers import AutoConfig  # seconds to import

    assert type(AutoConfig.from_pretrained(tmp_path / "out")).__name__ == "Kosmos2Config"
    assert "| my_robot | q99 |" in (tmp_path / "out" / "README.md").read_text()


def answered(words, folder, environment):
    """The actions that a served policy answers to a gray picture; `words` are the command."""
    env = {**environment, "PYTHONPATH": str(ROOT)}
    flags = [flag for flag in words[2:] if not flag.startswith("--port")]
    command = [sys.executable, str(ROOT / words[1]), *flags, "--port=0", "--max-batch=1"]
    with subprocess.Popen(
        command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as server:
        try:
            printed, address = "", None
            while address is None:
                assert server.stdout
                line = server.stdout.readline()
                printed += line
                assert line, printed  # it has ended
                address = re.search(r"listening on (ws://\S+)", line)
            client = PolicyClient(address[1])
            image = np.full((480, 640, 3), 127, np.uint8)
            reply = client.infer({"observation/image": image, "prompt": "pick up the bottle"})
        finally:
            server.terminate()
    return np.asarray(reply["actions"])


def test_your_structure(tmp_path, one_device):
    (printed,) = walk("docs/your_structure.md", tmp_path, one_device)
    loss, reason = printed.splitlines()
    assert float(loss.split()[1]) > 0
    assert reason == "the window becomes its mean, so there are no steps to remember"


@pytest.mark.parametrize("page", PAGES)
def test_pages_name_files_that_exist(page):
    text = (ROOT / page).read_text()
    for path in re.findall(r"`((?:bench|configs|docs|launch|tests|vla_jax)/[\w/.]+\.\w+)`", text):
        if "BACKBONE" in path or "NAME" in path:  # stands for any
            continue
        assert (ROOT / path).exists(), f"{page}: {path}"
