"""The folder of checkpoints as files: what belongs in it, and which steps are whole."""

import json
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from vla_jax.config import FORMAT
from vla_jax.train import checksum

logger = logging.getLogger(__name__)

FOLDER = "checkpoints"
# What the item `meta` holds at least: without it a policy could not act.
META_KINDS = {"config": dict, "statistics": dict, "action_specs": dict, "tokenizer": str}
DAMAGED = "damaged"  # beside it: steps that a run found damaged and put aside


class CheckpointError(RuntimeError):
    """A checkpoint folder that cannot be used; the message says which and why."""


class DamagedError(CheckpointError):
    """A step whose files are not what was written; the message names them."""


class SaveError(CheckpointError):
    """A save that failed; what was saved before is whole."""


def locate(workdir: str | Path, read_only: bool) -> Path:
    """The folder of checkpoints of a workdir; for reading that folder itself will do.

    Raises:
        CheckpointError: there is none to read, or it holds something else.
    """
    workdir = Path(workdir).absolute()
    directory = workdir / FOLDER
    if read_only and not directory.is_dir():
        # The folder of checkpoints itself will do.
        if not workdir.is_dir():
            raise CheckpointError(f"{workdir}: no such folder")
        if not any(child.name.isdigit() for child in workdir.iterdir()):
            raise CheckpointError(f"{workdir}: holds neither {FOLDER}/ nor numbered steps")
        directory = workdir
    if directory.is_dir():
        foreign = sorted(c.name for c in directory.iterdir() if not _ours(c.name))
        # Old steps are deleted here, which must not cost somebody's other files.
        if foreign:
            raise CheckpointError(
                f"{directory}: holds {foreign[:5]}, which are not checkpoints of vla_jax; choose "
                "another --workdir"
            )
    return directory


def _ours(name: str) -> bool:
    # Orbax keeps metadata and temporary folders of its own beside the steps.
    return name.isdigit() or "orbax" in name or name == "metadata" or name.startswith((".", "_"))


def damage(step: Path, items: Sequence[str], part: tuple[int, int] = (0, 1)) -> list[str]:
    """What is wrong with these items of a step, one line each; [] if nothing is.

    Args:
        step: folder of the step.
        items: subfolders that must be there and as they were written.
        part: see `checksum.problems`.
    """
    missing = [item for item in items if not (step / item).is_dir()]
    if missing:
        return [f"lacks {missing}"]
    problems: list[str] = []
    for item in items:
        problems += checksum.problems(step / item, part)
        # Without checksums only parsing shows that a file was cut short.
        if item in ("data", "meta") and not problems:
            problems += _not_json(step / item)
    return problems


def _not_json(item: Path) -> list[str]:
    path = f"{item.name}/metadata"
    try:
        content = json.loads((item / "metadata").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return [f"{path}: {error}"]
    if not isinstance(content, dict):
        return [f"{path}: expected an object, found {type(content).__name__}"]
    # What a newer version wrote is whole, whatever it lacks; the format says why it is not read.
    is_readable = item.name == "meta" and content.get("format") in range(1, FORMAT + 1)
    kinds = META_KINDS if is_readable else {}
    return [
        f"{path}: {key} is missing or no {kind.__name__}"
        for key, kind in kinds.items()
        if not isinstance(content.get(key), kind)
    ]


def put_aside(step: Path) -> Path:
    """Move a damaged step out of the run's way, to `WORKDIR/damaged`; returns where it is now."""
    # Outside the folder of checkpoints, where every numbered folder counts as a step.
    shelf = step.parent.parent / DAMAGED
    shelf.mkdir(exist_ok=True)
    target, number = shelf / step.name, 1
    # A step may be damaged again after it was written anew; the earlier evidence stays.
    while target.exists():
        number += 1
        target = shelf / f"{step.name}-{number}"
    # A rename within the workdir is atomic and copies nothing.
    os.replace(step, target)
    return target


def remove_leftovers(directory: Path) -> None:
    """Remove what saves that failed have left; they may be what fills the disk."""
    for path in directory.glob("*.orbax-checkpoint-tmp*"):
        shutil.rmtree(path, ignore_errors=True)


def size_of(step: Path) -> int:
    """Bytes of all files of a step."""
    return sum(path.stat().st_size for path in step.rglob("*") if path.is_file())


def first_line(error: Exception) -> str:
    """What an error says, without the pages that some libraries add."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]
