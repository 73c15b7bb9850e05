import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from vla_jax.train import log
from vla_jax.train.meter import Meter


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


def test_rows_are_written_late_but_in_order(tmp_path):
    shown = {}

    class Bar:
        def set_postfix(self, values, refresh):
            shown.update(values)

    with log.RunLog(tmp_path) as run:
        pending = log.Pending(run, Meter(0, 4), Bar())
        pending.flush()
        pending.put(1, {"loss": jnp.float32(0.5)})
        assert rows(tmp_path) == []
        pending.flush()
        pending.put(2, {"loss": jnp.float32(0.25)})
        pending.put(3, {"loss": jnp.float32(jnp.nan), "skipped": jnp.float32(1)})  # has its own row
        pending.flush()
        pending.put(4, {"loss": jnp.float32(2.0), "skipped": jnp.float32(0)})
        pending.flush()
        pending.flush()
    result = rows(tmp_path)
    assert [(row["step"], row["loss"]) for row in result] == [(1, 0.5), (2, 0.25), (4, 2.0)]
    assert {"samples_per_s_per_device", "mfu", "step_s", "rss_mb", "wall_s"} < set(result[0])
    assert "skipped" not in result[2]
    assert shown == {"loss": "2", "samples/s": f"{result[2]['samples_per_s']:.4g}"}


class Full:
    """A file on a disk that has room for so many bytes more."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, text):
        if not self.room:
            raise OSError(28, "No space left on device")
        written = self.file.write(text[: self.room])
        self.room -= written
        return written

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_a_full_disk_delays_rows_and_leaves_none_by_halves(tmp_path, caplog):
    with log.RunLog(tmp_path) as run:
        run.write(1, "train", {"loss": 1.0})
        full = Full(run._file, room=10)
        run._file = full  # type: ignore[assignment]
        run.write(2, "train", {"loss": 2.0})  # 10 bytes of it fit
        run.write(3, "train", {"loss": 3.0})
        assert [row["step"] for row in rows(tmp_path)] == [1]
        full.room = 10_000
        run.write(4, "train", {"loss": 4.0})
        assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4]
    assert caplog.text.count("No space left on device; its rows are kept") == 1


def test_what_a_resumed_run_does_again_is_measured(tmp_path):
    with log.RunLog(tmp_path) as run:
        for step in (10, 20, 25):
            run.write(step, "train", {"loss": 1.0, "step_s": 2.0})
        run.write(25, "eval", {"l1": 1.0})
    with log.RunLog(tmp_path, step=15) as run:
        assert run.lost_seconds == 2.0 * 10
