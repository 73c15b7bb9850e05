"""launch/plan.py, without a compiler for the machine, and on the devices that are here."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from tests.train import mini
from vla_jax.config import ConfigError, resolve
from vla_jax.plan import compilers, machines, measured, outline, programs, report, sweep
from vla_jax.plan.machines import PlanError, parse

ROOT = Path(__file__).resolve().parents[2]
KEYS = {
    "fits", "bytes_per_device", "flops", "hbm_bytes", "wire_bytes", "step_seconds", "mfu",
    "largest_batch", "unsplit_carries",
}  # fmt: skip


def config(**changes):
    """What is quick to trace, and two layers, which are a loop."""
    raw = mini.get_config("recordings")
    raw.model.backbone.arch["text_config"]["layers"] = 2
    raw.update_from_flattened_dict(changes)
    return resolve(raw)


@functools.cache
def sketched(machine, windows):
    """The outline of `config()`, which takes seconds, once for all tests."""
    return outline.outline(config(), parse(machine), windows)


def launch(*flags):
    command = [sys.executable, str(ROOT / "launch" / "plan.py"), *flags]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ})


def test_the_script(tmp_path):
    file = tmp_path / "plan.json"
    done = launch(
        "--config=configs/quickstart.py", "--topology=v5e:4x4", "--windows=2", f"--json={file}"
    )
    assert done.returncode == 0, done.stderr
    assert "16 x TPU v5 lite in 4 processes" in done.stdout
    assert "32 windows in 16 row blocks of 2; 4 blocks a process" in done.stdout
    parsed = json.loads(file.read_text())
    assert parsed.keys() >= KEYS
    assert parsed["bytes_per_device"]["total"] > parsed["bytes_per_device"]["params"] > 0
    assert parsed["flops"] > 2.9 * parsed["flops_forward"] > 0
    assert parsed["mfu"] is parsed["largest_batch"] is parsed["hbm_bytes"] is None


def test_mistakes_are_one_sentence():
    done = launch("--config=configs/quickstart.py", "--topology=v9:2x2")
    assert done.returncode == 1
    assert done.stderr.startswith("plan.py: --topology: no chip 'v9'")
    assert "h100" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_does_not_fit_the_machine():
    with pytest.raises(ConfigError, match="batch_size"):
        outline.outline(config(**{"train.batch_size": 6}), parse("h100:4"))
    with pytest.raises(ConfigError, match="mesh"):
        outline.outline(config(**{"mesh.tensor": 3}), parse("h100:4"))


def test_a_missing_compiler_is_named_with_its_install_line(monkeypatch):
    monkeypatch.setattr(compilers, "_installed", lambda package: False)
    for machine, packages, wanted in (
        ("v5e:2x2", "libtpu", ["jax[tpu]"]),
        (
            "h100:8",
            "jax-cuda13-plugin and jax-cuda13-pjrt",
            ["jax-cuda13-plugin", "jax-cuda13-pjrt"],
        ),
    ):
        with pytest.raises(PlanError) as error:
            compilers.devices(parse(machine))
        pip = " ".join(f"'{name}=={jax.__version__}'" for name in wanted)
        line = f"--compile for {machine} needs {packages}, not installed here: pip install {pip}"
        assert str(error.value) == line


def test_operations_split_over_devices():
    two, single = sketched("h100:2", 1), sketched("h100:1", 4)
    assert single.flops == 4 * two.flops
    assert single.forward == 4 * two.forward
    assert (two.rows, two.blocks, two.blocks_of_process, two.straddling) == (2, 2, (2,), 0)
    assert single.unsplit == []


def test_a_resized_program_is_the_one_for_so_many_rows():
    with_captions = config(**{"data.cotrain.path": "texts.json", "data.cotrain.rows": 4})
    devices = machines.stand_ins(parse("h100:2"))
    small = programs.train_program(with_captions, devices, 1)
    large = programs.train_program(with_captions, devices, 3)
    resized = programs.resized(small, 6)
    assert resized.rows == large.rows == 6
    assert resized.batch == large.batch != small.batch
    assert resized.step is small.step


def test_on_the_devices_that_are_here(monkeypatch):
    """Their own compiler stands in for the machine's: all numbers, through to the JSON."""
    machine = parse("h100:2")
    monkeypatch.setattr(compilers, "devices", lambda _: jax.devices()[:2])
    monkeypatch.setitem(compilers.OPTIONS, "cuda", {})
    tiny, sketch = config(), sketched("h100:2", 1)
    train = measured.train_step(tiny, machine, 1)
    control = measured.control_step(tiny, machine)
    result = report.to_json(machine, sketch, train, control)
    assert result.keys() >= KEYS
    assert result["fits"] is True
    assert result["bytes_per_device"]["total"] == train.memory["total"]
    assert 0 < result["mfu"] < 0.75
    assert result["largest_batch"] > 2
    assert result["largest_batch"] % 2 == 0
    assert result["wire_bytes"] > 0
    assert result["control"]["weights"] == control.weights > 0
    assert json.loads(json.dumps(result)) == result
    text = "\n".join(
        [*report.train_lines(machine, sketch, train), *report.control_lines(machine, control)]
    )
    assert "fits: " in text
    assert "largest batch" in text


def test_whole_numbers_are_compiled_with_options_of_their_own(monkeypatch):
    monkeypatch.setattr(compilers, "devices", lambda _: jax.devices()[:1])
    monkeypatch.setitem(compilers.OPTIONS, "cuda", {})
    monkeypatch.setitem(compilers.WHOLE_NUMBERS, "cuda", {"no_such_option": True})
    with pytest.raises(jax.errors.JaxRuntimeError, match="no_such_option"):
        measured.control_step(config(), parse("h100:1"), 1, "int8")


def test_a_sweep_recommends_what_fits(monkeypatch):
    monkeypatch.setattr(sweep, "_REMAT", ("full",))
    monkeypatch.setattr(sweep, "meshes", lambda _: [{"data": 1, "fsdp": 2, "tensor": 1}])
    machine = parse("h100:2")
    result = sweep.sweep(config(), machine)
    assert result.best is not None
    assert result.candidates[0].memory <= machine.chip.memory
    numbers = sweep.to_json(machine, result)
    assert numbers.keys() >= KEYS
    assert "--config.mesh.fsdp=" in numbers["recommended"]
    assert list(sweep.lines(result))[-1] == f"take: {numbers['recommended']}"


def test_meshes_of_a_sweep_keep_rows_and_slices_whole():
    for name in ("2*v5e:4x4", "h100:16", "tpu7x:2x2x1"):
        machine = machines.parse(name)
        tried = list(sweep.meshes(machine))
        assert len(tried) > 2
        for mesh in tried:
            assert mesh["data"] * mesh["fsdp"] * mesh["tensor"] == machine.size
            assert mesh["data"] % machine.slices == 0
            assert machine.chip.host % mesh["tensor"] == 0
