"""What is wrong with the steps of one run: read once, and the same answer on every process."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from vla_jax.train import checkpoint_folder


class Inspection:
    """Remembers what was found, as the checksums of large weights take minutes to compare.

    Args:
        directory: folder of checkpoints.
        alone: this process reads everything and asks no other; else the processes of a run share
            the reading, and all must ask.
    """

    def __init__(self, directory: Path, alone: bool):
        self._directory, self._alone = directory, alone or jax.process_count() == 1
        self._problems: dict[tuple[int, str], list[str]] = {}

    def problems(self, step: int, items: Iterable[str]) -> list[str]:
        """What is wrong with these items of a step, one line each; [] if nothing is."""
        return [line for item in items for line in self._of(step, item)]

    def forget(self, step: int, items: Sequence[str]) -> None:
        """Look again the next time: the step may be written anew."""
        for item in items:
            self._problems.pop((step, item), None)

    def _of(self, step: int, item: str) -> list[str]:
        if (step, item) not in self._problems:
            part = (0, 1) if self._alone else (jax.process_index(), jax.process_count())
            problems = checkpoint_folder.damage(self._directory / str(step), [item], part)
            if not self._alone:
                # All processes must call a step damaged, or they would resume from different ones.
                counts = multihost_utils.process_allgather(np.array(len(problems)))
                problems = problems or ["damaged, as another process found"] * int(counts.any())
            self._problems[step, item] = problems
        return self._problems[step, item]
