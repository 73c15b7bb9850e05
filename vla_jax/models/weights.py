"""Weight maps: which foreign tensor is which of our parameters, in both directions.

A map is a list of `Weight` rows. A `{}` in the source name stands for the layer number; its
target then has a leading layer axis (scanned towers stack their layers). A target with a choice,
`attn/{q,k,v}/kernel`, names several parameters of ours that lie in one tensor of theirs.

Every transform is a pair: the second function gives back exactly what the first one took.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

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
    """Torch convolution [out, 3, *frames, p, p] -> ours [*frames, p * p * 3, out]."""
    # Our patches have their channels last, row and column before them.
    return x.transpose(*range(2, x.ndim), 1, 0).reshape(shape)


def _patch_back(x: np.ndarray) -> np.ndarray:
    side = round((x.shape[-2] // 3) ** 0.5)
    x = x.reshape(*x.shape[:-2], side, side, 3, x.shape[-1])
    return x.transpose(-1, -2, *range(x.ndim - 2))


def _flax_patch_back(x: np.ndarray) -> np.ndarray:
    side = round((x.shape[-2] // 3) ** 0.5)
    return x.reshape(side, side, 3, x.shape[-1])


def _linear_patch(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Linear layer over patches [out, 3 * p * p] -> ours [p * p * 3, out]."""
    side = round((x.shape[1] // 3) ** 0.5)
    return _patch(x.reshape(-1, 3, side, side), shape)


def _conv1d(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """GPT-2's Conv1D stores [in, out], as we do."""
    return x.reshape(shape)


def _conv1d_back(contract: int) -> Callable[[np.ndarray], np.ndarray]:
    def back(x: np.ndarray) -> np.ndarray:
        return x.reshape(int(np.prod(x.shape[:contract])), -1)

    return back


# kind -> (theirs -> ours given our shape, ours -> theirs)
TRANSFORMS: dict[str, tuple[Callable[..., np.ndarray], Callable[[np.ndarray], np.ndarray]]] = {
    "same": (lambda x, shape: x.reshape(shape), lambda x: x),
    "flat": (lambda x, shape: x.reshape(shape), lambda x: x.reshape(-1)),
    "linear": (_linear, _linear_back(1)),
    "linear_from_heads": (_linear, _linear_back(2)),
    "conv1d": (_conv1d, _conv1d_back(1)),
    "conv1d_from_heads": (_conv1d, _conv1d_back(2)),
    "patch": (_patch, _patch_back),
    "linear_patch": (_linear_patch, lambda x: _patch_back(x).reshape(x.shape[-1], -1)),
    # Torch's convolutions are [out, in, p, p], ours [p, p, in, out].
    "convolution": (lambda x, shape: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1)),
    # Flax: convolutions [p, p, 3, out]; gemma's einsums with the heads before the width.
    "flax_patch": (lambda x, shape: x.reshape(shape), _flax_patch_back),
    "heads_first": (lambda x, shape: x.transpose(1, 0, 2), lambda x: x.transpose(1, 0, 2)),
    "leading_1": (lambda x, shape: x.reshape(shape), lambda x: x[None]),
    "leading_1_1": (lambda x, shape: x.reshape(shape), lambda x: x[None, None]),
}


def _split(kind: str, axis: int) -> tuple[Callable, Callable]:
    """Parts one after the other along `axis` of theirs, each then like `kind`."""
    forward, back = TRANSFORMS[kind]

    def split(x: np.ndarray, shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
        # A broadcast zero has the shape of a tensor and costs no memory.
        sizes = [back(np.broadcast_to(np.int8(0), shape)).shape[axis] for shape in shapes]
        parts = np.split(x, np.cumsum(sizes)[:-1], axis=axis)
        return [forward(part, shape) for part, shape in zip(parts, shapes, strict=True)]

    def join(parts: Sequence[np.ndarray]) -> np.ndarray:
        return np.concatenate([back(part) for part in parts], axis=axis)

    return split, join


def _interleave(kind: str) -> tuple[Callable, Callable]:
    """GPT-NeoX: theirs is [heads, parts, head width, ...]; the parts alternate head by head."""
    forward, back = TRANSFORMS[kind]

    def split(x: np.ndarray, shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
        # Kernels [in, heads, width] and biases [heads, width] both end so.
        heads, width = shapes[0][-2:]
        x = x.reshape(heads, len(shapes), width, *x.shape[1:])
        return [
            forward(x[:, i].reshape(heads * width, *x.shape[3:]), shape)
            for i, shape in enumerate(shapes)
        ]

    def join(parts: Sequence[np.ndarray]) -> np.ndarray:
        heads, width = parts[0].shape[-2:]
        flat = [back(part) for part in parts]
        # Empty for biases, the inputs' width for matrices.
        inner_shape = flat[0].shape[1:]
        stacked = np.stack([part.reshape(heads, width, *inner_shape) for part in flat], axis=1)
        return stacked.reshape(heads * len(parts) * width, *inner_shape)

    return split, join


def _parts(kind: str) -> tuple[Callable, Callable]:
    """Theirs is [parts, ...], each then like `kind`."""
    forward, back = TRANSFORMS[kind]

    def split(x: np.ndarray, shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
        return [forward(part, shape) for part, shape in zip(x, shapes, strict=True)]

    def join(parts: Sequence[np.ndarray]) -> np.ndarray:
        return np.stack([back(part) for part in parts])

    return split, join


# kind -> (theirs -> ours given our shapes, ours -> theirs), for targets with a choice
FUSED: dict[str, tuple[Callable[..., list[np.ndarray]], Callable[..., np.ndarray]]] = {
    "flat": _split("flat", 0),
    "linear": _split("linear", 0),
    "conv1d": _split("conv1d", 1),
    "interleaved_flat": _interleave("flat"),
    "interleaved_linear": _interleave("linear"),
    "parts": _parts("same"),
    "parts_of_heads": _parts("heads_first"),
}


@dataclass(frozen=True)
class Weight:
    """One row of a weight map.

    Attributes:
        source: their name.
        target: our path, or several, as `attn/{q,k,v}/kernel`.
        kind: a key of TRANSFORMS, or of FUSED where the target has several paths.
        alias: a second name of a tensor another row loads (a tied head): on import it is checked
            to be equal, on export it is written again.
        first: layer number of the first entry of the stack.
        step: layers from one entry of the stack to the next.
    """

    source: str
    target: str
    kind: str = "same"
    alias: bool = False
    first: int = 0
    step: int = 1

    @property
    def targets(self) -> tuple[str, ...]:
        """Our paths."""
        match = re.fullmatch(r"(.*)\{(.*)\}(.*)", self.target)
        if not match:
            return (self.target,)
        before, choices, after = match.groups()
        return tuple(before + choice + after for choice in choices.split(","))

    @property
    def stacked(self) -> bool:
        """Whether the target has a leading layer axis."""
        return "{}" in self.source

    def expand(self, layers: int) -> list[str]:
        """Source names of all layers, or the one name."""
        if not self.stacked:
            return [self.source]
        return [self.source.format(self.first + self.step * i) for i in range(layers)]

    def split(self, x: np.ndarray, shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
        """Their tensor (of one layer) -> ours, one for each target."""
        if len(shapes) == 1:
            return [TRANSFORMS[self.kind][0](x, shapes[0])]
        return FUSED[self.kind][0](x, shapes)

    def join(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """Inverse of `split`."""
        return TRANSFORMS[self.kind][1](parts[0]) if len(parts) == 1 else FUSED[self.kind][1](parts)


def prefixed(rows: Iterable[Weight], source: str, target: str) -> list[Weight]:
    """The same rows with both names prefixed."""
    return [replace(r, source=source + r.source, target=target + r.target) for r in rows]


def moved(rows: Iterable[Weight], old: str, new: str) -> list[Weight]:
    """`new` in place of `old` where a source name begins with it; other names stay."""
    return [
        replace(r, source=new + r.source.removeprefix(old)) if r.source.startswith(old) else r
        for r in rows
    ]


def with_aliases(rows: Sequence[Weight], roots: Iterable[str]) -> list[Weight]:
    """A part that is registered under several names: of all but the first, every row an alias."""
    return [
        replace(row, source=root + row.source, alias=row.alias or i > 0)
        for i, root in enumerate(roots)
        for row in rows
    ]


def pair(source: str, target: str, kind: str = "linear", bias: bool = True) -> list[Weight]:
    """Weight and bias of a linear layer: `source.weight/.bias` -> `target/kernel, /bias`."""
    rows = [Weight(source + ".weight", target + "/kernel", kind)]
    if bias:
        # A bias is laid out as its matrix is.
        flat = "interleaved_flat" if kind.startswith("interleaved") else "flat"
        rows.append(Weight(source + ".bias", target + "/bias", flat))
    return rows


def norm(source: str, target: str, bias: bool = True) -> list[Weight]:
    """Weight and bias of a norm."""
    rows = [Weight(source + ".weight", target + "/scale")]
    return [*rows, Weight(source + ".bias", target + "/bias")] if bias else rows


def attention(
    source: str, target: str, out: str = "out_proj", bias: bool = True, out_bias: bool = True
) -> list[Weight]:
    """q, k, v and output projections of an attention with separate matrices."""
    rows = []
    for letter in "qkv":
        rows += pair(f"{source}.{letter}_proj", f"{target}/{letter}", bias=bias)
    return rows + pair(f"{source}.{out}", f"{target}/o", "linear_from_heads", out_bias)


def multihead(source: str, target: str) -> list[Weight]:
    """torch.nn.MultiheadAttention, whose q, k and v are one `in_proj_weight`."""
    return [
        Weight(source + ".in_proj_weight", target + "/{q,k,v}/kernel", "linear"),
        Weight(source + ".in_proj_bias", target + "/{q,k,v}/bias", "flat"),
        *pair(source + ".out_proj", target + "/o", "linear_from_heads"),
    ]


@dataclass(frozen=True)
class KeyReport:
    """Everything wrong with a set of foreign names, at once.

    `changed` (types) and `unused` (names that carry nothing) are no faults: they are told beside
    faults, and do not make the report true.
    """

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    misshaped: tuple[str, ...] = ()
    unequal: tuple[str, ...] = ()
    mistyped: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return any((self.missing, self.unexpected, self.misshaped, self.unequal, self.mistyped))

    def __str__(self) -> str:
        groups = {
            "missing": self.missing,
            "unexpected": self.unexpected,
            "of the wrong shape": self.misshaped,
            "of a type that is not floating point": self.mistyped,
            "aliases that differ from their original": self.unequal,
            "of a type that would change": self.changed,
            "unused, they carry nothing": self.unused,
        }
        lines = []
        for title, names in groups.items():
            if names:
                lines += [f"{len(names)} {title}:", *(f"  {n}" for n in names)]
        return "\n".join(lines)


class WeightError(ValueError):
    """Foreign weights that do not fit the model; the message is the whole key report."""


def ignored(name: str, patterns: Iterable[str]) -> bool:
    """Whether one of the regexes is found in a name."""
    return any(re.search(pattern, name) for pattern in patterns)


def check(
    rows: Iterable[Weight],
    ours: Mapping[str, tuple[int, ...]],
    source_shapes: Mapping[str, tuple[int, ...]],
    ignore: Iterable[str] = (),
) -> KeyReport:
    """Compare names and shapes without reading a byte of weights.

    Args:
        rows: the weight map.
        ours: our path -> shape (layer axis first where stacked).
        source_shapes: their name -> shape, as in a checkpoint.
        ignore: regexes of their names that carry nothing (buffers).

    Returns:
        The report; false when every name is consumed exactly once with the right shape and every
        parameter of ours is covered.
    """
    missing, misshaped, consumed, covered = [], [], set(), set()
    for row in rows:
        absent = [path for path in row.targets if path not in ours]
        if absent:
            missing += [f"(ours) {path}: the map names it, the model lacks it" for path in absent]
            continue
        shapes = [ours[path] for path in row.targets]
        layer_shapes = [shape[1:] if row.stacked else shape for shape in shapes]
        # A broadcast zero has the shape of a tensor and costs no memory.
        expected = row.join([np.broadcast_to(np.int8(0), shape) for shape in layer_shapes]).shape
        if not row.alias:
            # An alias fills nothing of its own, so it may name a path again.
            twice = covered.intersection(row.targets)
            misshaped += [f"(ours) {path}: mapped twice" for path in sorted(twice)]
            covered.update(row.targets)
        # A scalar is never stacked, so its number of layers does not matter.
        for name in row.expand(shapes[0][0] if shapes[0] else 0):
            # Two rows that read one tensor are a mistake in the map.
            if name in consumed:
                misshaped.append(f"{name}: consumed twice")
            consumed.add(name)
            # An alias may be absent: many checkpoints store a tied matrix once.
            if name not in source_shapes:
                if not row.alias:
                    missing.append(f"{name} {list(expected)}")
            elif tuple(source_shapes[name]) != expected:
                misshaped.append(f"{name}: {list(source_shapes[name])}, expected {list(expected)}")
    missing += [
        f"(ours) {path}: no row of the map fills it" for path in ours if path not in covered
    ]
    unexpected = [
        name for name in source_shapes if name not in consumed and not ignored(name, ignore)
    ]
    return KeyReport(tuple(missing), tuple(unexpected), tuple(misshaped))


def to_ours(
    row: Weight, ours: Mapping[str, tuple[int, ...]], read: Callable[[str], np.ndarray]
) -> dict[str, np.ndarray]:
    """The parameters of a row, read through `read(name)`; layers are stacked into one array.

    Args:
        row: of the weight map.
        ours: our path -> shape, the row's targets among them.
        read: their name -> array.

    Returns:
        Our path -> array.
    """
    shapes = [ours[path] for path in row.targets]
    if not row.stacked:
        return dict(zip(row.targets, row.split(read(row.source), shapes), strict=True))
    layer_shapes = [shape[1:] for shape in shapes]
    stacks: list[np.ndarray] = []
    for i, name in enumerate(row.expand(shapes[0][0])):
        # Layers are read one at a time: only one of theirs is in memory beside the stack.
        parts = row.split(read(name), layer_shapes)
        if not stacks:
            # Allocated once for all layers: a list that is stacked at the end would hold everything
            # twice.
            stacks = [np.empty(s, p.dtype) for s, p in zip(shapes, parts, strict=True)]
        for stack, part in zip(stacks, parts, strict=True):
            stack[i] = part
    return dict(zip(row.targets, stacks, strict=True))
