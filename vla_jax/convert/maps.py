"""Weight maps of whole checkpoints, and the strict step between names and our tree."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from vla_jax.config import ModelConfig
from vla_jax.models import weights as w
from vla_jax.models.backbones import BACKBONES
from vla_jax.models.heads import HEADS

Shapes = Mapping[str, tuple[int, ...]]


def hugging_face(config: ModelConfig) -> tuple[list[w.Weight], tuple[str, ...]]:
    """The VLM alone, under its Hugging Face names.

    Returns:
        The rows (targets from the root of our tree) and regexes of names to pass over.
    """
    file, _ = BACKBONES[config.backbone.name]
    return w.prefixed(file.weight_map(), "", "backbone/"), file.IGNORE


def robovlms(config: ModelConfig, prefix: str = "model.") -> tuple[list[w.Weight], tuple[str, ...]]:
    """A RoboVLMs checkpoint: backbone, action token and head.

    Args:
        config: the model.
        prefix: "model." in released files, "" in a bare state dict.
    """
    file, _ = BACKBONES[config.backbone.name]
    head, _ = HEADS[config.head.kind]
    rows = [
        *w.prefixed(file.weight_map(), prefix + "backbone.", "backbone/"),
        w.Weight(prefix + "action_token", "action_token"),
        *w.prefixed(head.weight_map(config.head), prefix + "act_head.", "head/"),
    ]
    return rows, file.IGNORE


def load(
    rows: Iterable[w.Weight],
    ours: Shapes,
    theirs: Shapes,
    read: Callable[[str], np.ndarray],
    place: Callable[[str, np.ndarray], Any] = lambda path, value: value,
    ignore: Iterable[str] = (),
) -> dict[str, Any]:
    """Foreign tensors -> our flat tree, one row of the map in host memory at a time.

    Args:
        rows: the weight map.
        ours: our path -> shape of the parameters to fill.
        theirs: their name -> shape.
        read: their name -> array.
        place: (our path, array) -> what to keep, e.g. the sharded device array.
        ignore: regexes of their names that carry nothing.

    Raises:
        WeightError: with the whole key report, before anything is read; or naming the aliases
            that differ from the tensor they should repeat.
    """
    rows = list(rows)
    report = w.check(rows, ours, theirs, ignore)
    if report:
        raise w.WeightError(str(report))
    unequal = tuple(
        row.source
        for row in rows
        if row.alias and row.source in theirs
        for original in rows
        if original.target == row.target
        and not original.alias
        and not np.array_equal(read(row.source), read(original.source))
    )
    if unequal:
        raise w.WeightError(str(w.KeyReport(unequal=unequal)))
    return {
        path: place(path, value)
        for row in rows
        if not row.alias
        for path, value in w.to_ours(row, ours, read).items()
    }
