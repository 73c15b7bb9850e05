"""What a run tells while it runs: JSON lines always, TensorBoard and wandb when asked.

`WORKDIR/log.jsonl` has one object a line; "kind" is "train" or "eval", "step" counts optimizer
steps done. A resumed run drops the lines beyond its checkpoint and writes them again, so that the
file always reads as one uninterrupted run.
"""

import json
import logging
import math
import os
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vla_jax.shipped import install_hint

logger = logging.getLogger(__name__)

FILE = "log.jsonl"


class LogError(RuntimeError):
    """A log that was asked for and cannot be written."""


def truncate(path: Path, step: int) -> int:
    """Keep the lines up to `step`, whole ones only; write beside, then rename.

    Returns:
        Lines dropped.
    """
    if not path.exists():
        return 0
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if _step(line) <= step]
    beside = path.with_suffix(".jsonl.tmp")
    beside.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    os.replace(beside, path)
    return len(lines) - len(kept)


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
        if not active:
            return
        workdir = Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        if tensorboard:
            self._board = _open_tensorboard(workdir / "tensorboard", step)
        if wandb:
            self._wandb = _open_wandb(wandb, workdir, config or {})
        dropped = truncate(workdir / FILE, step)
        if dropped:
            logger.info("log: dropped %d lines beyond step %d", dropped, step)
        self._file = (workdir / FILE).open("a", encoding="utf-8")

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
        self._file.write(json.dumps({"step": step, "kind": kind, **strict}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in scalars.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(scalars, step=step)

    def close(self) -> None:
        """Flush and close all writers."""
        if self._file is not None:
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
    return SummaryWriter(str(directory), purge_step=step + 1)


def _open_wandb(project: str, workdir: Path, config: Mapping[str, Any]) -> Any:
    try:
        import wandb  # type: ignore[import-not-found]
    except ImportError as error:
        hint = install_hint("log")
        raise LogError(f"train.wandb: wandb is not installed; {hint}") from error
    name = workdir.absolute().name
    # The same id after a restart makes wandb go on with the run.
    return wandb.init(
        project=project, name=name, id=name, resume="allow", dir=str(workdir), config=dict(config)
    )


class Meter:
    """Wall time and data waiting between two rows of the log.

    Args:
        step: optimizer steps done so far.
        batch_size: samples a step.
    """

    def __init__(self, step: int, batch_size: int):
        self._batch_size = batch_size
        self._began = time.perf_counter()
        self._waited = 0.0
        self._step, self._since = step, self._began

    def waited(self, seconds: float) -> None:
        """Count time spent waiting for a batch."""
        self._waited += seconds

    def read(self, step: int) -> dict[str, float]:
        """Values of the steps since the last reading or pause, now that `step` is finished.

        Returns:
            "samples_per_s", "step_s", "data_wait" (share of the time), "rss_mb", "wall_s" (since
            this process began to train).
        """
        span = max(time.perf_counter() - self._since, 1e-9)
        steps = max(step - self._step, 1)
        row = {
            "samples_per_s": self._batch_size * steps / span,
            "step_s": span / steps,
            "data_wait": min(1.0, self._waited / span),
            "rss_mb": rss_mb(),
            "wall_s": self._since + span - self._began,
        }
        self.pause(step)
        return row

    def pause(self, step: int) -> None:
        """Leave out what happened since the last reading (evaluation, saving)."""
        self._step, self._since, self._waited = step, time.perf_counter(), 0.0


class Pending:
    """The row of a step that the device may still be computing.

    It is written after the next step has been dispatched, so that reading it idles no device.

    Args:
        rows: where to.
        meter: supplies the times.
        bar: a tqdm bar to show the loss on.
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
        # A dataset that the step had no window of has no loss.
        absent = [k for k, v in values.items() if k.startswith("loss/") and math.isnan(v)]
        values = {k: v for k, v in values.items() if k not in absent}
        if not math.isfinite(values["loss"]):
            logger.warning("step %d: the loss is %s", step, values["loss"])
        self._rows.write(step, "train", {**values, **self._meter.read(step)})
        self._bar.set_postfix(loss=f"{values['loss']:.4g}", refresh=False)


def rss_mb() -> float:
    """Resident memory of this process in MB; its peak where the system tells no more."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / 1e6 if sys.platform == "darwin" else peak / 1e3
