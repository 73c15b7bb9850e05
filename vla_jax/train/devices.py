"""Which device stands where in the mesh, so that fast links join what talks most.

Three facts of a machine count. Devices belong to processes, and each process feeds the rows of its
own devices: a row of the batch must not lie in two. TPU chips stand on a torus, whose neighbors are
joined. And several TPU slices are joined by the data center's network alone, which is slow.
"""

import collections
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.experimental import mesh_utils

from vla_jax.config import ConfigError

Shape = tuple[int, int, int]  # data, fsdp, tensor


def arrange(shape: Shape, devices: Sequence[Any]) -> np.ndarray:
    """The devices as an array of this shape.

    The tensor axis stays inside a process. Over several TPU slices, "data" is what crosses them:
    gradients once a step, where "fsdp" would send the weights of every layer.

    Args:
        shape: (data, fsdp, tensor); their product is the number of devices.
        devices: real or abstract ones.

    Raises:
        ConfigError: naming the meshes that this machine can be cut into instead.
    """
    slices = _grouped(devices, _slice)
    if shape[0] % len(slices):
        raise ConfigError(
            f"mesh.data: the {len(devices)} devices are {len(slices)} slices, which only the "
            f"network of the data center joins, so data must be a multiple of {len(slices)}, not "
            f"{shape[0]}; mesh.data={len(slices)} with mesh.fsdp=-1 splits the weights over a slice"
        )
    processes = _grouped(devices, lambda device: device.process_index)
    inside = min(len(local) for local in processes)
    if len(processes) > 1 and any(len(local) % shape[2] for local in processes):
        sizes = [size for size in range(1, inside + 1) if inside % size == 0]
        raise ConfigError(
            f"mesh.tensor: {shape[2]} does not divide the {inside} devices of a process, and a row "
            f"of the batch cannot live in two processes; mesh.tensor may be one of {sizes}"
        )
    # Slices follow each other along "data", the only axis that may cross the network.
    part = (shape[0] // len(slices), *shape[1:])
    return np.concatenate([_in_slice(part, members) for members in slices])


def _in_slice(shape: Shape, devices: Sequence[Any]) -> np.ndarray:
    """One slice, or everything that is no TPU."""
    if devices[0].platform == "tpu":
        # jax knows which way round each torus is fast; a process it does not look at.
        mesh = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        if not _straddles(mesh):
            return mesh
    # Processes in the order of their corners on the torus, and so the devices in each: a tensor
    # axis is then a line or a rectangle of neighbors, and the other axes step from host to host.
    processes = [sorted(x, key=_place) for x in _grouped(devices, lambda d: d.process_index)]
    ordered = sorted(processes, key=lambda local: _place(local[0]))
    return np.array([*itertools.chain(*ordered)], object).reshape(shape)


def _straddles(mesh: np.ndarray) -> bool:
    # A row of the last axis, "tensor", works on the same rows of the batch.
    return any(len({d.process_index for d in row}) > 1 for row in mesh.reshape(-1, mesh.shape[-1]))


def _slice(device: Any) -> int:
    # GPUs have the attribute too; there it counts hosts, over which any axis may go.
    return getattr(device, "slice_index", None) or 0 if device.platform == "tpu" else 0


def _place(device: Any) -> tuple[int, ...]:
    if device.platform != "tpu":
        return device.process_index, device.id
    return (*device.coords, device.core_on_chip)


def _grouped(devices: Sequence[Any], key: Callable[[Any], int]) -> list[list[Any]]:
    groups: dict[int, list[Any]] = collections.defaultdict(list)
    for device in devices:
        groups[key(device)].append(device)
    # In a fixed order, since every process must come to the same mesh.
    return [groups[number] for number in sorted(groups)]
