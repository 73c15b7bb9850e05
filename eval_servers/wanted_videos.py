"""Which episodes are worth a video: the first success and the first failure of every task."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Iterable, Tuple

from eval_servers.row import FAILURE, SUCCESS, Row

OUTCOMES = (SUCCESS, FAILURE)


class WantedVideos:
    """Asks workers for the videos still wanted; a second one of a kind, made meanwhile, goes."""

    def __init__(self, out_dir: str, per_task: int, rows: Iterable[Row]) -> None:
        """Go on from `rows`; `per_task` is at most one of every outcome, 0 for no videos."""
        self._out_dir, self._per_task = out_dir, per_task
        self._have = {(row.task, row.result) for row in rows if row.video}

    def wanted(self, task: str) -> Tuple[str, ...]:
        """Outcomes of the task that would be worth a video now."""
        # Asked before an episode runs: its outcome is unknown, so several workers may record one
        # kind.
        have = [kind for name, kind in self._have if name == task]
        if len(have) >= self._per_task:
            return ()
        return tuple(kind for kind in OUTCOMES if kind not in have)

    def path(self, index: int, task: str) -> str:
        """Return the path of an episode's video."""
        name = "{:04d}_{}.webp".format(index, task.replace(os.sep, "_"))
        return os.path.join(self._out_dir, "videos", name)

    def settle(self, row: Row) -> Row:
        """The row as it is stored: its video relative to the run's folder, or removed."""
        if row.video is None:
            return row
        # Another worker delivered this kind first.
        if row.result not in self.wanted(row.task):
            os.remove(row.video)
            return replace(row, video=None)
        self._have.add((row.task, row.result))
        return replace(row, video=os.path.relpath(row.video, self._out_dir))
