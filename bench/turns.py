"""What the benches of a step share: sides in processes of their own that take turns.

A side prints one line of JSON when it is ready, and one for every line of its standard input, after
the steps of a turn. What the machine does otherwise falls on all sides alike.
"""

import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Turn = dict[str, Any]


class Step(NamedTuple):
    """One side's step, ready to run.

    Attributes:
        run: one step; returns its loss or its actions, which may still be on their way.
        value: waits for those, and makes one number of them.
        facts: about the side, told with every turn, as {"params": numbers that are trained}.
        device_gb: peak memory of the accelerator so far; None without one.
    """

    run: Callable[[], Any]
    value: Callable[[Any], float]
    facts: Mapping[str, Any]
    device_gb: Callable[[], float | None]


class Side:
    """A worker that steps when it is told to.

    Args:
        command: that starts it.
        env: variables that are set beside this process's own.
    """

    def __init__(self, command: Sequence[str | Path | int], env: Mapping[str, str] | None = None):
        self._process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **(env or {})},
        )

    def answer(self) -> Turn:
        """Of the turn it is in, or of its first one.

        Raises:
            RuntimeError: it ended, with which status.
        """
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"ended with status {self._process.wait()}")

    def turn(self) -> Turn:
        """Lets it do the steps of a turn; for errors see `answer`."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # what it ended with is told below
            print("turn", file=self._process.stdin, flush=True)
        return self.answer()

    def end(self) -> None:
        """Ends it after its turn."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()


def serve(step: Step, steps: int = 1) -> None:
    """A side's own loop: one turn at once, to compile and warm up, then one a line of the input."""
    for _ in iter(lambda: _turn(step, steps) and sys.stdin.readline(), ""):
        pass


def _turn(step: Step, steps: int) -> bool:
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    losses = [step.run() for _ in range(steps)]
    # The last one is there when all are, as each needs the parameters of the one before.
    loss = step.value(losses[-1])
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    system = after.ru_stime - before.ru_stime
    spent = {
        "wall_s": wall / steps,
        "cpu_s": (after.ru_utime - before.ru_utime + system) / steps,
        "system_s": system / steps,
        "faults": (after.ru_minflt - before.ru_minflt) / steps,
        "rss_mb": after.ru_maxrss / 1024,
        "device_gb": step.device_gb(),
        "loss": loss,
    }
    print(json.dumps({**step.facts, **spent}), flush=True)
    return True


def ratio(a: Sequence[Turn], b: Sequence[Turn], key: str) -> float:
    """Median ratio of a's turns to b's, each to the one next to it."""
    return statistics.median(x[key] / y[key] for x, y in zip(a, b, strict=True))
