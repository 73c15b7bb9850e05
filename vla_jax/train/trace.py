"""What a traced step computes: operations and random numbers, counted without a compiler."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclass
class Count:
    """Counts over all devices.

    Attributes:
        flops: input type -> floating point operations of matrix products and convolutions, a
            multiplication and an addition counted as two.
        product_bytes: of these products' operands and results.
        randoms: random 32-bit words drawn.
        largest: (type, shape) -> bytes of the values that are computed.
    """

    flops: Counter[str] = field(default_factory=Counter)
    product_bytes: int = 0
    randoms: int = 0
    largest: dict[tuple[str, tuple[int, ...]], int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """All operations, whatever their type."""
        return sum(self.flops.values())

    def add(self, other: "Count") -> None:
        """Take in what another part of the program computes."""
        self.flops.update(other.flops)
        self.product_bytes += other.product_bytes
        self.randoms += other.randoms
        self.largest.update(other.largest)

    def top(self, count: int = 6) -> list[tuple[str, tuple[int, ...], int]]:
        """The largest values: type, shape, bytes."""
        ordered = sorted(self.largest.items(), key=lambda item: -item[1])
        return [(dtype, shape, size) for (dtype, shape), size in ordered[:count]]


def count(jaxpr: Any, times: int = 1) -> Count:
    """Count a jaxpr, loops multiplied; of the branches of a condition the most expensive one.

    Args:
        jaxpr: of `jax.make_jaxpr`, of a traced function, or an inner one.
        times: how often it runs.
    """
    total = Count()
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name = eqn.primitive.name
        operations = _operations(name, eqn)
        if operations:
            total.flops[str(eqn.invars[0].aval.dtype)] += operations * times
            arrays = [x.aval for x in (*eqn.invars, *eqn.outvars) if hasattr(x.aval, "shape")]
            total.product_bytes += times * sum(map(_nbytes, arrays))
        if name == "random_bits":
            total.randoms += times * sum(math.prod(out.aval.shape) for out in eqn.outvars)
        for out in eqn.outvars:
            if hasattr(out.aval, "shape"):
                total.largest[str(out.aval.dtype), tuple(out.aval.shape)] = _nbytes(out.aval)
        inner = [count(part, times * _repeats(name, eqn)) for part in _inner(eqn)]
        if name == "cond" and inner:
            inner = [max(inner, key=lambda branch: branch.total)]
        for part in inner:
            total.add(part)
    return total


def _operations(name: str, eqn: Any) -> int:
    if name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        left = eqn.invars[0].aval.shape
        out = math.prod(eqn.outvars[0].aval.shape)
        return 2 * out * math.prod(left[i] for i in contracted)
    if name == "conv_general_dilated":
        kernel, numbers = eqn.invars[1].aval.shape, eqn.params["dimension_numbers"]
        out = math.prod(eqn.outvars[0].aval.shape)
        # An output meets the whole kernel of its own channel.
        return 2 * out * math.prod(kernel) // kernel[numbers.rhs_spec[0]]
    if name.startswith("dot_product_attention"):
        # cuDNN's kernels, opaque to jax: q [b, n, h, d], k [b, m, h, d]. Two products forward; five
        # backward, which computes the scores anew.
        q, k = (eqn.invars[i].aval.shape for i in range(2))
        products = 5 if "bwd" in name else 2
        return 2 * products * math.prod(q) * k[1]
    if name == "pallas_call" and (estimate := eqn.params.get("cost_estimate")) is not None:
        return estimate.flops
    return 0


def _repeats(name: str, eqn: Any) -> int:
    if name == "scan":
        return eqn.params["length"]
    if name == "shard_map":  # the inside sees what one device has of each manual axis
        mesh = eqn.params["mesh"]
        manual = eqn.params.get("manual_axes", mesh.axis_names)
        return math.prod(mesh.shape[axis] for axis in manual)
    if name == "pallas_call":
        grid = eqn.params["grid_mapping"].grid
        # A size that is not known before the run counts as 1.
        return math.prod(size for size in grid if isinstance(size, int))
    return 1


def _inner(eqn: Any) -> Iterator[Any]:
    # Counted as a whole in `_operations`; what is inside must not count again.
    name = eqn.primitive.name
    if name.startswith("dot_product_attention"):
        return
    # A kernel that says what it computes may have loops whose length hangs on its place.
    if name == "pallas_call" and eqn.params.get("cost_estimate") is not None:
        return
    for value in eqn.params.values():
        # The branches of a condition are a tuple of programs.
        for part in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(part, "eqns") or hasattr(getattr(part, "jaxpr", None), "eqns"):
                yield part


def _nbytes(aval: Any) -> int:
    # Extended types, such as keys of random numbers, have no item size.
    size = 8 if jnp.issubdtype(aval.dtype, jax.dtypes.extended) else aval.dtype.itemsize
    return int(np.prod(aval.shape, dtype=np.int64)) * size
