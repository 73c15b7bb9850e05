"""Where the values of a lowered program will lie: what the compiler's sharding propagation decides.

Propagation is the compiler's first pass. Alone it takes seconds at any size, needs no accelerator
and no memory, and already tells whether a batch stays split.
"""

import collections
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import sdy
from jaxlib.mlir.passmanager import PassManager

# The axes of `train.mesh` that a batch is split over.
ROW_AXES = ("data", "fsdp")
Axes = tuple[tuple[str, ...], ...]  # of a value: the mesh axes of each dimension

# The name under which the pass leaves what it decides, on operations and on arguments.
_GIVEN = "sdy.sharding"


@dataclass(frozen=True)
class Carry:
    """A value that a loop carries, or holds unchanged, from one iteration to the next.

    Attributes:
        shape: over all devices.
        dtype: as MLIR names it: bf16, f32, i1, ...
        axes: of the mesh, those that each dimension is split over; () is a whole dimension.
        loops: how many loops of the program carry such a value.
    """

    shape: tuple[int, ...]
    dtype: str
    axes: Axes
    loops: int = 1

    def __str__(self) -> str:
        where = ", ".join("{" + ", ".join(axes) + "}" for axes in self.axes)
        return f"{self.dtype}{list(self.shape)} lies as [{where}] (in {self.loops} loops)"


def loop_carries(module: Any) -> list[Carry]:
    """Everything that the loops of a program carry, and how it lies on the mesh.

    Args:
        module: of `propagated`.

    Returns:
        Distinct carries, the largest first.
    """
    counts: collections.Counter[Any] = collections.Counter()
    for op in operations(module, "stablehlo.while"):
        lying = result_axes(op)
        # A loop may carry many alike, such as the statistics of several norms.
        counts.update(
            {(*shape_and_type(x.type), a) for x, a in zip(op.results, lying, strict=True)}
        )
    ordered = sorted(counts.items(), key=lambda item: -math.prod(item[0][0]))
    return [Carry(*carry, loops=count) for carry, count in ordered]


def unsplit_carries(module: Any, rows: int) -> list[Carry]:
    """Loop carries that hold rows of the batch without being split as the batch is.

    Such a value lies on each device for all rows, or for more than its share of them, and so does
    everything that the loop computes of it.

    A carry counts as rows of the batch where its first dimension is a multiple of `rows` (windows
    and cameras are folded into it), or its second one of what a loop stacks: [layers, rows, ...].
    Carries of a parameter's own shape are left out. So that no other width passes for rows, choose
    `rows` with a prime factor that no width of the model has.

    Args:
        module: of `propagated`. Its mesh must have the axes "data" and "fsdp".
        rows: of the whole batch.

    Returns:
        Distinct carries, the largest first; empty when every loop is split.
    """
    sizes = axis_sizes(module)
    shards = math.prod(sizes.get(axis, 1) for axis in ROW_AXES)
    # Arguments that are not split as rows are taken for parameters.
    parameters = {shape for shape, axes in _arguments(module) if _shards(axes, 0, sizes) < shards}
    unsplit = []
    for carry in loop_carries(module):
        shape = carry.shape
        if shards == 1 or shape in parameters or shape[1:] in parameters:
            continue
        at = [i for i, size in enumerate(shape[:2]) if size and size % rows == 0]
        if at and _shards(carry.axes, at[0], sizes) < shards:
            unsplit.append(carry)
    return unsplit


def propagated(lowered: Any) -> Any:
    """A lowered program's module (of MLIR) after propagation.

    It takes a second for a small train step, so that one serves all that is asked of a program.

    Args:
        lowered: what `jax.jit(...).lower(...)` or `.trace(...).lower()` returns, for a mesh of
            several devices. It is left as it is.
    """
    module = lowered.compiler_ir("stablehlo")
    with module.context:
        # The pass rewrites what it runs on, and `lowered.compile()` must not see that.
        copy = module.operation.clone()
        PassManager.parse("builtin.module(sdy-propagation-pipeline)").run(copy.operation)
    return copy.operation


def result_axes(op: Any) -> list[Axes]:
    """How each result of an operation lies; whole where propagation says nothing."""
    if _GIVEN not in op.attributes:
        return [((),) * len(shape_and_type(result.type)[0]) for result in op.results]
    each = sdy.TensorShardingPerValueAttr(op.attributes[_GIVEN]).shardings
    return [_axes(sharding) for sharding in each]


def _axes(sharding: Any) -> Axes:
    shardings = sdy.TensorShardingAttr(sharding).dimension_shardings
    dimensions = [sdy.DimensionShardingAttr(dimension) for dimension in shardings]
    return tuple(tuple(sdy.AxisRefAttr(axis).name for axis in d.axes) for d in dimensions)


def shape_and_type(kind: Any) -> tuple[tuple[int, ...], str]:
    """Shape and element type of a ranked tensor's type."""
    tensor = ir.RankedTensorType(kind)
    return tuple(tensor.shape), str(tensor.element_type)


def _arguments(module: Any) -> Iterator[tuple[tuple[int, ...], Axes]]:
    """Shape and place of every argument of the program."""
    main = next(op for op in operations(module, "func.func") if _name(op) == "main")
    kinds = ir.FunctionType(ir.TypeAttr(main.attributes["function_type"]).value).inputs
    for kind, facts in zip(kinds, ir.ArrayAttr(main.attributes["arg_attrs"]), strict=True):
        shape, facts = shape_and_type(kind)[0], ir.DictAttr(facts)
        yield shape, _axes(facts[_GIVEN]) if _GIVEN in facts else ((),) * len(shape)


def axis_sizes(module: Any) -> dict[str, int]:
    """Size of every mesh axis that a module names."""
    sizes: dict[str, int] = {}
    for op in operations(module, "sdy.mesh"):
        axes = [sdy.MeshAxisAttr(axis) for axis in sdy.MeshAttr(op.attributes["mesh"]).axes]
        sizes |= {axis.name: axis.size for axis in axes}
    return sizes


def operations(module: Any, kind: str) -> list[Any]:
    """All operations of a kind, such as "stablehlo.while", in a module."""
    matches: list[Any] = []

    def visit(op: Any) -> Any:
        if op.name == kind:
            matches.append(op)
        return ir.WalkResult.ADVANCE

    module.walk(visit)
    return matches


def _name(function: Any) -> str:
    return ir.StringAttr(function.attributes["sym_name"]).value


def _shards(axes: Axes, dimension: int, sizes: dict[str, int]) -> int:
    # A scalar has no dimension that could be split.
    return math.prod(sizes[axis] for axis in axes[dimension]) if axes else 1
