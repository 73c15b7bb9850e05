import os
import signal
import socket
import subprocess
import sys
import time

import jax.numpy as jnp
import pytest

from vla_jax.config import ConfigError
from vla_jax.train import runtime
from vla_jax.train.peers import Peers

EXPLICIT = {
    "JAX_COORDINATOR_ADDRESS": "host:1234",
    "JAX_NUM_PROCESSES": "2",
    "JAX_PROCESS_ID": "0",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911",
}


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, False),
        (EXPLICIT, True),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "3", "SLURM_STEP_NODELIST": "n[1-8]"}, True),
        ({"SLURM_NTASKS": "8"}, False),  # an interactive shell
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, False),
        (OPEN_MPI, True),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
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


def test_a_batch_script_without_srun_is_refused():
    env = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}
    with pytest.raises(ConfigError, match=r"8 tasks .* put srun before it"):
        runtime.multi_process(env)
    assert runtime.multi_process({**env, **EXPLICIT})


@pytest.mark.parametrize("missing", [name for name in OPEN_MPI if name != "OMPI_COMM_WORLD_SIZE"])
def test_traces_of_open_mpi_without_its_launcher_are_refused(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)  # as where it is not installed
    env = {name: value for name, value in OPEN_MPI.items() if name != missing}
    problem = (
        rf"SIZE=4 says .* 4 processes, but \['{missing}'\] missing; start .* with mpirun .*unset"
    )
    with pytest.raises(ConfigError, match=problem):
        runtime.multi_process(env)
    assert runtime.multi_process({**env, **EXPLICIT})


def test_an_address_without_a_port_is_refused(monkeypatch):
    for key, value in {**EXPLICIT, "JAX_COORDINATOR_ADDRESS": "nonsense"}.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(ConfigError, match="ADDRESS=nonsense: not a host and a port"):
        runtime.initialize()


def test_one_process_of_two_leaves_with_a_sentence():
    code = "from vla_jax.train import runtime; runtime._INITIALIZATION = 3; runtime.initialize()"
    waiting = []
    for process in "01":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        env = {**os.environ, **EXPLICIT, "JAX_PROCESS_ID": process}
        env["JAX_COORDINATOR_ADDRESS"] = address
        started = subprocess.Popen(
            [sys.executable, "-c", code], env=env, stderr=subprocess.PIPE, text=True
        )
        waiting.append((started, f"process {process} of 2 waited at {address} 3 s for the others"))
    for started, sentence in waiting:
        _, errors = started.communicate(timeout=120)
        assert started.returncode == 1
        assert sentence in errors
        assert "Traceback" not in errors
        assert "stack" not in errors


LOOP = """
import signal, sys, time
from vla_jax.train import runtime
# Whatever the tests themselves run under: jobs in the background start deaf to SIGINT.
deaf = sys.argv[1] == "deaf"
signal.signal(signal.SIGINT, signal.SIG_IGN if deaf else signal.default_int_handler)
stop = runtime.StopSignal()
print("ready", flush=True)
while not stop.asked():
    time.sleep(0.01)
print("asked", flush=True)
time.sleep(30)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_asks_and_a_later_one_ends(number):
    command = [sys.executable, "-c", LOOP, "" if number == signal.SIGTERM else "hears"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        time.sleep(0.02)
        process.send_signal(number)  # the same one once more
        assert process.stdout.readline() == "asked\n"
        time.sleep(1.2)
        assert process.poll() is None
        process.send_signal(number)
        _, errors = process.communicate(timeout=10)
    assert process.returncode == 128 + number
    assert "again: ended without saving" in errors
    assert "Traceback" not in errors


def test_a_job_in_the_background_stays_deaf_to_the_terminal():
    command = [sys.executable, "-c", LOOP, "deaf"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "asked\n"
        process.kill()


def test_alone_nothing_waits_and_errors_pass_through():
    assert runtime.together(jnp.sin, "x") is jnp.sin
    with pytest.raises(KeyError, match="mine"):
        runtime.run(lambda: {}["mine"], Peers())
