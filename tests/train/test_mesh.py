from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from tests.train.toy import Toy, make_batch
from vla_jax.config import ConfigError, MeshConfig
from vla_jax.plan.machines import parse, stand_ins
from vla_jax.rules import flatten
from vla_jax.train import mesh as meshes


def struct(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, np.float32)


def test_minus_one_takes_what_is_left():
    mesh = meshes.make_mesh(MeshConfig(2, -1, 2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


@pytest.mark.parametrize("shape", [(3, -1, 1), (2, 2, 1), (16, 1, 1), (0, -1, 1), (-1, -1, 1)])
def test_a_mesh_that_does_not_fit_the_devices_is_refused(shape):
    with pytest.raises(ConfigError, match=r"mesh: .*data="):
        meshes.make_mesh(MeshConfig(*shape))


def test_rules_give_the_published_specs():
    mesh = meshes.make_mesh(MeshConfig(2, 2, 2))
    params = {
        "backbone/text/layers/attn/q/kernel": struct(24, 2048, 32, 64),
        "backbone/text/layers/attn/o/kernel": struct(24, 32, 64, 2048),
        "backbone/text/layers/attn/q/bias": struct(24, 32, 64),
        "backbone/text/layers/mlp/fc1/kernel": struct(24, 2048, 8192),
        "backbone/text/layers/mlp/fc2/kernel": struct(24, 8192, 2048),
        "backbone/text/layers/norm1/scale": struct(24, 2048),
        "backbone/text/embedding": struct(65037, 2048),
        "head/layer0/input_kernel": struct(2048, 4096),
        "head/layer0/state_kernel": struct(1024, 4096),
    }
    assert list(meshes.param_specs(params, mesh).values()) == [
        P(None, "fsdp", "tensor", None),
        P(None, "tensor", None, "fsdp"),
        P(),
        P(None, "fsdp", "tensor"),
        P(None, "tensor", "fsdp"),
        P(),
        P(None, "fsdp"),
        P("fsdp", None),
        P(),
    ]


@pytest.mark.parametrize(
    ("machine", "tensor", "expected"),
    [
        ("h100:8", 1, [(None, "fsdp", None, None), (None, "fsdp", None)]),
        ("h100:8", 2, [(None, "tensor", None, "fsdp"), (None, "tensor", "fsdp")]),
        ("v5e:2x4", 1, [(None, None, None, "fsdp"), (None, None, "fsdp")]),
    ],
)
def test_gpus_split_kernels_of_outputs_along_what_is_summed_over(machine, tensor, expected):
    mesh = meshes.make_mesh(MeshConfig(1, -1, tensor), stand_ins(parse(machine)))
    params = {
        "text/layers/attn/o/kernel": struct(24, 32, 64, 2048),
        "text/layers/mlp/fc2/kernel": struct(24, 8192, 2048),
    }
    assert list(meshes.param_specs(params, mesh).values()) == [P(*axes) for axes in expected]
    # Eight devices, but three heads.
    few = {"vision/layers/attn/o/kernel": struct(24, 3, 64, 768)}
    assert list(meshes.param_specs(few, mesh).values()) == [P(None, None, None, "fsdp")]


def test_what_does_not_divide_stays_whole_and_the_scan_is_never_split():
    mesh = meshes.make_mesh(MeshConfig(1, 2, 4))
    params = {
        "a/layers/attn/k/kernel": struct(8, 64, 2, 16),  # two kv heads over four
        "a/layers/attn/v/kernel": struct(8, 64, 64),  # flatter than the rule: the last rule's
        "a/layers/odd": struct(1024, 7, 512),
        "a/layers/only_scan": struct(2**18),
        "a/big": struct(512, 1024),
        "a/prime": struct(1009, 1009),
        "a/small": struct(512, 8),
    }
    specs = meshes.param_specs(params, mesh, min_sharded=2**15)
    assert list(specs.values()) == [
        P(None, "fsdp", None, None),
        P(None, "fsdp", None),
        P(None, None, "fsdp"),
        P(),
        P(None, "fsdp"),
        P(),
        P(),
    ]


def test_the_last_rule_says_what_it_catches(caplog):
    mesh = meshes.make_mesh(MeshConfig(1, 8, 1))
    with caplog.at_level("INFO"):
        meshes.param_specs({"x/strange": struct(1024, 512), "x/tiny": struct(2)}, mesh)
    assert "x/strange [1024, 512]" in caplog.text
    assert "tiny" not in caplog.text


def test_every_parameter_has_a_spec():
    flat = flatten(jax.eval_shape(Toy().init, jax.random.key(0)))
    assert set(meshes.param_specs(flat, meshes.make_mesh(MeshConfig(2, 2, 2)))) == set(flat)


def test_a_batch_is_split_over_data_and_fsdp_and_kept_in_order():
    mesh = meshes.make_mesh(MeshConfig(2, 2, 2))
    local = make_batch(rows=8)
    batch = meshes.shard_batch(local, mesh)
    assert batch.observation.proprio is None
    assert batch.actions.chunk.sharding == meshes.batch_sharding(mesh)
    assert batch.actions.chunk.addressable_shards[0].data.shape[0] == 2
    for a, b in zip(jax.tree.leaves(batch), jax.tree.leaves(local), strict=True):
        np.testing.assert_array_equal(a, b)


def test_batches_that_cannot_be_shared_are_refused():
    mesh = meshes.make_mesh(MeshConfig(2, 2, 2))
    meshes.check_batch(8, mesh)
    meshes.check_batch(16, mesh, 2)
    with pytest.raises(ConfigError, match=r"x train\.accumulate = 4 x 3"):
        meshes.check_batch(16, mesh, 3)
    with pytest.raises(ConfigError, match="6 is not a multiple of data x fsdp = 4"):
        meshes.check_batch(6, mesh)


def test_kernels_stay_whole_on_tpus_without_a_tensor_axis():
    def options(platform: str, tensor: int) -> Any:
        devices = np.array([mock.Mock(platform=platform)], object)
        # TPUs that are not here: only what is asked of them.
        mesh = mock.Mock(spec=Mesh, devices=devices, shape={"fsdp": 4, "tensor": tensor})
        return meshes.compiler_options(mesh)

    assert options("tpu", 1) == meshes.WHOLE_KERNELS
    assert options("tpu", 2) is None
    assert options("cpu", 1) is None
