import time

import jax
import pytest

from tests.train.test_step import Toy, set_up
from tests.train.toy import CHUNK, DIM, HIDDEN, LAYERS, SIZE, WINDOW, make_batch
from vla_jax.train import flops, meter
from vla_jax.train.chips import CHIPS
from vla_jax.train.goodput import FILE, PARTS, Goodput
from vla_jax.train.meter import Meter


def test_meter_shares_out_the_time(monkeypatch):
    clock = iter([0.0, 4.0, 5.0, 6.0, 8.0, 8.0])
    monkeypatch.setattr(meter.time, "perf_counter", lambda: next(clock))
    watch = Meter(step=10, batch_size=8)
    watch.waited(0.5)
    watch.waited(0.5)
    row = watch.read(12)
    assert (row["step_s"], row["samples_per_s"], row["data_wait"], row["wall_s"]) == (2, 4, 0.25, 4)
    assert 10 < row["rss_mb"] < 1e6
    watch.waited(3.0)
    watch.pause(13)  # at 6: one second and step 13 are left out
    assert watch.read(14) | {"rss_mb": 0} == {
        "samples_per_s": 4, "samples_per_s_per_device": 4, "step_s": 2, "data_wait": 0,
        "tflops_per_device": 0, "mfu": None, "rss_mb": 0, "device_gb": None, "wall_s": 8,
    }  # fmt: skip


def test_model_flops_and_what_the_chip_could_do(monkeypatch):
    clock = iter([0.0, 2.0, 2.0])
    monkeypatch.setattr(meter.time, "perf_counter", lambda: next(clock))
    devices = jax.devices()[:4]
    watch = Meter(0, 8, devices)
    watch.expect(flops=4e12, peak=2e12)
    row = watch.read(1)
    assert row["samples_per_s_per_device"] == 1
    assert row["tflops_per_device"] == pytest.approx(0.5)
    assert row["mfu"] == pytest.approx(0.25)
    assert row["device_gb"] is None  # a CPU does not tell
    assert flops.peak(devices[0]) is None
    for chip in CHIPS.values():
        assert flops.peak(type("Device", (), {"device_kind": chip.kind})) == chip.flops


def test_three_forward_passes_are_counted_as_by_hand():
    config, _, template, _ = set_up((1, 1, 1))
    batch = make_batch(rows=8)
    tokens = 8 * WINDOW
    products = 3 * SIZE * SIZE * DIM  # pixels to features
    products += LAYERS * (2 * DIM * DIM + 2 * DIM * HIDDEN)  # q and o, fc1 and fc2
    products += DIM * CHUNK * 7  # both heads
    assert flops.of_step(Toy(), config, template, batch) == 3 * 2 * tokens * products


def test_goodput_is_what_is_left_of_the_time(tmp_path, monkeypatch, caplog):
    current = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: current[0])
    clock = Goodput()
    clock.add("lost", 5.0)  # of another life: on top, and no part of this one's start
    current[0] = 10.0
    clock.started()
    with clock.spent("checkpoint"):
        current[0] = 15.0
    clock.add("data", 2.0)
    current[0] = 40.0
    content = clock.read()
    assert {part: content[part] for part in PARTS} == {
        "start": 10, "compile": 0, "data": 2, "checkpoint": 5, "evaluation": 0, "lost": 5,
    }  # fmt: skip
    assert (content["total"], content["steps"], content["goodput"]) == (45, 23, 23 / 45)
    caplog.set_level("INFO")
    clock.report(tmp_path, 0, 7)
    assert "goodput 51.1 %" in caplog.text
    assert '"last": 7' in (tmp_path / FILE).read_text()
