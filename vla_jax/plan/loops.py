"""Where the values of a step's loops lie, by the partitioner's own propagation of shardings.

The layers of a tower are a loop, so what a loop carries, holds and stacks up is nearly all that a
step keeps. The propagation is the first phase of a compilation and needs no compiler for the
machine: seconds for a full-size model on any number of devices.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jaxlib.mlir.passmanager import PassManager

_SPEC = re.compile(r"<@\w+, \[((?:\{[^}]*\}(?:, )?)*)\]")
_DIMENSION = re.compile(r"\{([^}]*)\}")
_AXIS = re.compile(r'"(\w+)"(?::\((\d+)\)(\d+))?')
_BITS = re.compile(r"(\d+)$")
# Operations that change nothing.
_NEUTRAL = ("sdy.sharding_constraint", "stablehlo.optimization_barrier")


@dataclass(frozen=True)
class LoopValue:
    """One value of a loop.

    Attributes:
        kind: "carry", changed by every iteration; "stacked", of which every iteration writes its
            own part, the first dimension's; "held", the same all along.
        dtype: such as "bf16".
        shape: of the whole value, over all devices.
        axes: of each dimension the mesh axes that split it.
        loop: where the loop is in the model.
        backward: whether the loop is of the gradient.
        device_bytes: what one device has of it.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    axes: tuple[tuple[str, ...], ...]
    loop: str
    backward: bool
    device_bytes: int

    def __str__(self) -> str:
        split = ", ".join("{" + ", ".join(axes) + "}" for axes in self.axes)
        return f"{self.dtype}{list(self.shape)} split [{split}] in {self.loop}"

    def scaled(self, rows: int, asked: int) -> "LoopValue":
        """The same value of a batch of `asked` rows instead of `rows`, but for its bytes."""
        shape = tuple(n * asked // rows if n % rows == 0 else n for n in self.shape)
        return dataclasses.replace(self, shape=shape)


def loop_values(lowered: Any, mesh: Mapping[str, int]) -> list[LoopValue]:
    """Every array of every loop of a lowered step, after the propagation.

    Args:
        lowered: of a jitted function; it is not changed.
        mesh: axis -> size.
    """
    module = lowered.compiler_ir("stablehlo").operation.clone()
    with module.context:
        PassManager.parse("builtin.module(sdy-propagation-pipeline)").run(module)
        functions = {
            str(each.attributes["sym_name"]).strip('"'): each
            for each in module.regions[0].blocks[0]
            if each.operation.name == "func.func"
        }
        loops = list(_whiles(module))
        return [value for loop in loops for value in _values(loop, mesh, functions)]


def unsplit_carries(
    values: Iterable[LoopValue], rows: int, parameters: Iterable[tuple[int, ...]]
) -> list[LoopValue]:
    """Carries with the batch's rows in front, all of which every device holds and computes.

    Args:
        values: of `loop_values`.
        rows: of the batch, or of the part of it that goes through at once.
        parameters: shapes of the model's; their gradients are carried too, and are no rows.
    """
    known = {tuple(shape) for shape in parameters}
    known |= {shape[1:] for shape in known}
    found = {}
    for value in values:
        shape, axes = value.shape, value.axes
        if value.kind == "stacked":
            shape, axes = shape[1:], axes[1:]
        if value.kind == "held" or len(shape) < 2 or shape in known or shape[0] % rows:
            continue
        if not {"data", "fsdp"} & set(axes[0]):
            found.setdefault(str(value), value)
    return list(found.values())


def residual_bytes(
    values: Iterable[LoopValue],
    parameters: Iterable[tuple[int, ...]],
    rows: int,
    scale: float = 1.0,
) -> dict[str, int]:
    """Bytes a device of what the forward loops leave for the backward ones.

    Args:
        values: of `loop_values`.
        parameters: shapes of the model's; loops hold these too, and they are counted elsewhere.
        rows: of the batch that was traced, or of the part of it that goes through at once.
        scale: rows asked for over these.

    Returns:
        Of each loop what it stacks up, layer by layer, and "held in loops", what stays the same in
        all layers but is no parameter: masks, zeros.
    """
    known = set(parameters)
    found: dict[str, float] = {}
    held: dict[tuple[str, tuple[int, ...]], float] = {}
    forward = [value for value in values if not value.backward and value.shape not in known]

    def size(value: LoopValue) -> float:
        grows = any(n and n % rows == 0 for n in value.shape)
        return value.device_bytes * (scale if grows else 1.0)

    for value in forward:
        if value.kind == "stacked":
            found[value.loop] = found.get(value.loop, 0.0) + size(value)
    stacked = {value.shape for value in forward if value.kind == "stacked"}
    for value in forward:
        if value.kind == "held" and value.shape not in stacked:
            held[value.dtype, value.shape] = size(value)
    found["held in loops"] = sum(held.values())
    return {loop: round(nbytes) for loop, nbytes in found.items()}


def _whiles(operation: Any) -> Iterator[Any]:
    for region in operation.regions:
        for block in region:
            for inner in block:
                if inner.operation.name == "stablehlo.while":
                    yield inner.operation
                yield from _whiles(inner.operation)


def _values(
    loop: Any, mesh: Mapping[str, int], functions: Mapping[str, Any]
) -> Iterator[LoopValue]:
    body = loop.regions[1].blocks[0]
    returned = list(body.operations)[-1].operands
    attribute = loop.attributes.get("sdy.sharding", "")
    specs = _SPEC.findall(str(attribute))
    where, backward = _place(str(loop.location))
    for i, (argument, result) in enumerate(zip(body.arguments, returned, strict=True)):
        kind = str(argument.type)
        shape = tuple(map(int, re.findall(r"(\d+)x", kind)))
        dtype = re.sub(r"tensor<(\d+x)*|>", "", kind)
        if not shape:
            continue
        spec = _DIMENSION.findall(specs[i]) if i < len(specs) else [""] * len(shape)
        axes = [_AXIS.findall(dimension) for dimension in spec]
        share = [math.prod(int(sub or mesh[name]) for name, _, sub in each) for each in axes]
        local = math.prod(-(-size // parts) for size, parts in zip(shape, share, strict=True))
        yield LoopValue(
            kind=_kind(argument, result, functions),
            dtype=dtype,
            shape=shape,
            axes=tuple(tuple(name for name, *_ in each) for each in axes),
            loop=where,
            backward=backward,
            device_bytes=int(local * _bits(dtype) / 8),
        )


def _kind(argument: Any, result: Any, functions: Mapping[str, Any]) -> str:
    if result == argument:
        return "held"
    updated = _updated(result, functions)
    return "stacked" if updated is not None and updated == argument else "carry"


def _updated(value: Any, functions: Mapping[str, Any]) -> Any:
    """The array of which `value` is a copy with a part written over, or None."""
    owner = value.owner
    if getattr(owner, "name", None) in _NEUTRAL:
        return _updated(owner.operands[0], functions)
    if getattr(owner, "name", None) == "stablehlo.dynamic_update_slice":
        return owner.operands[0]
    if getattr(owner, "name", None) == "func.call":
        # jax keeps the body of a loop, and parts of it, in functions of their own.
        block = functions[str(owner.attributes["callee"]).lstrip("@")].regions[0].blocks[0]
        inner = list(block.operations)[-1].operands[list(owner.results).index(value)]
        array = _updated(inner, functions)
        if array is not None and array in (arguments := list(block.arguments)):
            return owner.operands[arguments.index(array)]
    return None


def _place(location: str) -> tuple[str, bool]:
    """'loc("jit(step)/jvp(VLA.loss)/backbone/text/while"...' -> the model's part, backward?"""
    matched = re.search(r'"([^"]*/[^"]*)"', location)
    path = matched[1] if matched else ""
    backward = "transpose(" in path
    path = re.sub(r"\w+\(|\)", "", path)
    skipped = ("step", "while", "body", "closed_call", "checkpoint", "remat", "jit", "")
    # Names with a dot are methods, the others modules.
    parts = [part for part in path.split("/") if part not in skipped and "." not in part]
    return "/".join(parts[-4:]) or "the step", backward


def _bits(dtype: str) -> int:
    matched = _BITS.search(dtype.removesuffix(">"))
    return int(matched[1]) if matched and dtype != "i1" else 8
