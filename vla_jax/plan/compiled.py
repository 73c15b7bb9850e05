"""What one device does in a compiled step: operations, bytes, exchanges, memory, and the time.

The time is a roofline: a step takes as long as its operations at the chip's peak, its bytes at the
memory's bandwidth or its exchanges at the links', whichever is longest. Real steps reach about
three quarters of that, so `seconds` is that bound divided by 0.75, and MFU is 3 times the
operations of the forward pass, recomputation not counted, over what the chip could have done in
this time.
"""

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vla_jax.plan import hlo, hlo_bytes, hlo_flops, hlo_wire
from vla_jax.plan.hlo_wire import Collective
from vla_jax.train.chips import Chip

# Share of the roofline that a real step reaches.
EFFICIENCY = 0.75


@dataclass(frozen=True)
class Work:
    """What one device does in one step.

    Attributes:
        flops: operations of matrix products.
        hbm_bytes: read and written in its main memory.
        classes: part of the model -> its share of these bytes.
        exchanges: with other devices.
        kernels: programs started one after the other, loops multiplied.
        given_bytes: of `hbm_bytes`, what kernels outside of loops read of the step's arguments,
            each as often as they do.
    """

    flops: float
    hbm_bytes: float
    classes: dict[str, float]
    exchanges: list[Collective]
    kernels: int
    given_bytes: float = 0.0

    @property
    def wire_bytes(self) -> float:
        """Bytes sent to other devices."""
        return sum((each.wire_bytes for each in self.exchanges), 0.0)


def read(text: str, mesh: Mapping[str, int], domains: Sequence[int]) -> Work:
    """The work in a compiled program's text.

    Args:
        text: of `compiled.as_text()`.
        mesh: axis -> size, in order.
        domains: host (GPU) or slice (TPU) of every device in the mesh's order.
    """
    # Not XLA's own cost analysis: it counts the body of a loop once, however often it runs.
    program = hlo.parse(text)
    flops, kernels, classes = 0.0, 0, defaultdict[str, float](float)
    for name, times, _ in program.runs():
        computation = program.get(name)
        for each in computation.values():
            flops += times * hlo_flops.flops(each, computation, program)
            size = hlo_bytes.moved(each, computation, program)
            # What moves nothing is no kernel of its own.
            if size:
                kernels += times
                classes[hlo_bytes.kind_of(each)] += size * times
    ordered = dict(sorted(classes.items(), key=lambda item: -item[1]))
    exchanges = hlo_wire.collectives(program, mesh, domains)
    of_arguments = hlo_bytes.of_arguments(program)
    return Work(flops, sum(classes.values(), 0.0), ordered, exchanges, kernels, of_arguments)


def memory(compiled: Any) -> dict[str, int]:
    """Bytes a device of a compiled step: what it is given, gives back, and needs meanwhile.

    "total" is what must fit: results that reuse the memory of arguments count once. XLA's own peak
    is lower, as not all is alive at the same time, but what it sets aside is this.
    """
    analysis = compiled.memory_analysis()
    sizes = {
        "arguments": analysis.argument_size_in_bytes,
        "results": analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        "temporaries": analysis.temp_size_in_bytes,
    }
    return {**sizes, "total": sum(sizes.values())}


def refused(error: Exception) -> int | None:
    """Bytes of temporaries of a program that its compiler refuses for want of memory, or None."""
    matched = re.search(r"HLO temporaries \(([\d.]+)([KMGT]?)\)", str(error))
    # Compilers word this error differently; this is libtpu's.
    matched = matched or re.search(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", str(error))
    if not matched:
        return None
    return int(float(matched[1]) * 1024 ** (" KMGT".index(matched[2] or " ")))


@dataclass(frozen=True)
class Roofline:
    """Seconds of a step by what bounds it.

    Attributes:
        compute: operations at the chip's bf16 peak.
        hbm: bytes at the memory's bandwidth.
        wire: exchanges at the links', one after the other.
    """

    compute: float
    hbm: float
    wire: float

    @property
    def bound(self) -> str:
        """The name of the longest of the three."""
        return max(("compute", "hbm", "wire"), key=lambda name: getattr(self, name))

    @property
    def seconds(self) -> float:
        """Seconds that a step is expected to take."""
        return max(self.compute, self.hbm, self.wire) / EFFICIENCY

    def mfu(self, forward: float, chip: Chip) -> float:
        """Model FLOPs utilization.

        Args:
            forward: operations of the forward pass a device.
            chip: of which kind the devices are.
        """
        return 3 * forward / (self.seconds * chip.flops)


def roofline(work: Work, chip: Chip) -> Roofline:
    """How long the work takes at the least."""
    # Exchanges take turns on the links, so their times add up.
    wire = sum((each.wire_bytes / speed(each, chip) for each in work.exchanges), 0.0)
    return Roofline(work.flops / chip.flops, work.hbm_bytes / chip.bandwidth, wire)


def speed(exchange: Collective, chip: Chip) -> float:
    """Bytes a second: the links', or the network's, where hosts or slices are crossed.

    Every device of a host has its share of the network, and a ring crosses it once a host.
    """
    if exchange.domains < 2:
        return chip.link
    return min(chip.link, chip.network * exchange.group / exchange.domains)


def largest_windows(
    sizes: Mapping[str, int], windows: float, available: float, gradients: int
) -> int:
    """Windows of a row block that fit, at the least.

    What a step needs meanwhile grows with the windows, but for the gradients; all else is taken to
    grow, so that other parts that do not leave some room.

    Args:
        sizes: of `memory`, compiled for `windows`.
        windows: of a row block.
        available: bytes of a device.
        gradients: bytes of them in the type that they are computed in.
    """
    fixed = min(gradients, sizes["temporaries"] // 2)
    free = available - (sizes["total"] - sizes["temporaries"]) - fixed
    return max(0, math.floor(windows * free / max(sizes["temporaries"] - fixed, 1)))
