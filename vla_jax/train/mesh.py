"""Which device holds what: one mesh, one ordered table of rules, one way in for a batch.

Axes of the mesh: "data" holds replicas of the parameters; "fsdp" splits parameters, gradients
and optimizer moments; "tensor" splits heads and hidden units. A batch is split over data x fsdp.
Model code sees little of this: `jax.jit` gets the shardings of its inputs and outputs, a model pins
the rows of its batch (`models.sharding`), and the compiler places the rest.
"""

import collections
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vla_jax import rules
from vla_jax.config import ConfigError, MeshConfig
from vla_jax.train.devices import arrange

logger = logging.getLogger(__name__)

T = TypeVar("T")

AXES = ("data", "fsdp", "tensor")
# Below this many elements a parameter that only the last rule catches is not worth a collective.
MIN_SHARDED = 2**18
# TPU's compiler would pass small parts of a kernel around while a product runs, and read and write
# all tokens once for each: planned for 16 v5e, four times the bytes of a step.
WHOLE_KERNELS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 100_000}
LARGEST = "largest"  # the last rule's value: the largest divisible dimension over fsdp

# Path regex -> axes of the TRAILING dimensions; the leading one of a stack is the scan's and never
# split.
SHARDING_RULES: tuple[tuple[str, tuple[str | None, ...] | str], ...] = (
    # Low-rank factors [in, rank], [rank, out]: the rank is too small to split.
    (r"lora_a$", ("fsdp", None)),
    (r"lora_b$", (None, "fsdp")),
    # Vectors and small tables: biases, norms, learned positions, queries, single tokens.
    (r"(bias|/scale|positions|queries|_token)$", ()),
    # A recurrent kernel is read at every time step; split, it costs an all-to-all in each
    # (16 measured in one LSTM head's loop, two with it whole).
    (r"state_kernel$", ()),
    # Heads [in, out], but for the stacked layers of some: too small for tensor parallelism.
    (r"^head/(?!.*layers/).*kernel$", ("fsdp", None)),
    # Attention: q, k, v [d, heads, head width], output [heads, head width, d].
    (r"/(q|k|v)/kernel$", ("fsdp", "tensor", None)),
    (r"/o/kernel$", ("tensor", None, "fsdp")),
    # Feed-forward in and gate, then out.
    (r"/(fc1|fc3|gate|up)/kernel$", ("fsdp", "tensor")),
    (r"/(fc2|down)/kernel$", ("tensor", "fsdp")),
    # Token tables [v, d]: vocabularies are odd sizes and a split row gathers badly.
    (r"embedding$", (None, "fsdp")),
    # Other projections [in, out].
    (r"/(patch|dense|film_scale|film_shift)/kernel$", (None, "fsdp")),
    (r"", LARGEST),
)


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over all devices; an axis of -1 takes those that the others leave.

    Raises:
        ConfigError: if the axes do not multiply to the number of devices, or the machine cannot be
            cut so; see `devices.arrange`.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = [config.data, config.fsdp, config.tensor]
    if any(size == 0 or size < -1 for size in shape) or shape.count(-1) > 1:
        raise ConfigError(f"mesh: axes must be positive, at most one -1, not {_show(shape)}")
    fixed = math.prod(size for size in shape if size != -1)
    is_valid = len(devices) % fixed == 0 if -1 in shape else len(devices) == fixed
    if not is_valid:
        asked = f"{fixed} x n" if -1 in shape else str(fixed)
        raise ConfigError(
            f"mesh: {_show(shape)} asks for {asked} devices, but there are {len(devices)} "
            f"{devices[0].platform} devices; set one axis to -1 to take what is left"
        )
    data, fsdp, tensor = (len(devices) // fixed if size == -1 else size for size in shape)
    # Auto: under the default, Explicit, with_sharding_constraint is an assertion and patch
    # embedding, sharded gathers and the LSTM scan fail to type.
    kinds = (AxisType.Auto,) * len(AXES)
    return Mesh(arrange((data, fsdp, tensor), devices), AXES, axis_types=kinds)


def _show(shape: Sequence[int]) -> str:
    return ", ".join(f"{axis}={size}" for axis, size in zip(AXES, shape, strict=True))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds all of it."""
    return NamedSharding(mesh, PartitionSpec())


def param_specs(
    params: Mapping[str, Any], mesh: Mesh, min_sharded: int = MIN_SHARDED
) -> dict[str, PartitionSpec]:
    """Slash path -> PartitionSpec for a flat dict of arrays or shape structs.

    An axis that does not divide its dimension leaves that dimension whole.
    """
    matches = rules.match_all(SHARDING_RULES, list(params))
    specs, caught = {}, []
    for path, axes in matches.items():
        shape = tuple(params[path].shape)
        free = len(shape) - bool(rules.STACKED.search(path))
        if isinstance(axes, str) or len(axes) > free:  # the last rule, or one for a higher rank
            axes = _largest(shape, free, mesh.shape["fsdp"], min_sharded)
            # Small ones are whole on purpose; a large one lacks a rule of its own.
            if math.prod(shape) >= min_sharded:
                caught.append(f"{path} {list(shape)} -> {axes or 'replicated'}")
        specs[path] = _fit(_turned(axes, shape, mesh), shape, mesh)
    if caught:
        listing = "\n  ".join(caught)
        logger.info("%d large parameters only the last rule catches:\n  %s", len(caught), listing)
    return specs


def param_shardings(
    params: Mapping[str, Any], mesh: Mesh, min_sharded: int = MIN_SHARDED
) -> dict[str, NamedSharding]:
    """`param_specs` on the mesh."""
    specs = param_specs(params, mesh, min_sharded)
    return {path: NamedSharding(mesh, spec) for path, spec in specs.items()}


def _largest(shape: tuple[int, ...], free: int, size: int, least: int) -> tuple[str | None, ...]:
    # The leading axis of a stack is the scan's.
    trailing = shape[len(shape) - free :]
    legal = [i for i, n in enumerate(trailing) if n % size == 0]
    if math.prod(shape) < least or not legal:
        return ()
    best = max(legal, key=lambda i: trailing[i])
    return tuple("fsdp" if i == best else None for i in range(free))


def _turned(
    axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh
) -> tuple[str | None, ...]:
    """The same for the kernels of outputs, along what a product sums over, where that is as good.

    GPUs gather parts of the last axis only from a stack that is laid out the other way round, so a
    step would hold a second one of all layers, in float32.
    """
    is_output = len(axes) > 1 and (axes[0], axes[-1]) == ("tensor", "fsdp")
    on_gpus = mesh.devices.flat[0].platform == "gpu" and mesh.shape["tensor"] == 1
    if not is_output or not on_gpus or shape[-len(axes)] % mesh.shape["fsdp"]:
        return axes
    return ("fsdp", *(None,) * (len(axes) - 1))


def _fit(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    spec: list[str | None] = [None] * (len(shape) - len(axes)) + list(axes)
    for i, axis in enumerate(spec):
        if axis is not None and (mesh.shape[axis] == 1 or shape[i] % mesh.shape[axis]):
            # jax refuses uneven splits, and a split over one device is none.
            spec[i] = None
    return PartitionSpec(*spec) if any(spec) else PartitionSpec()


def compiler_options(mesh: Mesh) -> dict[str, Any] | None:
    """For `jax.jit`, of steps on this mesh; None where the compiler's defaults do."""
    # Along a tensor axis it is tokens that pass around, which pays.
    is_whole = mesh.devices.flat[0].platform == "tpu" and mesh.shape["tensor"] == 1
    return WHOLE_KERNELS if is_whole else None


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over data x fsdp; everything else whole."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def check_batch(
    batch_size: int, mesh: Mesh, accumulate: int = 1, name: str = "train.batch_size"
) -> None:
    """Refuse a global batch that devices, parts or processes cannot share evenly.

    Args:
        batch_size: rows of a step over all processes.
        mesh: of the run.
        accumulate: parts a step goes through the batch in.
        name: of the config key to blame.

    Raises:
        ConfigError: naming the sizes.
    """
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    processes = len({device.process_index for device in mesh.devices.flat})
    problems = []
    if batch_size % rows:
        problems.append(f"{name}: {batch_size} is not a multiple of data x fsdp = {rows} devices")
    elif batch_size % (rows * accumulate):
        problems.append(
            f"{name}: {batch_size} is not a multiple of data x fsdp x train.accumulate = "
            f"{rows} x {accumulate}"
        )
    if batch_size % processes:
        problems.append(f"{name}: {batch_size} is not a multiple of {processes} processes")
    if shared := _shared_rows(mesh):
        problems.append(
            f"mesh: rows {shared} of every {rows} lie in several processes, each of which would "
            "feed its own; mesh.tensor must divide the devices of a process"
        )
    if problems:
        raise ConfigError("\n".join(problems))


def _shared_rows(mesh: Mesh) -> list[int]:
    """Which of the blocks that a batch is cut into have devices of two processes."""
    blocks = math.prod(mesh.shape[axis] for axis in ("data", "fsdp"))
    owners: dict[int, set[int]] = collections.defaultdict(set)
    for device, index in batch_sharding(mesh).devices_indices_map((blocks,)).items():
        # The slice of an axis that is not split has no start.
        owners[index[0].start or 0].add(device.process_index)
    return sorted(block for block, processes in owners.items() if len(processes) > 1)


def shard_batch(local: T, mesh: Mesh) -> T:
    """This process's rows -> the global rows, split by `batch_sharding`.

    Args:
        local: a `Batch`, or any pytree of numpy arrays with rows in dimension 0.
        mesh: of the run.
    """
    sharding = batch_sharding(mesh)

    def place(leaf: Any) -> jax.Array:
        # A process loads its own rows alone; the global batch exists on the devices only.
        return jax.make_array_from_process_local_data(sharding, np.asarray(leaf))

    return jax.tree.map(place, local)


class InFlight:
    """Bounds how many steps the host is ahead of the devices.

    A dispatched step has taken its batch along. Without a bound batches gather on the devices, and
    the host waits for the loader although nothing else does. On several virtual CPU devices the
    next step must not begin before the last has ended: with more in flight runs were seen to hang.

    Args:
        mesh: what the steps run on.
    """

    def __init__(self, mesh: Mesh):
        several = mesh.size > 1 and mesh.devices.flat[0].platform == "cpu"
        self._ahead = 0 if several else 2  # two hide the host's own work
        self._steps: collections.deque[Any] = collections.deque()

    def add(self, step: Any) -> list[Any]:
        """A step was dispatched; waits while too many are not done.

        Args:
            step: what the step returned, and what else is to be known of it when it is done.

        Returns:
            Those of the earlier ones that are done now, oldest first.
        """
        self._steps.append(step)
        return self._finish(self._ahead)

    def drain(self) -> list[Any]:
        """Wait for all; returns those that `add` has not."""
        return self._finish(0)

    def _finish(self, left: int) -> list[Any]:
        done = [self._steps.popleft() for _ in range(len(self._steps) - left)]
        return jax.block_until_ready(done)
