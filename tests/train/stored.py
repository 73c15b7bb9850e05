"""What lies in the checkpoints of a run that is not being trained."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vla_jax.train.checkpoint import Checkpoints


def load_meta(workdir: str | Path, step: int | None = None) -> dict[str, Any]:
    """`Checkpoints.meta` of a run that is not being trained here."""
    with Checkpoints(workdir, read_only=True) as checkpoints:
        return checkpoints.meta(step)


def load_params(
    workdir: str | Path, step: int | None = None, template: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """`Checkpoints.params` of a run that is not being trained here."""
    with Checkpoints(workdir, read_only=True) as checkpoints:
        return checkpoints.params(step, template)
