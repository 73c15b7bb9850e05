"""The wheels: what they hold, and that they work without a checkout; names of shipped configs."""

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from vla_jax import shipped

ROOT = Path(__file__).resolve().parents[1]
NOT_COPIED = (
    ".git", ".venv*", ".*_cache", "__pycache__", "*.egg-info", "build", "dist", "runs", "tests",
)  # fmt: skip


def build(source, folder):
    """The wheel of a source tree, unpacked."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    command += ["--disable-pip-version-check", "--wheel-dir", str(folder), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(
        ROOT, folder / "tree", symlinks=True, ignore=shutil.ignore_patterns(*NOT_COPIED)
    )
    return build(folder / "tree", folder)


def run_in(site, folder, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(site)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )


def test_the_wheel_holds_configs_launchers_and_rollouts(wheel):
    for path in (
        "vla_jax/py.typed",
        "vla_jax/configs/kosmos_ph.py",
        "vla_jax/launch/train.py",
        "eval_servers/calvin/chains.json",
        "eval_servers/calvin/setup.sh",
        "eval_servers/setup_common.sh",
    ):
        assert (wheel / path).is_file(), path
    (described,) = wheel.glob("vla_jax-*.dist-info")
    assert "vla = vla_jax.cli:main" in (described / "entry_points.txt").read_text()
    assert {"LICENSE", "NOTICE"} <= {path.name for path in (described / "licenses").iterdir()}
    # Nothing of generic names at the top, which would shadow other people's modules.
    assert {path.name for path in wheel.iterdir()} == {described.name, "vla_jax", "eval_servers"}


def test_the_commands_run_from_any_folder_without_a_checkout(wheel, tmp_path):
    listed = run_in(wheel, tmp_path, "-m", "vla_jax.cli")
    assert listed.returncode == 0
    assert "data inspect" in listed.stdout
    wrong = run_in(wheel, tmp_path, "-m", "vla_jax.cli", "trian")
    assert wrong.returncode == 1
    assert "no command 'trian'" in wrong.stderr
    several = run_in(wheel, tmp_path, "-m", "vla_jax.cli", "data", "--help")
    assert several.returncode == 0
    assert [line.split()[:2] for line in several.stdout.splitlines()[2:]] == [
        ["data", name] for name in ("inspect", "convert", "fast", "record")
    ]
    for program, words in (("serve", "--checkpoint DIR"), ("train", "Train a VLA.")):
        help_text = run_in(wheel, tmp_path, "-m", "vla_jax.cli", program, "--help")
        assert help_text.returncode == 0
        assert words in help_text.stdout
    # Its worker processes have to find the program's own functions.
    flags = ("--out=data/1.0.0", "--episodes=2", "--size=8", "--workers=1")
    recorded = run_in(wheel, tmp_path, "-m", "vla_jax.cli", "data", "record", *flags)
    assert recorded.returncode == 0, recorded.stderr
    assert "2 train and 0 val episodes" in recorded.stdout
    result = run_in(
        wheel, tmp_path, "-c", "import vla_jax.launch as l, sys; sys.stdout.write(l.__file__)"
    )
    assert result.stdout.startswith(str(wheel))
    trained = run_in(
        wheel, tmp_path, "-m", "vla_jax.cli", "train", "--config=quickstart:none", "--workdir=w"
    )
    assert trained.returncode == 1
    assert trained.stderr.splitlines()[-1].startswith("vla train: ")  # its data are not there
    assert "none" in trained.stderr


def test_the_client_is_a_distribution_of_its_own(tmp_path):
    shutil.copytree(ROOT / "eval_servers", tmp_path / "tree")
    site = build(tmp_path / "tree", tmp_path)
    assert (site / "eval_servers" / "client.py").is_file()
    assert (site / "eval_servers" / "calvin" / "chains.json").is_file()
    folders = {p.parent.name for p in (ROOT / "eval_servers").glob("*/__init__.py")}
    packed = {p.parent.name for p in (site / "eval_servers").glob("*/__init__.py")}
    assert packed == folders
    version = next(site.glob("vla_jax_client-*.dist-info")).name
    assert next(iter(version.split("-")[1].split(".dist"))) == _version()


def _version():
    from vla_jax import __version__

    return __version__


def test_rollouts_are_python_3_8():
    for path in (ROOT / "eval_servers").rglob("*.py"):
        ast.parse(path.read_text(), str(path), feature_version=(3, 8))


@pytest.mark.skipif(not shutil.which("python3.8"), reason="no Python 3.8")
def test_rollouts_compile_in_python_3_8():
    names = [str(path) for path in (ROOT / "eval_servers").rglob("*.py")]
    check = (
        "import sys\nfor n in sys.argv[1:]: compile(open(n, encoding='utf-8').read(), n, 'exec')"
    )
    done = subprocess.run(["python3.8", "-c", check, *names], capture_output=True, text=True)
    if "not found" in done.stderr:  # a version manager's stand-in without the version
        pytest.skip("no Python 3.8")
    assert done.returncode == 0, done.stderr


def test_configs_are_named_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = str(shipped.CONFIGS / "quickstart.py")
    assert shipped.config_path("quickstart") == path
    assert shipped.config_path("quickstart:data/x") == path + ":data/x"
    assert shipped.config_path("configs/quickstart.py") == path
    assert shipped.config_path("mine.py") == "mine.py"
    assert shipped.with_config_path(["t", "--config=quickstart", "--config.seed=1"]) == [
        "t", f"--config={path}", "--config.seed=1"
    ]  # fmt: skip
    assert shipped.with_config_path(["t", "--config", "quickstart"]) == ["t", "--config", path]
    (tmp_path / "quickstart.py").write_text("")
    assert shipped.config_path("quickstart.py") == "quickstart.py"  # the user's own file


def test_extras_say_how_they_are_installed(monkeypatch, tmp_path):
    assert shipped.install_hint("log") == f"pip install -e '{ROOT}[log]'"
    monkeypatch.setattr(shipped, "PACKAGE", tmp_path / "site-packages" / "vla_jax")
    monkeypatch.setattr(shipped, "requirements", lambda: {"log": ["a>=1", "b"]})
    assert shipped.install_hint("log") == "pip install 'a>=1' 'b'"
