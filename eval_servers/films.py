"""Which episodes are worth a video: the first success and the first failure of every task."""

from __future__ import annotations

import os
from typing import Any, Dict, Iterable, Tuple

OUTCOMES = ("success", "failure")


class Films:
    """Asks workers for the videos still wanted; a second one of a kind, made meanwhile, goes."""

    def __init__(self, out_dir: str, per_task: int, rows: Iterable[Dict[str, Any]]) -> None:
        """Go on from `rows`; `per_task` is at most one of every outcome, 0 for no videos."""
        self._out_dir, self._per_task = out_dir, per_task
        self._have = {(row["task"], outcome(row)) for row in rows if row.get("video")}

    def wanted(self, task: str) -> Tuple[str, ...]:
        """Outcomes of the task that would be worth a video now."""
        # Asked before an episode runs: its outcome is unknown, so several workers may film one
        # kind.
        have = [kind for name, kind in self._have if name == task]
        if len(have) >= self._per_task:
            return ()
        return tuple(kind for kind in OUTCOMES if kind not in have)

    def path(self, index: int, task: str) -> str:
        """Return the path of an episode's video."""
        name = "{:04d}_{}.webp".format(index, task.replace(os.sep, "_"))
        return os.path.join(self._out_dir, "videos", name)

    def settle(self, row: Dict[str, Any]) -> Dict[str, Any]:
        """The row as it is stored: its video relative to the run's folder, or removed."""
        path = row.get("video")
        if path is None:
            return row
        kind = outcome(row)
        # Another worker delivered this kind first.
        if kind not in self.wanted(row["task"]):
            os.remove(path)
            return dict(row, video=None)
        self._have.add((row["task"], kind))
        return dict(row, video=os.path.relpath(path, self._out_dir))


def outcome(row: Dict[str, Any]) -> str:
    """Return the one of `OUTCOMES` that the row is."""
    return OUTCOMES[0] if row["success"] else OUTCOMES[1]
