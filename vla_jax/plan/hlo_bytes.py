"""Bytes that a compiled program moves to and from the main memory."""

import re
from collections.abc import Iterator

from vla_jax.plan.hlo import (
    Computation,
    Instruction,
    Program,
    arrays,
    memory_bytes,
    plain_bytes,
)
from vla_jax.plan.hlo_wire import KINDS

# Instructions that move nothing themselves; of an asynchronous pair the start counts.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "after-all", "iota", "partition-id", "replica-id", "opt-barrier", "async-update",
    "slice-start", "dynamic-slice-start", "domain", "add-dependency",
}  # fmt: skip
_SLICES = ("dynamic-slice", "slice", "gather")
# Modules that are a part of the model of their own.
_TOWERS = ("vision", "text", "resampler", "perceiver", "connector", "projector")


def moved(instruction: Instruction, computation: Computation, program: Program) -> float:
    """Bytes read and written by one instruction; a slice counts as itself, not as its whole."""
    op, operands = instruction.op, instruction.operands
    if op in _FREE or op.endswith("-done"):
        return 0.0
    if op == "fusion":
        return _fusion(instruction, computation, program)
    # Read once and written once.
    if op in _SLICES:
        return 2 * plain_bytes(instruction.shape)
    if op == "dynamic-update-slice":
        # In place: the part is read and written, the array around it stays untouched.
        has_update = _in(operands, computation)
        return 2 * memory_bytes(computation[operands[1]].shape) if has_update else 0.0
    if op == "async-start":
        return _asynchronous(program.get(instruction.body))
    if op == "copy-start":  # (target, source, context)
        pair = arrays(instruction.shape)[:2]
        return sum((a.padded for a in pair if "S(" not in a.layout), 0.0)
    read = sum(memory_bytes(computation[x].shape) for x in operands if x in computation)
    if op.endswith("-start") and op != "all-reduce-start":
        return memory_bytes(instruction.shape)  # (inputs, outputs)
    if op == "custom-call" and "__cublas" in instruction.attributes:
        # (product, workspace): of the workspace a plain product uses nothing.
        return arrays(instruction.shape)[0].nbytes + read
    return memory_bytes(instruction.shape) + read


def _in(operands: list[str], computation: Computation) -> bool:
    return len(operands) > 1 and operands[1] in computation


def _asynchronous(computation: Computation) -> float:
    """Prefetches: the other side is not in the main memory."""
    total = 0.0
    for each in computation.values():
        if each.op in ("dynamic-slice", "slice"):
            total = plain_bytes(each.shape)
        elif each.op == "dynamic-update-slice" and _in(each.operands, computation):
            total = plain_bytes(computation[each.operands[1]].shape)
    return total


def _fusion(instruction: Instruction, computation: Computation, program: Program) -> float:
    total = sum((size for _, size in operands(instruction, computation, program)), 0.0)
    return total + max(_written(instruction, program.get(instruction.body)), 0.0)


def operands(
    instruction: Instruction, computation: Computation, program: Program
) -> Iterator[tuple[str, float]]:
    """The operands of an instruction and how many bytes it reads of each."""
    inner = program.get(instruction.body) if instruction.op == "fusion" else {}
    parameters = _parameters(inner)
    for number, name in enumerate(instruction.operands):
        if name not in computation:
            continue
        size = memory_bytes(computation[name].shape)
        if size and number in parameters:
            part = _read(inner, parameters[number], program)
            # A fusion that slices a stack of layers reads the slice alone.
            size = size if part is None else min(size, part)
        yield name, size


def of_arguments(program: Program) -> float:
    """Bytes that the kernels outside of loops read of what a program was given."""
    entry, total = program.get(program.entry), 0.0
    for each in entry.values():
        if moved(each, entry, program):
            for name, size in operands(each, entry, program):
                while entry[name].op == "bitcast":
                    name = entry[name].operands[0]
                total += size if entry[name].op == "parameter" else 0.0
    return total


def _parameters(computation: Computation) -> dict[int, str]:
    return {int(each.value): each.name for each in computation.values() if each.op == "parameter"}


def _read(computation: Computation, name: str, program: Program) -> float | None:
    """Bytes read of a parameter, looking through bitcasts and inner fusions; None = all of it."""
    users = [each for each in computation.values() if name in each.operands]
    if not users:
        return None
    total = 0.0
    for user in users:
        part: float | None = None
        if _hands_on(user, program) and not user.root:
            part = _read(computation, user.name, program)
        elif user.op in _SLICES:
            part = plain_bytes(user.shape)
        elif user.op == "dynamic-update-slice" and user.operands[0] == name:
            part = 0.0  # written in place
        elif user.op == "fusion":
            inner = program.get(user.body)
            parameter = _parameters(inner).get(user.operands.index(name))
            part = _read(inner, parameter, program) if parameter else None
        if part is None:
            return None
        total += part
    return total


def _hands_on(instruction: Instruction, program: Program) -> bool:
    """Whether a part of its result takes the same part of its operand, in as many bytes.

    Such is the copy, a fusion of its own, by which a TPU's whole numbers come in other tiles.
    """
    if instruction.op in ("bitcast", "reshape", "copy"):
        return True
    inner = program.get(instruction.body) if instruction.op == "fusion" else {}
    return {each.op for each in inner.values()} == {"parameter", "copy"}


def _written(instruction: Instruction, inner: Computation) -> float:
    """What an update in place writes is its part; it was read too."""
    out = memory_bytes(instruction.shape)
    root = next((each for each in inner.values() if each.root), None)
    # These may stand between an update in place and the result.
    while root is not None and root.op in ("bitcast", "copy", "reshape") and root.operands:
        root = inner.get(root.operands[0])
    if root is None:
        return out
    if root.op == "dynamic-update-slice":
        part = inner.get(root.operands[1])
        return 2 * plain_bytes(part.shape) if part is not None and out else out
    if root.op == "tuple":
        for name in root.operands:
            each = inner.get(name)
            if each is not None and each.op == "dynamic-update-slice":
                part = inner.get(each.operands[1])
                if part is not None:
                    out += 2 * plain_bytes(part.shape) - memory_bytes(each.shape)
    return out


def kind_of(instruction: Instruction) -> str:
    """Which part of the model an instruction belongs to, and what it does there, by its path."""
    if instruction.op.removesuffix("-start") in KINDS:
        return "exchanges"
    path = instruction.path
    # jax writes transformations around the names: transpose(jvp(text)) is module text.
    parts = re.sub(r"\w+\((?=[^)]*\))|[()]", "", path).split("/")
    # A method other than `__call__` is written behind its module: text.run.
    modules = {part.split(".")[0] for part in parts}
    tower = next((name for name in _TOWERS if name in modules), "")
    if not tower:
        if "head" in modules:
            return "head"
        if "VLA." in path or "backbone" in path:
            return "joints of the towers"
        return "optimizer and data" if path else "other"
    if "attn" in parts or "attention" in parts:
        last = parts[-2] if len(parts) > 1 else ""
        product = last in ("q", "k", "v", "o", "qkv", "kv", "out")
        return f"{tower}: projections" if product else f"{tower}: attention"
    if any(part.startswith(("mlp", "fc", "gate", "up", "down")) for part in parts):
        return f"{tower}: feed-forward"
    if any("norm" in part for part in parts):
        return f"{tower}: norms"
    return f"{tower}: other"
