"""Weight maps run on arrays at hand, through the functions that conversions run."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from vla_jax.convert import maps
from vla_jax.convert.tensors import Lazy
from vla_jax.models import weights


class Arrays:
    """A `Source` of arrays in memory; counts how often each is read."""

    def __init__(self, arrays: Mapping[str, Any]):
        self._arrays = {name: np.asarray(x) for name, x in arrays.items()}
        self.shapes = {name: x.shape for name, x in self._arrays.items()}
        self.dtypes = {name: x.dtype for name, x in self._arrays.items()}
        self.reads: list[str] = []

    def read(self, name: str) -> np.ndarray:
        self.reads.append(name)
        return self._arrays[name]

    def place(self, name: str) -> str:
        return name


def to_ours(
    rows: Iterable[weights.Weight],
    shapes: maps.Shapes,
    theirs: Mapping[str, Any],
    ignore: Iterable[str] = (),
) -> dict[str, np.ndarray]:
    """Their arrays -> our flat tree."""
    leaves = maps.incoming(rows, shapes, Arrays(theirs), ignore).leaves
    return {path: leaf.read() for path, leaf in leaves.items()}


def to_theirs(row: weights.Weight, ours: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Our arrays of one row -> theirs; an alias is written as if it were an original."""
    arrays = {path: np.asarray(ours[path]) for path in row.targets}
    leaves = {path: Lazy(x.shape, x.dtype, lambda x=x: x) for path, x in arrays.items()}
    return dict(maps.outgoing([dataclasses.replace(row, alias=False)], leaves).tensors())


def restacked(rows: list[weights.Weight], ours: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Our arrays under their names, layers stacked again."""
    layers: dict[str, Any] = {}
    for row in rows:
        layers |= to_theirs(row, ours)
    stacks: dict[str, list[np.ndarray]] = {}
    for name, value in layers.items():
        stacks.setdefault(name.split("[")[0], []).append(value)
    return {k: np.stack(v) if f"{k}[0]" in layers else v[0] for k, v in stacks.items()}
