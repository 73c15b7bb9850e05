"""The process around a run: joining the other processes, being told to stop, dying well."""

import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from vla_jax.config import ConfigError

logger = logging.getLogger(__name__)

# Seconds. Shorter than jax's own (300, 100, 300): a lost peer is noticed in half a minute, and a
# supervisor can restart all processes (each aborts with SIGABRT).
_INITIALIZATION, _HEARTBEAT, _SHUTDOWN = 120, 30, 20
_COMPILE = 3600
_EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def multi_process(env: Mapping[str, str] | None = None) -> bool:
    """Whether the environment is that of a run of several processes.

    It is when JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID are set, or under
    Slurm, Open MPI or on a TPU pod with more than one task or worker.

    Raises:
        ConfigError: if only some of the three variables are set, or Slurm has given several tasks
            to a batch script that does not start them.
    """
    env = os.environ if env is None else env
    given = [name for name in _EXPLICIT if env.get(name)]
    if given and len(given) < len(_EXPLICIT):
        missing = [name for name in _EXPLICIT if name not in given]
        raise ConfigError(f"environment: {given} set, but {missing} missing; set all or none")
    workers = [name for name in env.get("TPU_WORKER_HOSTNAMES", "").split(",") if name]
    tasks = int(env.get("SLURM_NTASKS") or 1)
    others = int(env.get("OMPI_COMM_WORLD_SIZE") or 1) > 1 or len(workers) > 1
    # SLURM_PROCID: a task, not an interactive shell around them; SLURM_STEP_NODELIST: of srun's.
    if given or others or "SLURM_PROCID" not in env or tasks == 1:
        return bool(given) or others
    if "SLURM_STEP_NODELIST" not in env:
        raise ConfigError(
            f"environment: Slurm has {tasks} tasks for this job, but the batch script runs the "
            "command once, outside them; put srun before it, or ask for --ntasks=1"
        )
    return True


def initialize() -> None:
    """Join the other processes, if the environment says that there are any; set up logging.

    The first process logs from INFO on, the others from WARNING on.
    """
    if multi_process():
        _join()
    form = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    level = "INFO" if jax.process_index() == 0 else "WARNING"
    logging.basicConfig(level=level, format=form, force=True)
    logging.getLogger("absl").setLevel("WARNING")  # Orbax tells every phase of every save


def _join() -> None:
    explicit: dict[str, Any] = {}
    if os.environ.get(_EXPLICIT[0]):
        explicit = {
            "coordinator_address": os.environ[_EXPLICIT[0]],
            "num_processes": int(os.environ[_EXPLICIT[1]]),
            "process_id": int(os.environ[_EXPLICIT[2]]),
        }
    # jax itself ends with a stack in C++, which no handler in Python sees; so we do before it.
    late = threading.Timer(_INITIALIZATION, _alone, [explicit])
    late.daemon = True
    late.start()
    jax.distributed.initialize(
        **explicit,
        initialization_timeout=_INITIALIZATION + 30,
        heartbeat_timeout_seconds=_HEARTBEAT,
        shutdown_timeout_seconds=_SHUTDOWN,
    )
    late.cancel()


def _alone(explicit: Mapping[str, Any]) -> None:
    """Leave a run that not all processes have come to."""
    who = "this process waited"
    if explicit:
        process, count = explicit["process_id"], explicit["num_processes"]
        who = f"process {process} of {count} waited at {explicit['coordinator_address']}"
    print(
        f"{who} {_INITIALIZATION} s for the others, and not all came; start the same command in "
        "each of them, with the same address",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


def together(function: Any, name: str) -> Callable[..., Any]:
    """A jitted function that no process runs before all have compiled it.

    Compilation takes minutes and not the same time everywhere; a collective that meets no peer
    gives up after half a minute (gloo). All calls must have arguments of the same shapes.
    """
    if jax.process_count() == 1:
        return function
    compiled = None

    def call(*args: Any) -> Any:
        nonlocal compiled
        if compiled is None:
            compiled = function.lower(*args).compile()
            wait = multihost.get_barrier_sync_fn()
            wait(key=f"vla_jax_{name}", timeout_ms=1000 * _COMPILE)
        return compiled(*args)

    return call


class StopSignal:
    """SIGTERM as a flag that all processes see at the same step.

    With several processes jax's preemption service takes the signal and agrees on the step.
    """

    def __init__(self) -> None:
        self._received = False
        self._shared = jax.process_count() > 1
        if not self._shared:
            signal.signal(signal.SIGTERM, self._receive)

    def _receive(self, *_: object) -> None:
        self._received = True
        logger.warning("SIGTERM: saving, then exiting")

    def at(self, step: int) -> bool:
        """Whether to save and exit after this step; every process asks at every step."""
        if self._shared:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._received


def run(main: Callable[[], None]) -> None:
    """Call `main`; of several processes, one that fails takes the others down at once.

    A Python process that raises would wait for its peers in the shutdown barrier, and they for it
    in a collective, for minutes.
    """
    try:
        main()
    except BaseException:
        if jax.distributed.is_initialized() and jax.process_count() > 1:
            traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)
        raise
