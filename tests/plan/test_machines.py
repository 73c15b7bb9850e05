import collections

import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vla_jax.plan import machines
from vla_jax.train.chips import CHIPS


@pytest.mark.parametrize(
    ("name", "size", "processes", "slices"),
    [
        ("v5e:1x1", 1, 1, 1),
        ("v5e:2x2", 4, 1, 1),
        ("v5e:8x8", 64, 16, 1),
        ("2*v5e:8x8", 128, 32, 2),
        ("v6e:16x16", 256, 64, 1),
        ("v4:2x2x4", 16, 4, 1),
        ("v5p:4x4x4", 64, 16, 1),
        ("tpu7x:2x2x2", 16, 2, 1),
        ("h200:1", 1, 1, 1),
        ("h100:8", 8, 1, 1),
        ("H100:64", 64, 8, 1),
    ],
)
def test_names(name, size, processes, slices):
    machine = machines.parse(name)
    assert (machine.size, machine.processes, machine.slices) == (size, processes, slices)
    devices = machines.stand_ins(machine)
    assert [device.id for device in devices] == list(range(size))
    assert {device.process_index for device in devices} == set(range(processes))
    each = collections.Counter(device.process_index for device in devices)
    assert set(each.values()) == {size // processes}
    assert len({(d.slice_index, d.coords, d.core_on_chip) for d in devices}) == (
        size if machine.chip.rank else 1
    )


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("v5x:8x8", "no chip 'v5x', did you mean 'v5"),
        ("dojo:8", "no chip 'dojo'"),
        ("v5e", "not the form of a topology"),
        ("", "not the form of a topology"),
        ("v5e:8", "its torus has 2 dimensions"),
        ("v5p:8x8", "its torus has 3 dimensions"),
        ("v5e:3x2", "hosts have 2 x 2 chips"),
        ("v5e:32x32", "at most 256 chips"),
        ("h100:12", "12 are no whole hosts"),
        ("h100:0", "how many GPUs"),
        ("2*h100:8", "GPUs have no slices"),
        ("0*v5e:8x8", "at least one slice"),
    ],
)
def test_what_is_no_machine(name, reason):
    with pytest.raises(machines.PlanError, match=reason) as raised:
        machines.parse(name)
    assert "known: " in str(raised.value) or "slice" in reason


def test_an_unknown_chip_lists_the_known_ones():
    with pytest.raises(machines.PlanError) as raised:
        machines.parse("v9:2x2")
    assert all(name in str(raised.value) for name in CHIPS)


def test_hosts_are_squares_of_the_torus():
    devices = machines.stand_ins(machines.parse("v5e:4x4"))
    second = [device.coords for device in devices if device.process_index == 1]
    assert second == [(2, 0, 0), (3, 0, 0), (2, 1, 0), (3, 1, 0)]


def test_stand_ins_make_a_mesh():
    devices = machines.stand_ins(machines.parse("h100:16"))
    mesh = Mesh(np.array(devices).reshape(2, 8), ("data", "fsdp"))
    where = NamedSharding(mesh, PartitionSpec("data"))
    assert where.shard_shape((8, 3)) == (4, 3)
    assert len(mesh.local_devices) == 8
