"""Weight maps of whole checkpoints, and the strict step between names and our tree."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from vla_jax.config import ModelConfig
from vla_jax.convert.tensors import Lazy, Source, floating, holds, promote, same_bytes
from vla_jax.models import weights as w
from vla_jax.models.backbones import BACKBONES
from vla_jax.models.backbones.base import Backbone
from vla_jax.models.heads import HEADS
from vla_jax.models.structures import find

Shapes = Mapping[str, tuple[int, ...]]


def hugging_face(config: ModelConfig) -> tuple[list[w.Weight], tuple[str, ...]]:
    """The VLM alone, under its Hugging Face names.

    Returns:
        The rows (targets from the root of our tree) and regexes of names to pass over.
    """
    backbone = _backbone(config)
    return w.prefixed(backbone.weight_map(), "", "backbone/"), backbone.IGNORE


def _backbone(config: ModelConfig) -> Backbone:
    kind = BACKBONES[config.backbone.name]
    return kind(kind.arch(config.backbone.arch))


def policy(config: ModelConfig, prefix: str = "") -> list[w.Weight]:
    """Everything but the VLM, under RoboVLMs' names: the head and what the structure adds."""
    rows = HEADS[config.head.kind].weight_map(config.head, _backbone(config).width)
    # The head's map lists a layer that a model without a gripper has not got.
    if not config.has_gripper:
        rows = [row for row in rows if not row.target.startswith("output/gripper/")]
    rows = w.prefixed(rows, prefix + "act_head.", "head/")
    return rows + w.prefixed(
        find(config.structure.kind, config.head.kind).weight_map(config), prefix, ""
    )


def robovlms(config: ModelConfig, prefix: str = "model.") -> tuple[list[w.Weight], tuple[str, ...]]:
    """A whole RoboVLMs checkpoint.

    Args:
        config: the model, `backbone.arch` complete.
        prefix: "model." in released files, "" in a bare state dict.
    """
    backbone = _backbone(config)
    rows = w.prefixed(backbone.robovlms_map(), prefix + backbone.ROBOVLMS_ROOT, "backbone/")
    return [*rows, *policy(config, prefix)], (*backbone.IGNORE, *HEADS[config.head.kind].ignore)


@dataclass(frozen=True)
class Incoming:
    """Foreign tensors that passed every check, ready to be read.

    Attributes:
        leaves: our path -> the parameter to come.
        unused: their names that were passed over, as the backbone says they carry nothing.
        changed: sentences on types that change on the way.
    """

    leaves: dict[str, Lazy]
    unused: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()


def incoming(
    rows: Iterable[w.Weight],
    ours: Shapes,
    source: Source,
    ignore: Iterable[str] = (),
    dtype: np.dtype | None = None,
    unequal: Iterable[str] = (),
) -> Incoming:
    """Check every name, shape, type and alias, then describe our parameters.

    Args:
        rows: the weight map.
        ours: our path -> shape of the parameters to fill.
        source: their tensors.
        ignore: regexes of their names that carry nothing.
        dtype: store all in this type; None keeps each parameter's own (the widest of its layers).
        unequal: names already known to differ from the tensor they repeat.

    Raises:
        WeightError: with the whole key report.
    """
    rows, ignore, unequal = list(rows), tuple(ignore), tuple(unequal)
    foreign_shapes = source.shapes
    report = _compare(rows, ours, source, ignore)
    leaves, changed = {}, []
    for row in rows:
        # An alias only repeats what another row fills.
        if row.alias or any(path not in ours for path in row.targets):
            continue
        # The layers of one stack may have different types.
        types = [source.dtypes[name] for name in _names(row, ours) if name in foreign_shapes]
        # If all tensors of a row are missing the report says so; until then any type will do.
        stored = dtype or promote(types or [np.dtype(np.float32)])
        changed += [_change(row.source, old, stored) for old in set(types) if old != stored]
        row_reader = _Row(row, ours, source, stored)
        for path in row.targets:
            leaves[path] = Lazy(ours[path], stored, functools.partial(row_reader.take, path))
    unused = [n for n in foreign_shapes if w.ignored(n, ignore)]
    # Changed types and unused names complete a report; alone they are no error.
    if report or unequal:
        report = dataclasses.replace(
            report,
            unequal=(*report.unequal, *unequal),
            changed=tuple(changed),
            unused=tuple(unused),
        )
        raise w.WeightError(str(report))
    return Incoming(leaves, tuple(unused), tuple(changed))


class _Row:
    """Makes the parameters of a row together, so that a fused tensor is read once, not per part.

    Parts wait in memory until they are taken; then the row can be made again.
    """

    def __init__(self, row: w.Weight, ours: Shapes, source: Source, dtype: np.dtype):
        self._row, self._ours, self._source, self._dtype = row, ours, source, dtype
        self._waiting: dict[str, np.ndarray] = {}

    def take(self, path: str) -> np.ndarray:
        if path not in self._waiting:
            self._waiting = w.to_ours(self._row, self._ours, self._read)
        return self._waiting.pop(path)

    def _read(self, name: str) -> np.ndarray:
        return self._source.read(name).astype(self._dtype, copy=False)


def _change(name: str, old: np.dtype, new: np.dtype) -> str:
    return f"{name}: {old} -> {new}" + ("" if holds(new, old) else ", rounded")


@dataclass(frozen=True)
class Outgoing:
    """Our parameters under foreign names, ready to be written.

    Attributes:
        shapes: their name -> shape, aliases included.
        dtypes: their name -> type.
        tensors: makes (their name, array), one at a time, aliases left out.
        aliases: their name -> the name of the tensor it repeats.
        changed: sentences on types that change on the way.
    """

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, np.dtype]
    tensors: Callable[[], Iterator[tuple[str, np.ndarray]]]
    aliases: dict[str, str] = field(default_factory=dict)
    changed: tuple[str, ...] = ()

    def repeated(self) -> Iterator[tuple[str, np.ndarray]]:
        """Like `tensors`, each alias after its original."""
        copies: dict[str, list[str]] = {}
        for alias, name in self.aliases.items():
            copies.setdefault(name, []).append(alias)
        for name, value in self.tensors():
            yield name, value
            for alias in copies.get(name, ()):
                yield alias, value


def outgoing(
    rows: Iterable[w.Weight], ours: Mapping[str, Lazy], dtype: np.dtype | None = None
) -> Outgoing:
    """Inverse of `incoming`.

    Args:
        rows: the weight map.
        ours: our path -> the parameter, of all parameters to export.
        dtype: write all in this type; None keeps each parameter's own.

    Raises:
        WeightError: naming every parameter no row covers and every row without its parameter.
    """
    rows = list(rows)
    originals = {row.targets: row for row in rows if not row.alias}
    written = {path for targets in originals for path in targets}
    missing = [
        f"(ours) {t}: the map names it, the checkpoint lacks it" for t in written - set(ours)
    ]
    missing += [f"(ours) {t}: no row of the map writes it" for t in set(ours) - written]
    if missing:
        raise w.WeightError(str(w.KeyReport(missing=tuple(sorted(missing)))))
    sizes = {path: leaf.shape for path, leaf in ours.items()}
    shapes, dtypes, aliases, changed = {}, {}, {}, []
    for row in rows:
        leaves = [ours[path] for path in row.targets]
        widest = promote([leaf.dtype for leaf in leaves])
        layer_shapes = [leaf.shape[1:] if row.stacked else leaf.shape for leaf in leaves]
        # Stand-ins of one byte an element give the joined shape before any weight is read.
        shape = _joined(
            row, [np.broadcast_to(np.int8(0), layer_shape) for layer_shape in layer_shapes]
        ).shape
        names = _names(row, sizes)
        for name, original in zip(names, _names(originals[row.targets], sizes), strict=True):
            shapes[name], dtypes[name] = shape, dtype or widest
            if row.alias:
                aliases[name] = original
        if not row.alias and dtype and dtype != widest:
            changed.append(_change(row.source, widest, dtype))

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for targets, row in originals.items():
            values = [ours[path].read() for path in targets]
            for i, name in enumerate(_names(row, sizes)):
                # A layer at a time: no second copy of the stack is made.
                parts = [value[i] if row.stacked else value for value in values]
                yield name, _joined(row, parts).astype(dtypes[name], copy=False)

    return Outgoing(shapes, dtypes, tensors, aliases, tuple(changed))


def _joined(row: w.Weight, parts: list[np.ndarray]) -> np.ndarray:
    joined = np.ascontiguousarray(row.join(parts))
    return joined if parts[0].ndim else joined.reshape(())  # numpy's contiguous scalars are vectors


def _compare(
    rows: list[w.Weight], ours: Shapes, source: Source, ignore: Iterable[str]
) -> w.KeyReport:
    """All that is wrong with foreign tensors; reads aliases (tied weights) and their originals."""
    foreign_shapes = source.shapes
    # A map may have rows for parts that this model is without.
    applicable = [row for row in rows if all(path in ours for path in row.targets)]
    originals = {row.targets: row for row in applicable if not row.alias}
    pairs = [
        pair
        for row in applicable
        if row.alias and row.targets in originals
        for pair in zip(_names(row, ours), _names(originals[row.targets], ours), strict=True)
    ]
    unequal = [
        f"{name} (of {original})"
        for name, original in pairs
        if name in foreign_shapes
        and foreign_shapes[name] == foreign_shapes.get(original)
        # Tied tensors that share their bytes are equal without a look.
        and source.place(name) != source.place(original)
        and not same_bytes(source.read(name), source.read(original))
    ]
    used = {name for row in applicable for name in _names(row, ours)}
    mistyped = [f"{n}: {t}" for n, t in source.dtypes.items() if n in used and not floating(t)]
    report = w.check(rows, ours, foreign_shapes, ignore)
    return dataclasses.replace(report, unequal=tuple(unequal), mistyped=tuple(mistyped))


def _names(row: w.Weight, ours: Shapes) -> list[str]:
    shape = ours[row.targets[0]]
    return row.expand(shape[0] if shape else 0)
