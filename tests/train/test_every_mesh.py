"""A real model, very small, trains alike however its devices are cut."""

import functools

import jax
import numpy as np
import pytest

from tests.train import programs
from vla_jax.config import MeshConfig
from vla_jax.models import vla
from vla_jax.train.mesh import make_mesh, shard_batch
from vla_jax.train.optim import make_optimizer
from vla_jax.train.state import create
from vla_jax.train.step import make_train_step

ROWS, STEPS = 32, 2
MESHES = {"one": (1, 1, 1), "data": (8, 1, 1), "fsdp": (1, 8, 1), "all": (2, 2, 2)}


@functools.cache
def train(mesh: str, accumulate: int) -> list[dict[str, float]]:
    changes = {"model.dropout": False, "train.accumulate": accumulate, "optim.warmup_steps": 0}
    config = programs.config("kosmos2", "policy_head", **changes)
    shape = MESHES[mesh]
    devices = make_mesh(MeshConfig(*shape), jax.devices()[: int(np.prod(shape))])
    model, template = programs.abstract_state(config, devices)
    optimizer = make_optimizer(config.optim, config.train.steps)
    state = create(lambda key: vla.initial_params(model, key), optimizer, template, config.seed)
    step, rows = make_train_step(model, config, devices, template), []
    for i in range(STEPS):
        batch = shard_batch(programs.filled(config, ROWS, i), devices)
        state, metrics = step(state, batch)
        rows.append({name: float(x) for name, x in metrics.items()})
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("mesh", ["data", "fsdp", "all"])
def test_losses_and_gradients_are_those_of_one_device(mesh, accumulate):
    names = ("loss", "loss_arm", "loss_gripper", "grad_norm")
    result, alone, full = train(mesh, accumulate), train("one", accumulate), train("one", 1)
    for current, expected in zip(result, alone, strict=True):
        for name in names:
            assert current[name] == pytest.approx(expected[name], rel=1e-5), name
    # Adam turns what rounding makes of small gradients into steps of full size, so that only the
    # first step is as near to that without parts.
    for name in names:
        assert result[0][name] == pytest.approx(full[0][name], rel=1e-5), name
