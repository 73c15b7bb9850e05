"""Which mesh, rematerialization and batch a machine should run a config with.

Operations and what loops keep come from one trace each of the kinds of rematerialization, state
from the rules of every mesh; what travels and what is alive for a moment are estimated. Compiled,
the best few are measured instead, and a batch that does not fit is halved until it does.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vla_jax.config import Config, ConfigError
from vla_jax.plan import measured, outline, programs, report
from vla_jax.plan.compiled import EFFICIENCY
from vla_jax.plan.machines import Machine, stand_ins
from vla_jax.plan.measured import Measured
from vla_jax.plan.outline import Outline

_REMAT = ("full", "dots", "none")
_WINDOWS = (1, 2, 4, 8, 16, 32)
# Values as large as the largest one that are alive at the same time in a layer's gradient; a
# rough figure from compiled programs, which --compile replaces.
_ALIVE = 10
# Bytes moved over those of the products' operands and results; 2.4 to 3 without fused attention.
_MOVED = 2.5
_COMPILED = 3  # candidates that --compile measures


@dataclass(frozen=True)
class Candidate:
    """One way to run.

    Attributes:
        config: with its mesh and rematerialization.
        mesh: axis -> size.
        windows: of a row block.
        rows: of a step.
        memory: estimated bytes a device.
        seconds: estimated of a step.
        measured: from the compiler, or None.
    """

    config: Config
    mesh: dict[str, int]
    windows: int
    rows: int
    memory: float
    seconds: float
    measured: Measured | None = None

    @property
    def rate(self) -> float:
        """Windows a second, as well as it is known."""
        time = self.measured.roofline if self.measured else None
        return self.rows / (time.seconds if time else self.seconds)

    @property
    def flags(self) -> str:
        """Flags to give to launch/train.py."""
        mesh = " ".join(f"--config.mesh.{axis}={size}" for axis, size in self.mesh.items())
        remat = f"--config.model.remat={self.config.model.remat}"
        return f"{mesh} {remat} --config.train.batch_size={self.rows}"


@dataclass(frozen=True)
class Sweep:
    """What was tried.

    Attributes:
        candidates: that fit, the fastest first.
        refused: how many do not fit or cannot be.
        best: outline of the first candidate, or None if nothing fits.
    """

    candidates: list[Candidate]
    refused: int
    best: Outline | None


def sweep(config: Config, machine: Machine, compiled: bool = False) -> Sweep:
    """Try all; `compiled` measures the best few.

    Raises:
        ConfigError: no mesh at all can be had.
        PlanError: there is no compiler for the machine.
    """
    candidates, refused = _estimates(config, machine)
    # Nearly as fast: the simpler mesh.
    candidates.sort(key=lambda each: (-_rounded(each.rate), each.mesh["tensor"], each.mesh["data"]))
    if compiled:
        tried = [_measure(each, machine) for each in _distinct(candidates)]
        fitting = [each for each in tried if each is not None]
        refused += len(tried) - len(fitting)
        candidates = sorted(fitting, key=lambda each: -each.rate)
    best = (
        outline.outline(candidates[0].config, machine, candidates[0].windows)
        if candidates
        else None
    )
    return Sweep(candidates, refused, best)


def _estimates(config: Config, machine: Machine) -> tuple[list[Candidate], int]:
    devices, chip, candidates, refused = stand_ins(machine), machine.chip, [], 0
    sketches: dict[str, Outline] = {}
    problems = []
    for mesh in meshes(machine):
        shape = dataclasses.replace(config.mesh, **mesh)
        placed = dataclasses.replace(config, mesh=shape)
        # The smallest batch that can be: a window for each part of a step.
        windows = config.train.accumulate
        try:
            state_sizes = programs.state_bytes(programs.train_program(placed, devices, windows))
        except ConfigError as error:
            problems.append(str(error))
            continue
        for remat in _REMAT:
            model = dataclasses.replace(config.model, remat=remat)
            each = dataclasses.replace(placed, model=model)
            # Traced once for all meshes, because tracing is the slow part and bytes scale.
            if remat not in sketches:
                sketches[remat] = outline.outline(each, machine, windows)
            sketch, full = sketches[remat], sketches["full"]
            for count in _WINDOWS:
                rows = count * windows * mesh["data"] * mesh["fsdp"]
                scale = count * windows / sketch.windows
                residuals = sum(sketch.residuals.values()) * count
                alive = max((size for *_, size in sketch.largest), default=0.0) * count
                # The gradients take as much again as the trainable parameters.
                state = sum(state_sizes.values()) + state_sizes["params"]
                memory = state + residuals + _ALIVE * alive / mesh["tensor"]
                if memory > chip.memory:
                    refused += 1
                    continue
                fraction = rows / sketch.rows
                # With full recomputation a loop keeps the input of each layer and no more: these
                # bytes stand for the activations that a tensor axis adds up.
                wire = _wire(sketch, mesh, scale * sum(full.residuals.values()))
                hbm = _MOVED * sketch.product_bytes * fraction + _weights(sketch, mesh)
                seconds = max(
                    sketch.flops * fraction / chip.flops, hbm / chip.bandwidth, wire / chip.link
                )
                seconds /= EFFICIENCY
                candidates.append(Candidate(each, mesh, count * windows, rows, memory, seconds))
    # A mesh that is refused is no fault while another one will do.
    if problems and not sketches:
        raise ConfigError("no mesh of this machine will do:\n  " + "\n  ".join(set(problems)))
    return candidates, refused


def meshes(machine: Machine) -> Iterator[dict[str, int]]:
    """Meshes worth a try: the tensor axis in a host, "data" over slices at the least."""
    for tensor, fsdp in itertools.product((1, 2, 4, 8), _powers(machine.size)):
        if machine.size % (tensor * fsdp) or tensor > machine.chip.host:
            continue
        data = machine.size // (tensor * fsdp)
        if data % machine.slices == 0:
            yield {"data": data, "fsdp": fsdp, "tensor": tensor}


def _powers(limit: int) -> list[int]:
    return [2**i for i in range(limit.bit_length()) if 2**i <= limit]


def _rounded(rate: float) -> float:
    # Estimates are no better than two digits; equal ones are ordered by their mesh.
    return float(f"{rate:.2g}")


def _wire(sketch: Outline, mesh: dict[str, int], layers: float) -> float:
    """Bytes a device sends, estimated from how such programs come out.

    In bfloat16 all weights are gathered twice and their gradients scattered once over "fsdp", and
    added up over "data"; with a tensor axis six activations a layer are added up.
    """
    data, fsdp, tensor = (mesh[axis] for axis in ("data", "fsdp", "tensor"))
    weights = 2.0 * sketch.parameters[0] / tensor
    gathered = 3 * weights * (fsdp - 1) / fsdp
    replicas = 2 * weights / fsdp * (data - 1) / data
    return gathered + replicas + 12 * layers * (tensor - 1) / tensor


def _weights(sketch: Outline, mesh: dict[str, int]) -> float:
    """Bytes moved whatever the batch: weights gathered and read, the optimizer's state."""
    held = sketch.parameters[0] / mesh["tensor"]
    return 12.0 * held + 28.0 * sketch.parameters[1] / (mesh["tensor"] * mesh["fsdp"])


def _distinct(candidates: list[Candidate]) -> list[Candidate]:
    """The best few that differ in more than the batch."""
    # They come sorted, so that the first of each kind is the fastest of its batches.
    best: dict[Any, Candidate] = {}
    for each in candidates:
        best.setdefault((*each.mesh.values(), each.config.model.remat), each)
    return list(best.values())[:_COMPILED]


def _measure(candidate: Candidate, machine: Machine) -> Candidate | None:
    windows = candidate.windows
    # Each part of a step needs a window.
    least = candidate.config.train.accumulate
    while windows >= least:
        result = measured.train_step(candidate.config, machine, windows)
        if result.fits:
            rows = candidate.rows * windows // candidate.windows
            return dataclasses.replace(candidate, windows=windows, rows=rows, measured=result)
        # The estimate was too bold.
        windows //= 2
    return None


def lines(result: Sweep) -> Iterator[str]:
    """A table, the fastest first, and what to take."""
    yield f"{len(result.candidates)} ways fit, {result.refused} do not"
    if not result.candidates:
        yield "nothing fits: take more devices, a smaller batch, LoRA or frozen towers"
        return
    yield "data fsdp tensor remat windows    GiB  windows/s"
    for each in result.candidates[:12]:
        memory = each.measured.memory["total"] if each.measured else each.memory
        data, fsdp, tensor = each.mesh.values()
        yield (
            f"{data:4} {fsdp:4} {tensor:6} {each.config.model.remat:5} {each.windows:7} "
            f"{memory / 2**30:6.1f} {each.rate:10.0f}" + ("" if each.measured else " (estimated)")
        )
    yield "take: " + result.candidates[0].flags


def to_json(machine: Machine, result: Sweep) -> dict[str, Any]:
    """The recommended plan, as `report.to_json` gives it, and all that was tried."""
    tried = [
        {
            "mesh": each.mesh,
            "remat": each.config.model.remat,
            "batch_size": each.rows,
            "bytes": each.measured.memory["total"] if each.measured else each.memory,
            "windows_per_second": each.rate,
            "compiled": each.measured is not None,
        }
        for each in result.candidates
    ]
    if result.best is None:
        return {"topology": machine.name, "fits": False, "tried": tried, "recommended": None}
    first = result.candidates[0]
    plan = report.to_json(machine, result.best, first.measured)
    return {**plan, "tried": tried, "recommended": first.flags}
