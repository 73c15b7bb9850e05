"""launch/doctor.py: its reading of setup.py, its judgement, and a run on this machine."""

import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from eval_servers.findings import Finding

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def doctor() -> Any:
    spec = importlib.util.spec_from_file_location("launch_doctor", ROOT / "launch" / "doctor.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Installed:
    """Stands in for what pip knows of our package and the others."""

    def __init__(self, monkeypatch, doctor, python, requires, versions):
        self.versions = versions
        described = {"Requires-Python": python}
        monkeypatch.setattr(doctor.importlib.metadata, "metadata", lambda name: described)
        monkeypatch.setattr(doctor.shipped, "requirements", lambda: requires)
        monkeypatch.setattr(doctor, "_installed", versions.get)


def test_no_version_is_written_down_a_second_time():
    assert not re.search(r"jax\W{0,3}\d+\.\d+", (ROOT / "launch" / "doctor.py").read_text())


def test_a_package_that_is_not_installed_is_said(doctor, monkeypatch):
    def missing():
        raise doctor.importlib.metadata.PackageNotFoundError("vla_jax")

    monkeypatch.setattr(doctor.shipped, "requirements", missing)
    (result,) = doctor.versions()
    assert (result.name, result.level) == ("vla_jax", "fail")
    assert result.advice.startswith("pip install -e ")


def levels(findings):
    return {finding.name: finding.level for finding in findings}


def test_versions_outside_the_window_say_what_to_install(doctor, monkeypatch):
    versions = {"jax": "0.9.0", "flax": "0.12.9"}
    wanted = {"": ["jax>=0.10.2,<0.12", "flax>=0.12.8,<0.13", "optax>=0.2"], "log": ["wandb>=0.19"]}
    Installed(monkeypatch, doctor, ">=3.8,<3.10", wanted, versions)
    results = {finding.name: finding for finding in doctor.versions()}
    assert levels(results.values()) == {
        "python": "fail", "jax": "fail", "core packages": "fail", "[log]": "skip"
    }  # fmt: skip
    assert results["jax"].text == "0.9.0, tested <0.12,>=0.10.2"
    assert results["jax"].advice == "pip install 'jax>=0.10.2,<0.12'"
    assert results["core packages"].advice == "pip install 'optax>=0.2'"


def test_an_extra_of_an_extra_counts(doctor, monkeypatch):
    needs = ["jaxlib>=0.10", 'jax-cuda13-plugin==0.10.2; extra == "cuda13"']
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: needs)
    wanted = {"cuda": ["jax[cuda13]>=0.10.2,<0.12"]}
    versions = {"jax": "0.10.2", "jaxlib": "0.10.2"}
    installed = Installed(monkeypatch, doctor, ">=3.8", wanted, versions)
    results = {finding.name: finding for finding in doctor.versions()}
    assert results["[cuda]"].text == "not installed: jax[cuda13]"
    assert "[cuda]" in results["[cuda]"].advice
    installed.versions["jax-cuda13-plugin"] = "0.10.2"
    assert levels(doctor.versions())["[cuda]"] == "ok"


def test_a_plugin_of_another_jaxlib(doctor, monkeypatch):
    class Plugin:
        metadata = {"Name": "jax-cuda13-plugin"}  # noqa: RUF012
        version = "0.10.1"

    monkeypatch.setattr(doctor.importlib.metadata, "distributions", lambda: [Plugin()])
    monkeypatch.setattr(doctor, "_installed", {"jaxlib": "0.10.2"}.get)
    (result,) = doctor._jax_plugins()
    assert (result.level, result.advice) == ("fail", "pip install 'jax-cuda13-plugin==0.10.2'")


@pytest.mark.parametrize(
    ("reply", "level", "words"),
    [
        ((0, '{"simulator": {"driver": "llvmpipe"}, "seconds": 2, "pictures": {"a": [4, 4, 3]},'
             ' "blank": []}', ""), "ok", "drawn by llvmpipe"),
        ((1, '{"simulator": {}, "seconds": 2, "pictures": {"a": [4, 4, 3]}, "blank": ["a"]}', ""),
         "fail", "blank: a"),
        ((-11, "", "exit status -11: no message"), "fail", "exit status -11"),
    ],
)  # fmt: skip
def test_a_simulators_frame(doctor, reply, level, words):
    result = doctor._frame("calvin", *reply, "")
    assert result.level == level
    assert words in result.text
    assert bool(result.advice) == (level == "fail")


def test_the_tabletop_is_drawn_and_a_missing_simulator_is_no_fault(doctor, monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "SIMULATORS", ["tabletop", "absent"])
    monkeypatch.setattr(doctor, "NEEDS", {"absent": "no_such_simulator"})
    results = {f.name: f for f in doctor.simulators({}, {"tabletop": "--image-size=32"}, tmp_path)}
    assert levels(results.values()) == {"tabletop": "ok", "absent": "skip"}
    assert "2 pictures" in results["tabletop"].text
    assert (tmp_path / "tabletop.png").stat().st_size > 100
    assert "--python absent=PATH" in results["absent"].advice


def test_a_simulator_that_was_named_and_is_not_there_is_a_fault(doctor, monkeypatch):
    monkeypatch.setattr(doctor, "SIMULATORS", ["absent"])
    monkeypatch.setattr(doctor, "NEEDS", {"absent": "no_such_simulator"})
    for python, word in ((sys.executable, "No module named"), ("/no/such/python", "No such file")):
        (result,) = doctor.simulators({"absent": python}, {}, None)
        assert result.level == "fail"
        assert word in result.text
        assert "setup.sh" in result.advice


def test_a_simulator_that_is_there_and_does_not_load_is_a_fault(doctor, monkeypatch):
    monkeypatch.setattr(doctor, "SIMULATORS", ["broken"])
    monkeypatch.setattr(doctor, "NEEDS", {"broken": "sys; raise OSError('libGL.so.1 is missing')"})
    (result,) = doctor.simulators({}, {}, None)
    assert result.level == "fail"
    assert "libGL.so.1" in result.text


def test_a_round_trip(doctor):
    (result,) = doctor.server(None)
    assert result.level == "ok"
    assert "actions [1, 7]" in result.text


def test_processes_that_hang_crash_or_are_not_there(doctor, monkeypatch):
    monkeypatch.setattr(doctor, "TIMEOUT", 0.5)
    wait = "import time; time.sleep(9)"
    assert doctor._ask([sys.executable, "-c", wait])[2] == "no answer within 0.5 s"
    crash = "import os; os.kill(os.getpid(), 11)"
    monkeypatch.setattr(doctor, "TIMEOUT", 60)
    assert doctor._ask([sys.executable, "-c", crash])[2].startswith("exit status -11")
    assert "No such file" in doctor._ask(["/no/such/python"])[2]


def test_graphics_says_what_is_missing(doctor, monkeypatch):
    replies = {
        "egl": (0, json.dumps([{"renderer": "llvmpipe"}]), ""),
        "vulkan": (1, "", "libvulkan.so.1 is not installed"),
    }
    monkeypatch.setattr(doctor, "_ask", lambda command: replies[command[-1]])
    egl, vulkan = doctor.graphics()
    assert (egl.level, egl.text) == ("ok", "llvmpipe")
    assert vulkan.level == "skip"
    assert "apt install libvulkan1" in vulkan.advice


@pytest.mark.parametrize(("level", "status"), [("ok", 0), ("warn", 0), ("fail", 1)])
def test_exit_status(doctor, monkeypatch, capsys, level, status):
    for name in ("versions", "machine", "graphics"):
        monkeypatch.setattr(doctor, name, lambda: [])
    monkeypatch.setattr(doctor, "simulators", lambda *_: [])
    monkeypatch.setattr(doctor, "server", lambda _: [Finding("x", level, "seen", "do that")])
    monkeypatch.setattr(sys, "argv", ["doctor.py"])
    assert doctor.main() == status
    printed = capsys.readouterr().out
    assert "do that" in printed
    assert ("ready" in printed) == (status == 0)
