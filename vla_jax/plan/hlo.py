"""A compiled program's text, as XLA prints it after scheduling: instructions, shapes, loops.

The text is the only form in which all compilers give their program. Names used here are XLA's own.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

_BYTES = {
    "pred": 1.0, "s2": 0.25, "u2": 0.25, "s4": 0.5, "u4": 0.5, "s8": 1.0, "u8": 1.0, "s16": 2.0,
    "u16": 2.0, "s32": 4.0, "u32": 4.0, "s64": 8.0, "u64": 8.0, "f4e2m1fn": 0.5, "f8e4m3fn": 1.0,
    "f8e5m2": 1.0, "f8e4m3": 1.0, "f8e3m4": 1.0, "bf16": 2.0, "f16": 2.0, "f32": 4.0, "f64": 8.0,
    "c64": 8.0, "c128": 16.0, "token": 0.0,
}  # fmt: skip
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$|^(ENTRY )?%?([\w.\-]+) \{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"(\w+)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_TILES = re.compile(r"([\d,]*):T\(([\d,]+)\)")
_CALLED = re.compile(
    r"(?<!\w)(calls|to_apply|body|condition|called_computations|branch_computations"
    r"|true_computation|false_computation)=(?:\{([^}]*)\}|%?([\w.\-]+))"
)
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
# Memory spaces other than the main memory, such as a TPU's VMEM.
_ELSEWHERE = re.compile(r"S\([1-9]\)")


class Array(NamedTuple):
    """One array of a shape; a tuple has several."""

    dtype: str
    dims: tuple[int, ...]
    layout: str

    @property
    def nbytes(self) -> float:
        """Bytes without padding."""
        return math.prod(self.dims) * _BYTES[self.dtype]

    @property
    def padded(self) -> float:
        """Bytes in memory: a TPU's tiles round the innermost dimensions up."""
        matched = _TILES.match(self.layout)
        if not matched or not self.dims:
            return self.nbytes
        dims = list(self.dims)
        minor = [int(i) for i in matched[1].split(",") if i]
        tile = [int(size) for size in matched[2].split(",")]
        # A layout names the innermost dimension first, a tile names it last, and may cover fewer.
        for axis, size in zip(minor, reversed(tile), strict=False):
            dims[axis] = -(-dims[axis] // size) * size
        return math.prod(dims) * _BYTES[self.dtype]


# A program repeats few shapes thousands of times.
@lru_cache(maxsize=100_000)
def arrays(shape: str) -> tuple[Array, ...]:
    """The arrays of "f32[8,128]{1,0:T(8,128)}", or of a tuple of such."""
    return tuple(
        # A dynamic dimension is printed as <=8, and memory is set aside for all of it.
        Array(dtype, tuple(int(n.strip("<=")) for n in dims.split(",") if n), layout or "")
        for dtype, dims, layout in _ARRAY.findall(shape)
        if dtype in _BYTES
    )


def plain_bytes(shape: str) -> float:
    """Bytes without padding, wherever they lie."""
    return sum((array.nbytes for array in arrays(shape)), 0.0)


def memory_bytes(shape: str) -> float:
    """Bytes in the main memory, padding included."""
    return sum((a.padded for a in arrays(shape) if not _ELSEWHERE.search(a.layout)), 0.0)


@dataclass(slots=True)
class Instruction:
    """One line.

    Attributes:
        name: without its percent sign.
        shape: as printed.
        op: opcode.
        operands: names.
        value: what stands in the brackets of a constant or parameter; else "".
        attributes: what follows the brackets.
        root: whether its computation returns it.
    """

    name: str
    shape: str
    op: str
    operands: list[str]
    value: str
    attributes: str
    root: bool

    def called(self) -> list[tuple[str, str]]:
        """(how, computation) of every computation it calls."""
        return [
            (how, name.strip().lstrip("%"))
            for how, several, single in _CALLED.findall(self.attributes)
            for name in (several or single).split(",")
            if name.strip()
        ]

    @property
    def body(self) -> str:
        """The computation of a fusion or of an asynchronous start; "" of others."""
        for how, name in self.called():
            if how in ("calls", "called_computations"):
                return name
        return ""

    @property
    def path(self) -> str:
        """Where in the model it comes from."""
        matched = re.search(r'op_name="([^"]*)"', self.attributes)
        return matched[1] if matched else ""


Computation = dict[str, Instruction]


@dataclass(frozen=True)
class Program:
    """A parsed module.

    Attributes:
        computations: by name.
        entry: name of the first.
    """

    computations: dict[str, Computation]
    entry: str

    def get(self, name: str) -> Computation:
        """A computation, empty when there is none of that name."""
        return self.computations.get(name, {})

    def runs(self) -> Iterator[tuple[str, int, tuple[int, ...]]]:
        """(computation, how often it runs, trip counts of the loops around it), without fusions.

        Both branches of a condition count as run.
        """
        times: Counter[tuple[str, tuple[int, ...]]] = Counter()
        todo: list[tuple[str, int, tuple[int, ...]]] = [(self.entry, 1, ())]
        while todo:
            name, count, loops = todo.pop()
            # Several callers may share a computation, each in loops of its own.
            times[name, loops] += count
            for each in self.get(name).values():
                if each.op == "while":
                    trips = self.trips(each)
                    inside = (*loops, trips)
                    todo += [(c, count * trips, inside) for _, c in each.called()]
                elif each.op in ("conditional", "call", "custom-call"):
                    todo += [(c, count, loops) for _, c in each.called()]
        for (name, loops), count in times.items():
            if name in self.computations:
                yield name, count, loops

    def trips(self, loop: Instruction) -> int:
        """How often a loop runs: as the compiler found out, or the bound it compares with."""
        matched = _TRIPS.search(loop.attributes)
        if matched:
            return int(matched[1])
        # The bound that the counter meets is the largest constant of the condition.
        todo, largest = [name for how, name in loop.called() if how == "condition"], 1
        while todo:
            for each in self.get(todo.pop()).values():
                if each.op == "constant" and each.shape.startswith(("s32[]", "u32[]")):
                    largest = max(largest, int(each.value))
                todo += [name for _, name in each.called()]
        return -(-largest // self._stride(loop))

    def _stride(self, loop: Instruction) -> int:
        """How far the counter of a loop comes in a turn; loops that pass parts around take two."""
        called = dict(loop.called())
        condition, body = self.get(called["condition"]), self.get(called["body"])
        compared = [each for each in condition.values() if each.op == "compare" and each.root]
        counters = [
            index
            for each in compared
            for name in each.operands
            if (index := _element(condition.get(name))) is not None
        ]
        results = [each for each in body.values() if each.op == "tuple" and each.root]
        # A loop of another form: with a stride of 1 its turns are rather too many than too few.
        if len(counters) != 1 or len(results) != 1:
            return 1
        # What is added to the counter until it is handed on.
        stride, at = 0, body.get(results[0].operands[counters[0]])
        while at is not None and at.op == "add":
            parts = [body[name] for name in at.operands]
            constants = [int(each.value) for each in parts if each.op == "constant"]
            stride, at = (
                stride + sum(constants),
                next((e for e in parts if e.op != "constant"), None),
            )
        return max(stride, 1) if _element(at) == counters[0] else 1


def _element(instruction: Instruction | None) -> int | None:
    """Which element of a tuple an instruction takes, if it does."""
    if instruction is None or instruction.op != "get-tuple-element":
        return None
    matched = re.search(r"index=(\d+)", instruction.attributes)
    return int(matched[1]) if matched else None


def parse(text: str) -> Program:
    """The program of a module's text."""
    computations: dict[str, Computation] = {}
    current: Computation = {}
    entry = ""
    for line in text.splitlines():
        # Computations begin in the first column, their instructions behind spaces.
        if not line.startswith(" "):
            if matched := _HEAD.match(line):
                name = matched[2] or matched[4]
                current = computations.setdefault(name, {})
                entry = name if matched[1] or matched[3] else entry
            continue
        if instruction := _instruction(line):
            current[instruction.name] = instruction
    return Program(computations, entry)


def _instruction(line: str) -> Instruction | None:
    matched = _LINE.match(line)
    if not matched:
        return None
    start = matched.end()
    # A tuple's shape has brackets and spaces of its own.
    end = _closing(line, start) + 1 if line[start] == "(" else line.find(" ", start)
    opened = line.find("(", end)
    closed = _closing(line, opened)
    op, inside = line[end:opened].strip(), line[opened + 1 : closed]
    # In these brackets stand values, not the names of operands.
    leaf = op in ("constant", "parameter", "iota")
    return Instruction(
        name=matched[2],
        shape=line[start:end],
        op=op,
        operands=[] if leaf else re.findall(r"%([\w.\-]+)", inside),
        value=inside if leaf else "",
        attributes=line[closed + 1 :],
        root=bool(matched[1]),
    )


def _closing(line: str, start: int) -> int:
    """Where the bracket that opens at `start` closes."""
    depth = 0
    for i in range(start, len(line)):
        if line[i] in "([{":
            depth += 1
        elif line[i] in ")]}":
            depth -= 1
            if depth == 0:
                return i
    return len(line) - 1
