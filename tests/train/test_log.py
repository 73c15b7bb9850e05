import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from vla_jax.train import log


def rows(workdir) -> list[dict]:
    lines = (workdir / log.FILE).read_text(encoding="utf-8").splitlines()
    return [json.loads(line, parse_constant=pytest.fail) for line in lines]


def test_rows_are_strict_json_of_host_and_device_numbers(tmp_path):
    with log.RunLog(tmp_path) as run:
        run.write(1, "train", {"loss": jnp.float32(0.5), "lr": np.float32(1), "bad": float("nan")})
        run.write(1, "eval", {"l1": np.array([1.0, float("inf")]), "count": 3})
    assert rows(tmp_path) == [
        {"step": 1, "kind": "train", "loss": 0.5, "lr": 1.0, "bad": "nan"},
        {"step": 1, "kind": "eval", "l1": [1.0, "inf"], "count": 3},
    ]


def test_resume_drops_later_and_half_written_rows(tmp_path):
    with log.RunLog(tmp_path) as run:
        for step in (10, 20, 30):
            run.write(step, "train", {"loss": step})
    with (tmp_path / log.FILE).open("a", encoding="utf-8") as file:
        file.write('{"step": 15, "lo')
    with log.RunLog(tmp_path, step=20) as run:
        assert [row["step"] for row in rows(tmp_path)] == [10, 20]
        run.write(30, "train", {"loss": -1})
    assert [row["loss"] for row in rows(tmp_path)] == [10, 20, -1]
    assert not list(tmp_path.glob("*.tmp"))


def test_a_fresh_run_drops_rows_of_one_that_never_saved(tmp_path):
    with log.RunLog(tmp_path) as run:
        run.write(3, "train", {"loss": 1.0})
    with log.RunLog(tmp_path, step=0):
        assert rows(tmp_path) == []


def test_other_processes_write_nothing(tmp_path):
    with log.RunLog(tmp_path / "w", active=False, tensorboard=True, wandb="x") as run:
        run.write(1, "train", {"loss": 1.0})
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("kwargs", "module"),
    [({"tensorboard": True}, "tensorboardX"), ({"wandb": "project"}, "wandb")],
)
def test_a_missing_writer_is_a_clear_error(tmp_path, monkeypatch, kwargs, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(log.LogError, match=rf"{module} is not installed; pip install"):
        log.RunLog(tmp_path, **kwargs)


def test_meter_shares_out_the_time(monkeypatch):
    clock = iter([0.0, 4.0, 5.0, 6.0, 8.0, 8.0])
    monkeypatch.setattr(log.time, "perf_counter", lambda: next(clock))
    meter = log.Meter(step=10, batch_size=8)
    meter.waited(0.5)
    meter.waited(0.5)
    row = meter.read(12)
    assert (row["step_s"], row["samples_per_s"], row["data_wait"], row["wall_s"]) == (2, 4, 0.25, 4)
    assert 10 < row["rss_mb"] < 1e6
    meter.waited(3.0)
    meter.pause(13)  # at 6: one second and step 13 are left out
    assert meter.read(14) | {"rss_mb": 0} == {
        "samples_per_s": 4, "step_s": 2, "data_wait": 0, "rss_mb": 0, "wall_s": 8,
    }  # fmt: skip


def test_rows_are_written_late_but_in_order(tmp_path, caplog):
    shown = {}

    class Bar:
        def set_postfix(self, **values):
            shown.update(values)

    with log.RunLog(tmp_path) as run:
        pending = log.Pending(run, log.Meter(0, 4), Bar())
        pending.flush()
        pending.put(1, {"loss": jnp.float32(0.5)})
        assert rows(tmp_path) == []
        pending.flush()
        pending.put(2, {"loss": jnp.float32(0.25)})
        pending.put(3, {"loss": jnp.float32(jnp.nan)})
        pending.flush()
        pending.flush()
    found = rows(tmp_path)
    assert [(row["step"], row["loss"]) for row in found] == [(1, 0.5), (2, 0.25), (3, "nan")]
    assert {"samples_per_s", "step_s", "data_wait", "rss_mb", "wall_s"} < set(found[0])
    assert "step 3: the loss is nan" in caplog.text
    assert shown["loss"] == "nan"
