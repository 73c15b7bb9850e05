"""What the loops of a step keep, and how much of it lies on each device.

The layers of a tower are a loop, so what a loop carries, holds and stacks up is nearly all that a
step keeps. How it lies is read after the partitioner's propagation, see `train.propagation`.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vla_jax.train import propagation

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
        loop: where the loop is in the model.
        backward: whether the loop is of the gradient.
        device_bytes: what one device has of it.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    loop: str
    backward: bool
    device_bytes: int


def loop_values(module: Any) -> list[LoopValue]:
    """Every array of every loop of a step, after the propagation.

    Args:
        module: of `propagation.propagated`.
    """
    mesh = propagation.axis_sizes(module)
    functions = {
        str(each.attributes["sym_name"]).strip('"'): each
        for each in propagation.operations(module, "func.func")
    }
    loops = propagation.operations(module, "stablehlo.while")
    return [value for loop in loops for value in _values(loop, mesh, functions)]


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
    parameter_shapes = set(parameters)
    stacked_bytes: dict[str, float] = {}
    held: dict[tuple[str, tuple[int, ...]], float] = {}
    forward = [
        value for value in values if not value.backward and value.shape not in parameter_shapes
    ]

    def size(value: LoopValue) -> float:
        # `rows` is chosen so that only dimensions of the batch are its multiples.
        grows = any(n and n % rows == 0 for n in value.shape)
        return value.device_bytes * (scale if grows else 1.0)

    for value in forward:
        if value.kind == "stacked":
            stacked_bytes[value.loop] = stacked_bytes.get(value.loop, 0.0) + size(value)
    stacked = {value.shape for value in forward if value.kind == "stacked"}
    for value in forward:
        # What one loop stacks another one may hold; it counts once.
        if value.kind == "held" and value.shape not in stacked:
            held[value.dtype, value.shape] = size(value)
    stacked_bytes["held in loops"] = sum(held.values())
    return {loop: round(nbytes) for loop, nbytes in stacked_bytes.items()}


def _values(
    loop: Any, mesh: Mapping[str, int], functions: Mapping[str, Any]
) -> Iterator[LoopValue]:
    # Region 0 is the condition of the loop.
    body = loop.regions[1].blocks[0]
    # The last operation of a block is its return.
    returned = list(body.operations)[-1].operands
    where, backward = _place(str(loop.location))
    lying = propagation.result_axes(loop)
    for argument, result, axes in zip(body.arguments, returned, lying, strict=True):
        shape, dtype = propagation.shape_and_type(argument.type)
        # Counters are no memory worth a line.
        if not shape:
            continue
        # Into how many parts each dimension is cut.
        shares = [math.prod(mesh[name] for name in each) for each in axes]
        local = math.prod(-(-size // parts) for size, parts in zip(shape, shares, strict=True))
        yield LoopValue(
            kind=_kind(argument, result, functions),
            dtype=dtype,
            shape=shape,
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
    # Transformations are written around the names; without them both passes name a loop alike.
    path = re.sub(r"\w+\(|\)", "", path)
    skipped = ("step", "while", "body", "closed_call", "checkpoint", "remat", "jit", "")
    # Names with a dot are methods, the others modules.
    parts = [part for part in path.split("/") if part not in skipped and "." not in part]
    return "/".join(parts[-4:]) or "the step", backward


def _bits(dtype: str) -> int:
    # A bool takes a whole byte, though its type, i1, says one bit.
    matched = _BITS.search(dtype.removesuffix(">"))
    return int(matched[1]) if matched and dtype != "i1" else 8
