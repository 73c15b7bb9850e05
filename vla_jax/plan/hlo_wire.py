"""Collectives of a compiled program: over which axes, how many bytes, how often, hidden or not."""

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from vla_jax.plan.hlo import Computation, Instruction, Program, arrays, plain_bytes

KINDS = (
    "all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute",
    "ragged-all-to-all", "collective-broadcast",
)  # fmt: skip
_EXPLICIT = re.compile(r"replica_groups=\{\{([\d,]+)\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")
_PAIRS = re.compile(r"source_target_pairs=\{\{(\d+),(\d+)\}")


@dataclass(frozen=True)
class Collective:
    """One exchange between devices.

    Attributes:
        kind: of `KINDS`.
        axes: of the mesh, over which it goes.
        group: devices that take part.
        domains: hosts (GPU) or slices (TPU) that these devices are in.
        executions: in a step.
        wire_bytes: that a device sends in a step.
        array: the largest that is exchanged, such as "bf16[2048,8192]".
        loops: trip counts of the loops around it.
        overlapped: whether it is started and waited for apart from each other, so that it can hide.
        path: where in the model it comes from.
    """

    kind: str
    axes: tuple[str, ...]
    group: int
    domains: int
    executions: int
    wire_bytes: float
    array: str
    loops: tuple[int, ...]
    overlapped: bool
    path: str


def collectives(
    program: Program, mesh: Mapping[str, int], domains: Sequence[int]
) -> list[Collective]:
    """All collectives of a program.

    Args:
        program: compiled for the mesh.
        mesh: axis -> size, in order.
        domains: of every device in the mesh's order, its host or slice.
    """
    result, marks = [], set()
    for name, times, loops in program.runs():
        computation = program.get(name)
        for outer in computation.values():
            for kind, each, where in _exchanges(outer, computation, program):
                # A TPU draws one asynchronous exchange through several fusions.
                channel = re.search(r"channel_id=(\d+)", each.attributes)
                mark = (channel[1], kind, loops) if channel else None
                if mark in marks:
                    continue
                if mark:
                    marks.add(mark)
                result.append(_collective(kind, each, where, outer, times, loops, mesh, domains))
    # A mesh axis of size 1 leaves exchanges that send nothing.
    return [each for each in result if each.group > 1]


def _exchanges(
    outer: Instruction, computation: Computation, program: Program
) -> Iterator[tuple[str, Instruction, Computation]]:
    base = outer.op.removesuffix("-start")
    if base in KINDS:
        yield base, outer, computation
    elif outer.op in ("fusion", "async-start"):
        inner = program.get(outer.body)
        for each in inner.values():
            kind = each.op.removesuffix("-start")
            if kind in KINDS:
                # A TPU's reduce-scatter is an all-reduce of which each device keeps its part.
                scatter = kind == "all-reduce" and "scatter" in outer.name + outer.body
                yield ("reduce-scatter" if scatter else kind), each, inner


def _collective(
    kind: str,
    each: Instruction,
    computation: Computation,
    outer: Instruction,
    times: int,
    loops: tuple[int, ...],
    mesh: Mapping[str, int],
    domains: Sequence[int],
) -> Collective:
    devices = first_group(each.attributes, math.prod(mesh.values()))
    inputs = sum(plain_bytes(computation[x].shape) for x in each.operands if x in computation)
    out = plain_bytes(each.shape)
    if each.op.endswith("-start"):  # (inputs, outputs)
        out = max(out - inputs, inputs) if kind == "all-gather" else inputs
    # An all-reduce is a reduce-scatter and then an all-gather, so it sends twice as much.
    size = {"all-gather": out, "all-reduce": 2 * inputs}.get(kind, inputs)
    count = len(devices)
    # A device's own part of n stays where it is.
    fraction = 1.0 if kind == "collective-permute" else (count - 1) / max(count, 1)
    largest = max(arrays(each.shape), key=lambda a: a.nbytes, default=None)
    started = outer.op.endswith("-start") and '"is_sync":true' not in each.attributes
    # A TPU draws an asynchronous exchange into the fusions that go on beside it.
    drawn = '"async_collective' in each.attributes or any(
        "AsyncCollective" in x.attributes for x in computation.values()
    )
    return Collective(
        kind=kind,
        axes=_axes(devices, mesh),
        group=count,
        domains=len({domains[i] for i in devices}),
        executions=times,
        wire_bytes=size * fraction * times,
        array=f"{largest.dtype}[{','.join(map(str, largest.dims))}]" if largest else "",
        loops=loops,
        overlapped=started or (outer.op == "fusion" and drawn),
        path=each.path or outer.path,
    )


def first_group(text: str, size: int) -> list[int]:
    """Devices of the first group that exchange with each other, by their place in the mesh.

    Args:
        text: attributes of the instruction; XLA writes groups in three ways.
        size: devices in all, for an instruction that names no group.
    """
    if matched := _EXPLICIT.search(text):
        return [int(i) for i in matched[1].split(",")]
    if matched := _IOTA.search(text):
        groups = [int(i) for i in matched[1].split(",")]
        dims = [int(i) for i in matched[2].split(",")]
        order = [int(i) for i in matched[3].split(",")] if matched[3] else range(len(dims))
        ids = _transposed(dims, list(order))
        return ids[: math.prod(groups) // groups[0]]
    if matched := _MESH.search(text):
        sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", matched[1])}
        return _along(sizes, re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", matched[2]))
    if matched := _PAIRS.search(text):
        return [int(matched[1]), int(matched[2])]
    return list(range(size))


def _transposed(dims: list[int], order: list[int]) -> list[int]:
    # XLA numbers the devices in order, shapes them as dims and transposes by order.
    strides = [math.prod(dims[i + 1 :]) for i in range(len(dims))]
    ranges = [range(dims[axis]) for axis in order]
    return [
        sum(i * strides[axis] for i, axis in zip(index, order, strict=True))
        for index in itertools.product(*ranges)
    ]


def _along(sizes: Mapping[str, int], axes: list[tuple[str, str, str]]) -> list[int]:
    """The group at the mesh's origin; an axis may be split, (what is before)what is meant."""
    # Devices are numbered with the last axis fastest.
    names = list(sizes)
    steps = []
    for name, before, part in axes:
        stride = math.prod(sizes[other] for other in names[names.index(name) + 1 :])
        count = int(part) if part else sizes[name]
        stride *= sizes[name] // (int(before) * count) if part else 1
        steps.append([i * stride for i in range(count)])
    return [sum(index) for index in itertools.product(*steps)]


def _axes(devices: list[int], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The axes of the mesh along which the devices differ."""
    names, stride = [], 1
    # From the last axis on, whose neighbors have neighboring numbers.
    for name in reversed(list(mesh)):
        if len({device // stride % mesh[name] for device in devices}) > 1:
            names.append(name)
        stride *= mesh[name]
    return tuple(reversed(names))
