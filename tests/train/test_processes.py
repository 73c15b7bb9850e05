"""Two processes of four virtual devices each: resumed on other meshes, and one of them lost."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launch.record_demos import record
from tests.train.mini import Processes, rows

pytestmark = pytest.mark.slow
# Read by Python at its start: the twelfth batch of process 1 cannot be made.
BREAKS_IN_PROCESS_1 = """
import os
if os.environ.get("JAX_PROCESS_ID") == "1":
    import vla_jax.data.loader as loader
    from vla_jax.data.errors import DataError
    following, count = loader.Loader.__next__, [0]
    def broken(self):
        count[0] += 1
        if count[0] == 12:
            raise DataError("the shard is gone", "x.tfrecord", 3)
        return following(self)
    loader.Loader.__next__ = broken
"""
FOREVER: dict[str, Any] = {"train__steps": 100000, "train__eval_every": 0}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "tabletop" / "1.0.0"
    record(folder, episodes=26, size=32, noise=0.0, workers=1)
    return folder


def losses(workdir: Path) -> list[float]:
    return [row["loss"] for row in rows(workdir)]


def test_a_run_goes_on_with_other_processes_and_devices(data, tmp_path):
    first = tmp_path / "first"
    steps = {"train__steps": 10, "model__dropout": False}
    with Processes(data, first, 2, 4, **steps, train__save_every=5) as run:
        assert [run.wait(i)[0] for i in range(2)] == [0, 0], run.said(0) + run.said(1)
    expected = losses(first)
    assert len(expected) == 10
    assert len(rows(first, "eval")) == 1
    for processes, devices in ((1, 8), (1, 1), (2, 2)):
        workdir = tmp_path / f"{processes}x{devices}"
        shutil.copytree(first, workdir)
        shutil.rmtree(workdir / "checkpoints" / "10")
        with Processes(data, workdir, processes, devices, **steps) as run:
            statuses = [run.wait(i)[0] for i in range(processes)]
            assert statuses == [0] * processes, run.said()
            assert "resumed at step 5" in run.said()
        np.testing.assert_allclose(losses(workdir), expected, rtol=1e-5)


def test_pi05_on_two_processes_is_pi05_on_one(data, tmp_path):
    # Adaptive norms, no state token, the gradient stopped at the VLM's keys and values.
    flags = {
        "model__expert__state": "none", "model__structure__proprio": 0,
        "model__expert__padded": 8, "train__steps": 6, "train__batch_size": 8,
        "train__log_every": 1, "train__eval_batches": 2, "optim__warmup_steps": 0,
    }  # fmt: skip
    collected = {}
    for processes, devices in ((2, 4), (1, 1)):
        workdir = tmp_path / f"{processes}x{devices}"
        config = "configs/quickstart_expert.py"
        with Processes(data, workdir, processes, devices, config=config, **flags) as run:
            statuses = [run.wait(i)[0] for i in range(processes)]
            assert statuses == [0] * processes, run.said()
        collected[processes] = losses(workdir), rows(workdir, "eval")[0]["l1_mean"]
    assert len(collected[1][0]) == 6
    np.testing.assert_allclose(collected[2][0], collected[1][0], rtol=1e-5)
    np.testing.assert_allclose(collected[2][1], collected[1][1], rtol=1e-4)


@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_process_is_named_and_the_other_stops(data, tmp_path, number, lost):
    with Processes(data, tmp_path / "run", 2, 4, **FOREVER) as run:
        run.until(12)
        run.processes[lost].send_signal(number)
        status, seconds = run.wait(1 - lost, seconds=60)
        message = run.said(1 - lost)
    print(f"{number.name} of {lost}: the other stopped after {seconds:.1f} s")
    print(message[message.find("train.py:") :][:300])
    assert status not in (None, 0)
    ours = message.find(f"train.py: process {lost}")
    assert ours >= 0, message[-3000:]
    assert "Traceback" not in message[:ours]
    assert "training goes on from step" in message[ours:]


def test_sigterm_of_one_saves_and_ends_all(data, tmp_path):
    for which, number in ((1, signal.SIGTERM), (0, signal.SIGINT)):
        with Processes(data, tmp_path / "run", 2, 4, **FOREVER) as run:
            run.until(len(rows(tmp_path / "run")) + 7)
            run.processes[which].send_signal(number)
            statuses = [run.wait(i, seconds=60)[0] for i in range(2)]
            assert statuses == [0, 0], run.said(0)[-3000:] + run.said(1)[-3000:]
            assert "the same command goes on from there" in run.said()
    saved = [int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert len(rows(tmp_path / "run")) == max(saved)


def test_an_error_in_one_is_told_by_the_other(data, tmp_path):
    broken = tmp_path / "broken" / "tabletop" / "1.0.0"
    shutil.copytree(data, broken)
    with Processes(broken, tmp_path / "run", 2, 4, **FOREVER, data__prefetch=1) as run:
        run.until(12)
        for shard in broken.glob("*train*"):
            shard.write_bytes(b"\0" * shard.stat().st_size)
        results = [run.wait(i, seconds=60) for i in range(2)]
        messages = [run.said(0), run.said(1)]
    print(f"both stopped after {max(seconds for _, seconds in results):.1f} s")
    assert all(status == 1 for status, _ in results), messages[0][-3000:] + messages[1][-3000:]
    assert any("Error: " in text for text in messages)
    assert "Traceback" not in messages[0] + messages[1]
    # Nothing that was learned is lost, and the data go on where the error was.
    last = rows(tmp_path / "run")[-1]["step"]
    folder = tmp_path / "run" / "checkpoints" / str(last)
    position = json.loads((folder / "data" / "metadata").read_text(encoding="utf-8"))
    assert last - 5 < position["samples"] / 8 <= last


def test_an_error_in_one_alone_saves_with_all(data, tmp_path, monkeypatch):
    """Only process 1 cannot read: the steps are saved, as SIGTERM would have them."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(BREAKS_IN_PROCESS_1)
    monkeypatch.setenv("PYTHONPATH", f"{site}:{Path(__file__).parents[2]}")
    with Processes(data, tmp_path / "run", 2, 4, **FOREVER, train__save_every=100000) as run:
        statuses = [run.wait(i, seconds=300)[0] for i in range(2)]
        messages = [run.said(0), run.said(1)]
    assert statuses == [1, 1], messages[0][-3000:] + messages[1][-3000:]
    assert "the shard is gone" in messages[1]
    assert "process 1" in messages[0]
    assert "Traceback" not in messages[0] + messages[1]
    saved = [int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert saved == [rows(tmp_path / "run")[-1]["step"]]
    assert saved[0] >= 12
