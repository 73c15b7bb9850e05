"""Where a run's time goes: the share that went into steps, and what the rest went into."""

import contextlib
import json
import logging
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FILE = "goodput.jsonl"
PARTS = ("start", "compile", "data", "checkpoint", "evaluation", "lost")

logger = logging.getLogger(__name__)


class Goodput:
    """A stopwatch of one process's life, from now on."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._seconds: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def spent(self, part: str) -> Iterator[None]:
        """Count the time of a block as one of `PARTS`; blocks do not nest."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(part, time.perf_counter() - began)

    def add(self, part: str, seconds: float) -> None:
        """Count time as one of `PARTS`.

        "lost" is that of steps which an earlier life of the run did and this one does again; it
        counts on top of this process's own time.
        """
        self._seconds[part] += seconds

    def started(self) -> None:
        """All time up to now was the start: reading the config, the data's index, the weights."""
        # "lost" is time of an earlier process: none of this one's went into it.
        counted = sum(seconds for part, seconds in self._seconds.items() if part != "lost")
        self.add("start", time.perf_counter() - self._began - counted)

    def read(self) -> dict[str, float]:
        """Seconds of each part, of "steps" (the rest), in "total", and "goodput", steps / total."""
        parts = {part: self._seconds[part] for part in PARTS}
        total = time.perf_counter() - self._began + parts["lost"]
        # Steps are what nothing else accounts for: the host does not wait for each of them.
        steps = max(0.0, total - sum(parts.values()))
        return {"goodput": steps / total if total else 0.0, "total": total, "steps": steps, **parts}

    def report(self, workdir: Path, first: int, last: int) -> None:
        """Log the figures, and append them to `WORKDIR/goodput.jsonl`.

        Args:
            workdir: of the run.
            first: optimizer steps done when this process began.
            last: optimizer steps done now.
        """
        figures = self.read()
        listing = ", ".join(f"{part} {figures[part]:.1f} s" for part in PARTS)
        logger.info(
            "goodput %.1f %%: %.1f s of steps in %.1f s (steps %d to %d); %s",
            100 * figures["goodput"], figures["steps"], figures["total"], first, last, listing,
        )  # fmt: skip
        row: dict[str, Any] = {"first": first, "last": last, **figures}
        try:
            # Every life of the run adds its own row to those of earlier ones.
            with (workdir / FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:  # the run itself is done
            logger.warning("%s: %s", workdir / FILE, error.strerror)
