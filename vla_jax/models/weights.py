"""Weight maps: which foreign tensor is which of our parameters, in both directions.

A map is a list of `Weight` rows. A `{}` in the source name stands for the layer number; its
target then has a leading layer axis (scanned towers stack their layers).
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np


def _linear(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Torch [out, in] -> ours [*in, *out]."""
    return x.T.reshape(shape)


def _linear_back(contract: int) -> Callable[[np.ndarray], np.ndarray]:
    def back(x: np.ndarray) -> np.ndarray:
        inputs = int(np.prod(x.shape[:contract]))
        return x.reshape(inputs, -1).T

    return back


def _patch(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Torch convolution [out, 3, p, p] -> ours [p * p * 3, out]."""
    return x.transpose(2, 3, 1, 0).reshape(shape)


def _patch_back(x: np.ndarray) -> np.ndarray:
    side = round((x.shape[0] // 3) ** 0.5)
    return x.reshape(side, side, 3, -1).transpose(3, 2, 0, 1)


# kind -> (theirs -> ours given our shape, ours -> theirs)
TRANSFORMS: dict[str, tuple[Callable[..., np.ndarray], Callable[[np.ndarray], np.ndarray]]] = {
    "same": (lambda x, shape: x.reshape(shape), lambda x: x),
    "flat": (lambda x, shape: x.reshape(shape), lambda x: x.reshape(-1)),
    "linear": (_linear, _linear_back(1)),
    "linear_from_heads": (_linear, _linear_back(2)),
    "patch": (_patch, _patch_back),
}


@dataclass(frozen=True)
class Weight:
    """One row: `source` (their name), `target` (our path), `kind` (a key of TRANSFORMS).

    `alias` marks a second name of a tensor another row loads (a tied head): on import it is
    checked to be equal, on export it is written again.
    """

    source: str
    target: str
    kind: str = "same"
    alias: bool = False

    def expand(self, layers: int) -> list[str]:
        """Source names of all layers, or the one name."""
        if "{}" not in self.source:
            return [self.source]
        return [self.source.format(i) for i in range(layers)]


def prefixed(rows: Iterable[Weight], source: str, target: str) -> list[Weight]:
    """The same rows with both names prefixed."""
    return [Weight(source + r.source, target + r.target, r.kind, r.alias) for r in rows]


def pair(source: str, target: str, kind: str = "linear") -> list[Weight]:
    """Weight and bias of a linear layer: `source.weight/.bias` -> `target/kernel, /bias`."""
    return [
        Weight(source + ".weight", target + "/kernel", kind),
        Weight(source + ".bias", target + "/bias", "flat"),
    ]


def norm(source: str, target: str) -> list[Weight]:
    """Weight and bias of a LayerNorm."""
    return [
        Weight(source + ".weight", target + "/scale"),
        Weight(source + ".bias", target + "/bias"),
    ]


def attention(source: str, target: str, out: str = "out_proj") -> list[Weight]:
    """q, k, v and output projections of an attention with separate matrices."""
    rows = []
    for letter in "qkv":
        rows += pair(f"{source}.{letter}_proj", f"{target}/{letter}")
    return rows + pair(f"{source}.{out}", f"{target}/o", "linear_from_heads")


@dataclass(frozen=True)
class KeyReport:
    """Everything wrong with a set of foreign names, at once."""

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    misshaped: tuple[str, ...] = ()
    unequal: tuple[str, ...] = ()
    mistyped: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return any((self.missing, self.unexpected, self.misshaped, self.unequal, self.mistyped))

    def __str__(self) -> str:
        groups = {
            "missing": self.missing,
            "unexpected": self.unexpected,
            "of the wrong shape": self.misshaped,
            "of a type that is not floating point": self.mistyped,
            "aliases that differ from their original": self.unequal,
        }
        lines = []
        for title, names in groups.items():
            if names:
                lines += [f"{len(names)} {title}:", *(f"  {n}" for n in names)]
        return "\n".join(lines)


class WeightError(ValueError):
    """Foreign weights that do not fit the model; the message is the whole key report."""


def check(
    rows: Iterable[Weight],
    ours: Mapping[str, tuple[int, ...]],
    theirs: Mapping[str, tuple[int, ...]],
    ignore: Iterable[str] = (),
) -> KeyReport:
    """Compare names and shapes without reading a byte of weights.

    Args:
        rows: the weight map.
        ours: our path -> shape (layer axis first where stacked).
        theirs: their name -> shape, as in a checkpoint.
        ignore: regexes of their names that carry nothing (buffers).

    Returns:
        The report; false when every name is consumed exactly once with the right shape and every
        parameter of ours is covered.
    """
    missing, misshaped, seen, covered = [], [], set(), set()
    for row in rows:
        if row.target not in ours:
            missing.append(f"(ours) {row.target}: the map names it, the model lacks it")
            continue
        shape = ours[row.target]
        stacked = "{}" in row.source
        one = shape[1:] if stacked else shape
        back = TRANSFORMS[row.kind][1]
        expected = back(np.broadcast_to(np.zeros((), np.int8), one)).shape
        if not row.alias:
            if row.target in covered:
                misshaped.append(f"(ours) {row.target}: mapped twice")
            covered.add(row.target)
        for name in row.expand(shape[0]):
            if name in seen:
                misshaped.append(f"{name}: consumed twice")
            seen.add(name)
            if name not in theirs:
                if not row.alias:
                    missing.append(f"{name} {list(expected)}")
            elif tuple(theirs[name]) != expected:
                misshaped.append(f"{name}: {list(theirs[name])}, expected {list(expected)}")
    missing += [
        f"(ours) {path}: no row of the map fills it" for path in ours if path not in covered
    ]
    unexpected = [
        name
        for name in theirs
        if name not in seen and not any(re.search(pattern, name) for pattern in ignore)
    ]
    return KeyReport(tuple(missing), tuple(unexpected), tuple(misshaped))


def to_ours(row: Weight, shape: tuple[int, ...], read: Callable[[str], np.ndarray]) -> np.ndarray:
    """Read one parameter of ours through `read(name)`, stacking layers into one array."""
    forward = TRANSFORMS[row.kind][0]
    if "{}" not in row.source:
        return forward(read(row.source), shape)
    names = row.expand(shape[0])
    first = forward(read(names[0]), shape[1:])
    stacked = np.empty(shape, first.dtype)
    stacked[0] = first
    for i, name in enumerate(names[1:], start=1):
        stacked[i] = forward(read(name), shape[1:])
    return stacked


def to_theirs(row: Weight, value: np.ndarray) -> dict[str, np.ndarray]:
    """Inverse of `to_ours`: their name -> contiguous array."""
    back = TRANSFORMS[row.kind][1]
    if "{}" not in row.source:
        return {row.source: np.ascontiguousarray(back(value))}
    names = row.expand(value.shape[0])
    return {n: np.ascontiguousarray(back(value[i])) for i, n in enumerate(names)}
