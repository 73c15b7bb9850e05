"""What the compiler of a machine makes of the product's steps: memory, work and time."""

import time
from dataclasses import dataclass
from typing import Any

from vla_jax.config import Config
from vla_jax.plan import compiled, compilers, programs
from vla_jax.plan.compiled import Roofline, Work
from vla_jax.plan.machines import Machine
from vla_jax.plan.outline import Outline


@dataclass(frozen=True)
class Measured:
    """Of one compiled step.

    Attributes:
        memory: kind -> bytes a device, with their total.
        fits: whether that is no more than the device has.
        work: of a device; None where the compiler refused the program.
        roofline: of that work; None likewise.
        seconds: that the compiler took.
    """

    memory: dict[str, int]
    fits: bool
    work: Work | None
    roofline: Roofline | None
    seconds: float


@dataclass(frozen=True)
class Control(Measured):
    """A control step on one device, as its compiler measures it.

    Attributes:
        weights: bytes of the parameters in bfloat16, which every step must read once.
        history: bytes that one session remembers.
        sessions: served in one pass.
    """

    weights: int = 0
    history: int = 0
    sessions: int = 1


def train_step(config: Config, machine: Machine, windows: int = 0) -> Measured:
    """Compile the train step of a config for a machine.

    Args:
        config: of the run.
        machine: where it would run.
        windows: of a row block in place of the config's batch size; 0 = the config's.

    Raises:
        PlanError: there is no compiler for it.
        ConfigError: the mesh does not fit the machine, or the batch does not fit the mesh.
    """
    program = programs.train_program(config, compilers.devices(machine), windows)
    with compilers.answering_for(machine):
        lowered = program.step.trace(program.template, program.batch).lower()
    # The slow network joins slices of TPUs, but hosts of GPUs.
    across = machine.chip.platform == "tpu"
    domains = [
        getattr(device, "slice_index", None) or 0 if across else device.process_index
        for device in program.mesh.devices.flat
    ]
    # Of a program that it refuses the compiler says its temporaries and nothing else.
    argument_bytes = sum(programs.state_bytes(program).values())
    return _measured(lowered, machine, dict(program.mesh.shape), domains, argument_bytes)


def control_step(
    config: Config, machine: Machine, sessions: int = 1, weights: str = "bf16"
) -> Control:
    """Compile the control step of a config for one device of a machine.

    Args:
        config: of the run.
        machine: where it would run.
        sessions: that are served in one pass.
        weights: form in which they are kept, see `inference.weights`.

    Raises:
        PlanError: there is no compiler for it.
    """
    device = compilers.devices(machine)[0]
    program = programs.control_program(config, device, sessions, weights)
    with compilers.answering_for(machine):
        lowered = program.step.trace(*program.arguments).lower()
    argument_bytes = programs.device_bytes(program.arguments)
    options = dict(program.options or {})
    if weights == "int8":
        options |= compilers.WHOLE_NUMBERS[machine.chip.platform]
    # One device exchanges nothing, so any mesh of one will do.
    figures = _measured(lowered, machine, {"device": 1}, [0], argument_bytes, options)
    return Control(
        **vars(figures), weights=program.weights, history=program.history, sessions=sessions
    )


def _measured(
    lowered: Any,
    machine: Machine,
    mesh: dict[str, int],
    domains: list[int],
    argument_bytes: int,
    options: dict[str, Any] | None = None,
) -> Measured:
    began, chip = time.perf_counter(), machine.chip
    try:
        with compilers.answering_for(machine):
            program = compilers.compiled(lowered, machine, options)
    except Exception as error:  # of the runtime, which has no type of its own for this
        temporaries = compiled.refused(error)
        if temporaries is None:
            raise
        # The results of a step mostly take the place of its arguments.
        sizes = {"arguments": argument_bytes, "results": 0, "temporaries": temporaries}
        sizes["total"] = sum(sizes.values())
        return Measured(sizes, False, None, None, time.perf_counter() - began)
    # Before the text is read, which takes long for large programs.
    took = time.perf_counter() - began
    sizes = compiled.memory(program)
    work = compiled.read(program.as_text(), mesh, domains)
    fits = sizes["total"] <= chip.memory
    return Measured(sizes, fits, work, compiled.roofline(work, chip), took)


def largest_batch(outline: Outline, measured: Measured, machine: Machine) -> int:
    """The largest train.batch_size that fits, at the least; 0 if not one window a block does."""
    available, gradients = machine.chip.memory, outline.state["params"] // 2  # in bfloat16
    windows = compiled.largest_windows(measured.memory, outline.windows, available, gradients)
    return windows * outline.blocks
