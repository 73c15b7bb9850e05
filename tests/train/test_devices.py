"""Meshes on machines that are not here: devices that only say who and where they are."""

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from vla_jax.config import ConfigError, MeshConfig
from vla_jax.train import mesh as meshes

Shape = tuple[int, ...]
KINDS = {"v5e": "TPU v5 lite", "v6e": "TPU v6 lite", "v5p": "TPU v5p", "v4": "TPU v4"}


@dataclass(frozen=True)
class Device:
    """What `jax.Device` says of itself."""

    id: int
    process_index: int
    coords: tuple[int, int, int]
    core_on_chip: int = 0
    slice_index: int = 0
    platform: str = "tpu"
    device_kind: str = KINDS["v5e"]
    client: Any = None


def tpu(kind: str, torus: Shape, host: Shape, cores: int = 1, slices: int = 1) -> list[Device]:
    """Slices of a torus whose hosts have blocks of `host` chips."""
    collected, processes = [], itertools.count()
    for number in range(slices):
        owner: dict[Shape, int] = {}
        for place in itertools.product(*map(range, torus)):
            corner = tuple(a // b for a, b in zip(place, host, strict=True))
            if corner not in owner:
                owner[corner] = next(processes)
            coords: Any = (*place, 0)[:3]
            for core in range(cores):
                where = (owner[corner], coords, core, number)
                collected.append(Device(len(collected), *where, device_kind=KINDS.get(kind, kind)))
    return collected


def gpus(hosts: int, each: int = 8) -> list[Device]:
    """Hosts in no order; as jax numbers them, every host is a "slice" of its own."""
    devices = [
        Device(i, i // each, (0, 0, 0), 0, i // each, "gpu", "NVIDIA H100 80GB HBM3")
        for i in range(hosts * each)
    ]
    return devices[each:] + devices[:each]


def hosts_of_rows(mesh: Any) -> set[int]:
    """Over how many processes the blocks of a batch lie."""
    rows = mesh.devices.reshape(-1, mesh.devices.shape[-1])
    return {len({device.process_index for device in row}) for row in rows}


MACHINES = {
    "v5e:4x4": tpu("v5e", (4, 4), (2, 2)),
    "v5e:8x8": tpu("v5e", (8, 8), (2, 2)),
    "v5e:16x16": tpu("v5e", (16, 16), (2, 2)),
    "v6e:16x16": tpu("v6e", (16, 16), (2, 2)),
    "v5p:4x4x4": tpu("v5p", (4, 4, 4), (2, 2, 1)),
    "v4:4x4x4": tpu("v4", (4, 4, 4), (2, 2, 1)),
    "tpu7x:2x2x2": tpu("TPU7x", (2, 2, 2), (2, 2, 1), cores=2),
    "h100:64": gpus(8),
}


@pytest.mark.parametrize("shape", [(1, -1, 1), (2, -1, 1), (1, -1, 2), (1, -1, 4), (2, -1, 4)])
@pytest.mark.parametrize("machine", MACHINES)
def test_every_device_stands_somewhere_and_no_row_in_two_processes(machine, shape):
    devices = MACHINES[machine]
    mesh = meshes.make_mesh(MeshConfig(*shape), devices)
    assert mesh.axis_names == meshes.AXES
    assert mesh.devices.shape[::2] == shape[::2]
    assert sorted(device.id for device in mesh.devices.flat) == list(range(len(devices)))
    assert hosts_of_rows(mesh) == {1}
    meshes.check_batch(len(devices), mesh)


def test_a_tensor_axis_is_a_block_of_neighbors():
    mesh = meshes.make_mesh(MeshConfig(1, -1, 4), MACHINES["v5e:8x8"])
    for row in mesh.devices[0]:
        places = np.array([device.coords for device in row])
        assert (places.max(0) - places.min(0)).tolist() == [1, 1, 0]


def test_gpus_are_in_the_order_of_their_hosts():
    mesh = meshes.make_mesh(MeshConfig(8, 1, 8), MACHINES["h100:64"])
    assert [device.id for device in mesh.devices.flat] == list(range(64))


@pytest.mark.parametrize("machine", ["v5e:8x8", "h100:64"])
def test_a_tensor_axis_over_processes_is_refused_with_those_that_are_not(machine):
    inside = 4 if machine == "v5e:8x8" else 8
    sizes = [n for n in (1, 2, 4, 8) if n <= inside]
    with pytest.raises(ConfigError) as error:
        meshes.make_mesh(MeshConfig(1, -1, 16), MACHINES[machine])
    assert f"16 does not divide the {inside} devices of a process" in str(error.value)
    assert f"mesh.tensor may be one of {sizes}" in str(error.value)


@pytest.mark.parametrize("shape", [(2, -1, 1), (4, -1, 1), (2, -1, 4), (-1, 1, 1)])
def test_data_crosses_the_slices_and_nothing_else_does(shape):
    devices = tpu("v5e", (4, 4), (2, 2), slices=2)
    mesh = meshes.make_mesh(MeshConfig(*shape), devices)
    where = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    halves = np.split(where, 2)
    assert [{*half.flat} for half in halves] == [{0}, {1}]
    assert hosts_of_rows(mesh) == {1}
    meshes.check_batch(math.prod(mesh.devices.shape), mesh)


def test_weights_split_over_slices_are_refused_with_what_would_do():
    devices = tpu("v5e", (4, 4), (2, 2), slices=2)
    with pytest.raises(ConfigError, match=r"mesh\.data: .* 2 slices.* must be a multiple of 2"):
        meshes.make_mesh(MeshConfig(1, -1, 1), devices)


def test_a_mesh_whose_rows_lie_in_two_processes_is_refused_whoever_made_it():
    devices = np.array(MACHINES["v5e:4x4"], object).reshape(1, 4, 4)  # along the torus
    mesh = meshes.Mesh(devices, meshes.AXES)
    assert hosts_of_rows(mesh) == {2}
    with pytest.raises(ConfigError, match=r"rows \[0, 1, 2, 3\] of every 4 lie in several proc"):
        meshes.check_batch(16, mesh)
    with pytest.raises(ConfigError, match="6 is not a multiple of 4 processes"):
        meshes.check_batch(6, mesh)
