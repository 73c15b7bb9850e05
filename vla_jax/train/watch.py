"""What a loop watches of its own steps: traces on request, and compilations that should not be."""

import contextlib
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

logger = logging.getLogger(__name__)

# jax's own event, of which it has no public name.
_COMPILED = "/jax/core/compile/backend_compile_duration"


class Recompilations:
    """Notices that a step was compiled which should have been compiled before.

    Each costs minutes at full size; the cause is a batch of another shape or type than the first.
    """

    def __init__(self) -> None:
        self._inside = False
        self._seconds: list[float] = []
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **_: Any) -> None:
        # Evaluation and saving compile their own programs, when they are first needed.
        if self._inside and event == _COMPILED and _is_main():
            self._seconds.append(duration_secs)

    @contextlib.contextmanager
    def step(self, number: int, since_start: int) -> Iterator[None]:
        """Around the call of one step; the second of a process is the last that may compile.

        Args:
            number: of the step in the run.
            since_start: of the step in this process, from one.
        """
        self._inside = True
        # Compilations of the step before must not count for this one.
        self._seconds.clear()
        try:
            yield
        finally:
            self._inside = False
        if self._seconds and since_start > 2:
            logger.error(
                "step %d: a fault: the step was compiled again (%d programs, %.1f s); a batch of "
                "another shape or type than before?",
                number, len(self._seconds), sum(self._seconds),
            )  # fmt: skip


def _is_main() -> bool:
    # The listener is called by the thread that compiles. Others may do so while a step is called,
    # and theirs are not the step's programs.
    return threading.current_thread() is threading.main_thread()


class Profile:
    """Traces some steps for XProf.

    Args:
        when: START:STEPS, the first step to trace and how many; "" = none.
        folder: where the trace goes; `xprof --logdir=FOLDER` or TensorBoard's plugin shows it.
    """

    def __init__(self, when: str, folder: Path):
        first, _, count = when.partition(":")
        self._steps = range(int(first), int(first) + int(count)) if when else range(0)
        self._folder, self._is_on = folder, False

    def before(self, step: int) -> None:
        """Call before each step."""
        if step in self._steps and not self._is_on:
            jax.profiler.start_trace(str(self._folder))
            self._is_on = True

    def after(self, step: int, metrics: Any) -> None:
        """Call after each step, with what it returned; the last one is waited for."""
        if self._is_on and step >= self._steps[-1]:
            # Dispatch returns early; the trace would otherwise end before the step does.
            jax.block_until_ready(metrics)
            self.close()
            logger.info("profile of steps up to %d: %s", step, self._folder)

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End a trace that a stopped run has left open."""
        if self._is_on:
            jax.profiler.stop_trace()
            self._is_on = False
