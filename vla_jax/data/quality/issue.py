"""What a check of a dataset's quality says."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vla_jax.data.dataset import Dataset

_LISTED = 10  # episodes that a line names; the report has them all


@dataclass(frozen=True)
class Issue:
    """One thing that is wrong, where, and what to do about it.

    Attributes:
        check: which check found it, for machines: "camera_frozen", "state_jump", ...
        problem: what is wrong, a clause that the episodes complete.
        advice: what to do, a whole sentence.
        episodes: numbers of the episodes concerned, as they were recorded; () = the whole dataset.
        camera: its role, "" where none is concerned.
    """

    check: str
    problem: str
    advice: str
    episodes: tuple[int, ...] = ()
    camera: str = ""

    def line(self) -> str:
        """For people."""
        named = ", ".join(map(str, self.episodes[:_LISTED]))
        more = len(self.episodes) - _LISTED
        where = f" (episode {named}{f' and {more} more' if more > 0 else ''})" if named else ""
        return f"{self.problem}{where}. {self.advice}"


def recorded_numbers(dataset: Dataset, trajectories: Sequence[int]) -> tuple[int, ...]:
    """The trajectories' episode numbers as they were recorded."""
    episodes = dataset.in_source()[1][np.asarray(trajectories, np.int64)]
    return tuple(sorted(set(dataset.source.numbers[episodes].tolist())))
