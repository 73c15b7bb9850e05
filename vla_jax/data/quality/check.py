"""The quality of a dataset: all checks, over what `Dataset` shows of every format."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from vla_jax.data.dataset import Dataset
from vla_jax.data.quality import cameras, motion, texts
from vla_jax.data.quality.issue import Issue

FORMAT = 1  # of the report; raised when a key changes its meaning


@dataclass(frozen=True)
class Quality:
    """What was looked at and what is wrong.

    Attributes:
        issues: what is wrong, worst kind of evidence first: numbers, texts, pictures.
        looked_at: camera role -> episodes and frames whose pictures were looked at.
    """

    issues: list[Issue]
    looked_at: dict[str, dict[str, int]]

    def lines(self, episodes: int) -> list[str]:
        """How much was looked at, of `episodes`."""
        return [
            f"pictures of camera {role}: {counts['frames']} frames of {counts['episodes']} of "
            f"{episodes} episodes looked at"
            for role, counts in self.looked_at.items()
        ]


def check(dataset: Dataset, recorded_hz: float | None = None) -> Quality:
    """Looks at all numbers and texts, and at the pictures of some episodes.

    Args:
        dataset: opened, not normalized.
        recorded_hz: frames a second as the dataset's own files say it, if they do.
    """
    issues = [
        *motion.jumps(dataset),
        *motion.gripper(dataset),
        *motion.rate(dataset, recorded_hz),
        *motion.near_duplicates(dataset),
        *texts.texts(dataset),
    ]
    looks = {}
    for role in dataset.image_sizes:
        looks[role], unreadable = cameras.look(dataset, role)
        issues += unreadable
    # A picture that stands still is a fault only while the robot moves.
    issues += cameras.check(dataset, looks, motion.speeds(dataset))
    looked_at = {
        role: {"episodes": len(role_looks), "frames": sum(len(x.cells) for x in role_looks)}
        for role, role_looks in looks.items()
    }
    return Quality(issues, looked_at)


def write_report(path: Path, dataset: Dataset, quality: Quality, warnings: Sequence[str]) -> None:
    """Writes what was found as JSON, for machines: whole, or as the file was before.

    Keys: format, dataset, folder, episodes, frames, looked_at, issues (the fields of `Issue`), and
    warnings (sentences about statistics, as printed).
    """
    content = {
        "format": FORMAT,
        "dataset": dataset.name,
        "folder": str(dataset.source.root),
        "episodes": len(dataset.lengths),
        "frames": len(dataset),
        "looked_at": quality.looked_at,
        "issues": [asdict(issue) for issue in quality.issues],
        "warnings": list(warnings),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
    os.replace(temporary, path)
