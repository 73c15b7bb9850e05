import os
import signal

import jax.numpy as jnp
import pytest

from vla_jax.config import ConfigError
from vla_jax.train import runtime

EXPLICIT = {
    "JAX_COORDINATOR_ADDRESS": "host:1234",
    "JAX_NUM_PROCESSES": "2",
    "JAX_PROCESS_ID": "0",
}


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, False),
        (EXPLICIT, True),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "3"}, True),
        ({"SLURM_NTASKS": "8"}, False),  # the batch script itself
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "t1k-0,t1k-1"}, True),
    ],
)
def test_environments_of_several_processes(env, expected):
    assert runtime.multi_process(env) is expected


def test_half_an_explicit_environment_is_refused():
    env = {k: v for k, v in EXPLICIT.items() if k != "JAX_PROCESS_ID"}
    with pytest.raises(ConfigError, match=r"\['JAX_PROCESS_ID'\] missing"):
        runtime.multi_process(env)


def test_sigterm_is_a_flag():
    before = signal.getsignal(signal.SIGTERM)
    try:
        stop = runtime.StopSignal()
        assert not stop.at(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.at(2)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_alone_nothing_waits_and_errors_pass_through():
    assert runtime.together(jnp.sin, "x") is jnp.sin
    with pytest.raises(KeyError, match="mine"):
        runtime.run(lambda: {}["mine"])
