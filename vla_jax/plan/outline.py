"""What can be said of a run on a machine in seconds, without a compiler for it."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax

from vla_jax.config import Config
from vla_jax.plan import compilers, loops, programs
from vla_jax.plan.machines import Machine, stand_ins
from vla_jax.train import mesh as meshes
from vla_jax.train import propagation, trace

# Windows of a row block whose loops are looked at, whatever the batch: what they keep grows with
# the rows, and a prime factor that no width has tells rows from widths.
_TRACED = 13


@dataclass(frozen=True)
class Outline:
    """What is known of a train step without compiling it.

    Attributes:
        mesh: axis -> size.
        rows: windows of a step, over all devices.
        blocks: that the rows are split into, data x fsdp.
        blocks_of_process: row blocks that each process feeds, one number if all have as many.
        straddling: row blocks that lie in more than one process; such a mesh mixes up the batch.
        parameters: in all, and those that train.
        flops: operations of a step a device.
        forward: of its forward pass.
        product_bytes: operands and results of a step's products a device.
        randoms: random words drawn in a step, over all devices.
        state: kind -> bytes a device of what a step is given.
        residuals: loop -> bytes a device that the forward pass leaves for the backward pass.
        unsplit: loop values of which every device holds all rows.
        largest: type, shape over all devices, bytes a device if it is split, of the largest values
            of one layer.
    """

    mesh: dict[str, int]
    rows: int
    blocks: int
    blocks_of_process: tuple[int, ...]
    straddling: int
    parameters: tuple[int, int]
    flops: float
    forward: float
    product_bytes: float
    randoms: int
    state: dict[str, int]
    residuals: dict[str, int]
    unsplit: list[str]
    largest: list[tuple[str, tuple[int, ...], float]] = field(default_factory=list)

    @property
    def windows(self) -> float:
        """Windows of a row block."""
        return self.rows / self.blocks

    @property
    def least_bytes(self) -> dict[str, int]:
        """Bytes a device by kind that a step needs at the least."""
        gradients = {"gradients": self.state["params"]}
        sizes = {**self.state, **gradients, "residuals": sum(self.residuals.values())}
        return {**sizes, "total": sum(sizes.values())}


def outline(config: Config, machine: Machine, windows: int = 0) -> Outline:
    """Trace the train step of a config for a machine and propagate its shardings.

    Args:
        config: of the run.
        machine: where it would run.
        windows: of a row block in place of the config's batch size; 0 = the config's.

    Raises:
        ConfigError: the mesh does not fit the machine, or the batch does not fit the mesh.
    """
    devices = stand_ins(machine)
    asked = programs.train_program(config, devices, windows)
    params = asked.template.params
    with compilers.answering_for(machine):
        work = trace.count(asked.step.trace(asked.template, asked.batch).jaxpr)
    forward = trace.count(jax.make_jaxpr(asked.forward)(params, asked.batch))
    # The loops.
    # So many windows that no dimension of the model is taken for rows of the batch.
    prime = programs.resized(asked, _TRACED * config.train.accumulate * asked.blocks)
    shapes = [leaf.shape for leaf in jax.tree.leaves(params)]
    rows = prime.rows // config.train.accumulate
    with compilers.answering_for(machine):
        traced = prime.step.trace(prime.template, prime.batch)
        module = propagation.propagated(traced.lower())
    scale = asked.rows / prime.rows
    residuals = loops.residual_bytes(loops.loop_values(module), shapes, rows, scale)
    unsplit = propagation.unsplit_carries(module, rows)

    def scaled(shape: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(round(n * scale) if n % rows == 0 else n for n in shape)

    # Who feeds which rows.
    blocks, straddling = row_blocks(asked)
    train, still = (
        sum(math.prod(x.shape) for x in tree.values())
        for tree in (asked.template.trainable, asked.template.frozen)
    )
    size = asked.mesh.size
    return Outline(
        mesh=dict(asked.mesh.shape),
        rows=asked.rows,
        blocks=asked.blocks,
        blocks_of_process=blocks,
        straddling=straddling,
        parameters=(train + still, train),
        flops=work.total / size,
        forward=forward.total / size,
        product_bytes=work.product_bytes / size,
        randoms=work.randoms,
        state=programs.state_bytes(asked),
        residuals=residuals,
        unsplit=[str(dataclasses.replace(x, shape=scaled(x.shape))) for x in unsplit],
        largest=[
            (dtype, scaled(shape), nbytes * scale / asked.blocks)
            for dtype, shape, nbytes in trace.count(traced.jaxpr).top(100)
            if shape and shape[0] % rows == 0  # stacks of layers are among the residuals
        ][:6],
    )


def row_blocks(program: programs.TrainProgram) -> tuple[tuple[int, ...], int]:
    """(row blocks a process has, row blocks that lie in several processes)."""
    where = meshes.batch_sharding(program.mesh)
    processes: dict[Any, set[int]] = {}
    for device, index in where.devices_indices_map((program.blocks,)).items():
        processes.setdefault(str(index), set()).add(device.process_index)
    # A block in several processes counts for one of them; it is reported as a fault anyway.
    homes: Sequence[int] = [min(owners) for owners in processes.values()]
    counts = {homes.count(home) for home in set(homes)}
    return tuple(sorted(counts)), sum(len(owners) > 1 for owners in processes.values())
