"""Names of machines, "v5e:8x8", "2*v5e:8x8", "h100:16", and stand-ins for their devices.

A stand-in has all that a mesh, a trace and a lowering ask of a device, so that a step can be traced
and its shardings propagated for 256 chips in seconds, without a compiler for them.
"""

import difflib
import itertools
import math
import re
from dataclasses import dataclass, field
from typing import Any

from vla_jax.train.chips import CHIPS, Chip

_NAME = re.compile(r"(?:(\d+)\*)?([\w-]+):(\d+(?:x\d+)*)")


class PlanError(ValueError):
    """Something asked of a plan that cannot be had; the message says what can."""


@dataclass(frozen=True)
class Machine:
    """So many devices of one kind.

    Attributes:
        name: as given.
        chip: what one device can do.
        family: its name in `chips.CHIPS`.
        shape: chips along the axes of a slice's torus, or (devices,) of GPUs.
        slices: how many slices, joined by the data center's network.
    """

    name: str
    chip: Chip
    family: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def size(self) -> int:
        """Devices in all."""
        return self.slices * math.prod(self.shape) * self.chip.cores

    @property
    def processes(self) -> int:
        """Hosts in all."""
        # Part of a host is a process as well.
        return max(1, self.size // self.chip.host)


def parse(name: str) -> Machine:
    """The machine of a name.

    Raises:
        PlanError: no such machine; the message lists the known ones.
    """
    matched = _NAME.fullmatch(name.strip())
    if not matched:
        raise PlanError(f"--topology: {name!r} has not the form of a topology; known: {known()}")
    slices, family = int(matched[1] or 1), matched[2].lower()
    shape = tuple(map(int, matched[3].split("x")))
    if family not in CHIPS:
        near = difflib.get_close_matches(family, CHIPS, n=1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise PlanError(f"--topology: no chip {matched[2]!r}{hint}; known: {known()}")
    chip = CHIPS[family]
    problem = _wrong(chip, shape)
    if problem:
        raise PlanError(f"--topology: {name}: {problem}; known: {known(family)}")
    if slices < 1:
        raise PlanError(f"--topology: {name}: at least one slice")
    if slices > 1 and chip.platform != "tpu":
        raise PlanError(f"--topology: {name}: GPUs have no slices; name all of them, h100:64")
    return Machine(name.strip(), chip, family, shape, slices)


def known(family: str = "") -> str:
    """Topologies by example, for a message."""
    flat = "1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16"
    solid = "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 ..."
    rows = [
        f"{name}:{{{(flat, solid)[chip.rank - 2].replace(' ', ',')}}}"
        if chip.rank
        else f"{name}:{{1,2,4,8,16,24,...}}"
        for name, chip in CHIPS.items()
        if family in ("", name)
    ]
    several = [] if CHIPS.get(family, CHIPS["v5e"]).rank == 0 else ["SLICES*NAME, as 2*v5e:8x8"]
    return "; ".join([*rows, *several])


def _wrong(chip: Chip, shape: tuple[int, ...]) -> str:
    if not chip.rank:
        count = shape[0]
        if len(shape) > 1 or count < 1:
            return "name how many GPUs there are"
        # Part of a host is fine as long as hosts divide evenly.
        is_valid = count % chip.host == 0 or (count < chip.host and chip.host % count == 0)
        return "" if is_valid else f"hosts have {chip.host} GPUs, {count} are no whole hosts"
    if len(shape) != chip.rank:
        return f"its torus has {chip.rank} dimensions"
    if math.prod(shape) > chip.largest:
        return f"a slice has at most {chip.largest} chips"
    # A single chip is the exception: there are hosts with one.
    if set(shape) != {1} and any(size < 1 or size % 2 for size in shape[:2]):
        return "hosts have 2 x 2 chips, so the first two numbers are even"
    return "" if min(shape) > 0 else "every number must be positive"


@dataclass(frozen=True)
class _Client:
    """The runtime of a stand-in; its process is the first."""

    platform: str
    platform_version: str = "stand-in"
    runtime_type: str = "stand-in"

    def process_index(self) -> int:
        """Which process asks."""
        return 0


@dataclass(frozen=True)
class StandIn:
    """A device that is not here, with the attributes that jax and the mesh look at."""

    id: int
    process_index: int
    slice_index: int
    coords: tuple[int, ...]
    core_on_chip: int
    platform: str
    device_kind: str
    client: Any = field(repr=False)
    local_hardware_id: int = 0


def stand_ins(machine: Machine) -> list[StandIn]:
    """Devices of a machine by process, as the compilers' own topologies number them."""
    chip = machine.chip
    # jax calls the platform "gpu" where the compiler's plugin is called "cuda".
    client, platform = _Client(chip.platform), {"cuda": "gpu"}.get(chip.platform, chip.platform)
    devices: list[StandIn] = []
    for piece in range(machine.slices):
        for number, chips in enumerate(_hosts(machine)):
            # Processes count on from slice to slice.
            process = piece * machine.processes // machine.slices + number
            for local, (coords, core) in enumerate(itertools.product(chips, range(chip.cores))):
                devices.append(
                    StandIn(
                        len(devices),
                        process,
                        piece,
                        coords,
                        core,
                        platform,
                        chip.kind,
                        client,
                        local,
                    )
                )
    return devices


def _hosts(machine: Machine) -> list[list[tuple[int, ...]]]:
    """Coordinates of every host's chips."""
    if not machine.chip.rank:
        each = min(machine.chip.host, machine.size)
        return [[(0, 0, 0)] * each for _ in range(machine.size // each)]
    # A torus of two dimensions has one layer.
    x, y, z = (*machine.shape, 1)[:3]
    # A host has a square of 2 x 2 chips along the first two axes.
    a, b = min(2, x), min(2, y)
    # The order decides which devices the axes of a mesh join, so it has to be the compiler's own:
    # the first axis runs fastest.
    return [
        [(i + p, j + q, k) for q in range(b) for p in range(a)]
        for k in range(z)
        for j in range(0, y, b)
        for i in range(0, x, a)
    ]
