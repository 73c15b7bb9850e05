"""What a run tells while it runs: JSON lines always, TensorBoard and wandb when asked.

`WORKDIR/log.jsonl` has one object a line; "kind" is "train", "skipped" or "eval", "step" counts
optimizer steps done. A resumed run drops the lines beyond its checkpoint and writes them again, so
that the file always reads as one uninterrupted run.
"""

import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vla_jax.shipped import install_hint
from vla_jax.train.meter import Meter

logger = logging.getLogger(__name__)

FILE = "log.jsonl"


class LogError(RuntimeError):
    """A log that was asked for and cannot be written."""


def truncate(path: Path, step: int) -> tuple[int, float]:
    """Keep the lines up to `step`, whole ones only; write beside, then rename.

    Returns:
        Lines dropped, and seconds that the steps took which were logged in them.
    """
    if not path.exists():
        return 0, 0.0
    lines = path.read_text(encoding="utf-8").splitlines()
    remaining = [line for line in lines if _step(line) <= step]
    # A row's time is the mean over all steps since the row before it.
    lost, before = 0.0, float(step)
    for line in lines:
        if step < _step(line) < math.inf and "step_s" in (row := json.loads(line)):
            lost += max(0.0, row["step"] - before) * row["step_s"]
            before = row["step"]
    # A crash while writing must not cost the rows of the whole run.
    beside = path.with_suffix(".jsonl.tmp")
    beside.write_text("".join(f"{line}\n" for line in remaining), encoding="utf-8")
    os.replace(beside, path)
    return len(lines) - len(remaining), lost


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # the last line of a killed run
        return math.inf


class RunLog:
    """Writer of one run's rows; does nothing where `active` is False (processes but the first).

    Args:
        workdir: of the run.
        step: optimizer steps done; later rows of an earlier life are dropped.
        tensorboard: also write event files to `WORKDIR/tensorboard`.
        wandb: project to also write to; "" = none.
        config: nested dict, shown by wandb.
        active: whether this process writes.

    Attributes:
        lost_seconds: how long the steps took whose rows were dropped.

    Raises:
        LogError: if a writer that was asked for is not installed.
    """

    def __init__(
        self,
        workdir: str | Path,
        step: int = 0,
        tensorboard: bool = False,
        wandb: str = "",
        config: Mapping[str, Any] | None = None,
        active: bool = True,
    ):
        self._file = self._board = self._wandb = None
        self.lost_seconds = 0.0
        self._unwritten: list[bytes] = []  # rows that the disk has had no room for so far
        if not active:
            return
        workdir = Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        if tensorboard:
            self._board = _open_tensorboard(workdir / "tensorboard", step)
        if wandb:
            self._wandb = _open_wandb(wandb, workdir, config or {})
        dropped, self.lost_seconds = truncate(workdir / FILE, step)
        if dropped:
            logger.info("log: dropped %d lines beyond step %d", dropped, step)
        # Unbuffered: what the disk has refused must not be written a second time by a buffer.
        self._file = (workdir / FILE).open("ab", buffering=0)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def write(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        """One row. Numbers may be numpy or (finished) device scalars; lists stay lists."""
        if self._file is None:
            return
        row = {name: _plain(value) for name, value in values.items()}
        scalars = {f"{kind}/{k}": v for k, v in _scalars(row).items()}
        strict = {k: _strict(v) for k, v in row.items()}
        self._append(json.dumps({"step": step, "kind": kind, **strict}).encode() + b"\n")
        if self._board is not None:
            for name, value in scalars.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(scalars, step=step)

    def _append(self, line: bytes) -> None:
        """Write a line, whole or not at all; what cannot be written is kept for the next time."""
        assert self._file is not None
        # One warning when the disk fills up, not one at every row.
        was_full = bool(self._unwritten)
        self._unwritten.append(line)
        end = self._file.seek(0, os.SEEK_END)
        text = b"".join(self._unwritten)
        try:
            done = self._file.write(text)
            if done == len(text):
                self._unwritten.clear()
                return
            reason = "No space left on device"
        except OSError as error:
            reason = error.strerror or str(error)
        # Half a line, with the next one behind it, would be no JSON.
        self._file.truncate(end)
        if not was_full:
            logger.warning("%s: %s; its rows are kept until there is room", FILE, reason)

    def close(self) -> None:
        """Flush and close all writers."""
        if self._file is not None:
            if self._unwritten:
                # There may be room by now; the empty line makes it try again.
                self._append(b"")
            if self._unwritten:
                logger.warning("%s: the last %d rows are lost", FILE, len(self._unwritten) - 1)
            self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()
        self._file = self._board = self._wandb = None


def _plain(value: Any) -> Any:
    return np.asarray(value).tolist() if hasattr(value, "dtype") else value


def _scalars(row: Mapping[str, Any]) -> dict[str, int | float]:
    """The numbers of a row; those of a list under its name and their place."""
    numbers = {name: value for name, value in row.items() if isinstance(value, (int, float))}
    for name, value in row.items():
        if isinstance(value, list):
            numbers |= {f"{name}/{i}": x for i, x in enumerate(value) if isinstance(x, float)}
    return numbers


def _strict(value: Any) -> Any:
    """JSON has no NaN or infinity: they are written as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return [_strict(v) for v in value] if isinstance(value, list) else value


def _open_tensorboard(directory: Path, step: int) -> Any:
    try:
        from tensorboardX import SummaryWriter  # type: ignore[import-not-found]
    except ImportError as error:
        raise LogError(
            f"train.tensorboard: tensorboardX is not installed; {install_hint('log')}"
        ) from error
    # TensorBoard then hides what an earlier life of the run wrote beyond this step.
    return SummaryWriter(str(directory), purge_step=step + 1)


def _open_wandb(project: str, workdir: Path, config: Mapping[str, Any]) -> Any:
    try:
        import wandb  # type: ignore[import-not-found]
    except ImportError as error:
        hint = install_hint("log")
        raise LogError(f"train.wandb: wandb is not installed; {hint}") from error
    # A relative workdir such as "." has no name of its own.
    name = workdir.absolute().name
    # The same id after a restart makes wandb go on with the run.
    return wandb.init(
        project=project, name=name, id=name, resume="allow", dir=str(workdir), config=dict(config)
    )


class Pending:
    """The row of a step that the device may still be computing.

    It is written after the next step has been dispatched, so that reading it idles no device.

    Args:
        rows: where to.
        meter: supplies the times.
        bar: a tqdm bar to show the loss and the speed on.
    """

    def __init__(self, rows: RunLog, meter: Meter, bar: Any):
        self._rows, self._meter, self._bar = rows, meter, bar
        self._held: tuple[int, Mapping[str, Any]] | None = None

    def put(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Hold the metrics (device scalars) of a step; an earlier row goes out first."""
        self.flush()
        self._held = step, metrics

    def flush(self) -> None:
        """Write the row that is held, if there is one; waits for its step."""
        if self._held is None:
            return
        (step, metrics), self._held = self._held, None
        values = {name: float(value) for name, value in metrics.items()}
        if values.pop("skipped", 0.0):  # it has a row of its own, see `finite.SkippedSteps`
            return
        # A dataset that the step had no window of has no loss.
        absent = [k for k, v in values.items() if k.startswith("loss/") and math.isnan(v)]
        values = {k: v for k, v in values.items() if k not in absent}
        speed = self._meter.read(step)
        self._rows.write(step, "train", {**values, **speed})
        # Behind the steps and the time that is left, which the bar knows by itself.
        shown = {"loss": f"{values['loss']:.4g}", "samples/s": f"{speed['samples_per_s']:.4g}"}
        self._bar.set_postfix(shown, refresh=False)
