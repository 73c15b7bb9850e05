"""The process around a run: joining the other processes, being told to stop, dying well."""

import importlib.util
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from vla_jax import refusal
from vla_jax.config import ConfigError
from vla_jax.train.peers import Peers

logger = logging.getLogger(__name__)

# Seconds. Shorter than jax's own (300, 100, 300): a lost peer is noticed within a minute, and a
# supervisor can restart all processes. jax gives up after half to all of the heartbeat, so
# `peers.SILENCE` comes before it, with a name.
_INITIALIZATION, _HEARTBEAT, _SHUTDOWN = 120, 50, 20
_PATIENCE = 3600  # to index data, or to compile
_REPEATED = 1.0  # some supervisors send a signal to a process and to its group
_EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def multi_process(env: Mapping[str, str] | None = None) -> bool:
    """Whether the environment is that of a run of several processes.

    It is when JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID are set, or under
    Slurm, Open MPI or on a TPU pod with more than one task or worker.

    Raises:
        ConfigError: if only some of the three variables are set, Slurm has given several tasks to
            a batch script that does not start them, or no launcher of Open MPI has set all that
            its processes are found by.
    """
    env = os.environ if env is None else env
    present = [name for name in _EXPLICIT if env.get(name)]
    if present and len(present) < len(_EXPLICIT):
        missing = [name for name in _EXPLICIT if name not in present]
        raise ConfigError(f"environment: {present} set, but {missing} missing; set all or none")
    workers = [name for name in env.get("TPU_WORKER_HOSTNAMES", "").split(",") if name]
    tasks = _number(env, "SLURM_NTASKS")
    ranks = _number(env, "OMPI_COMM_WORLD_SIZE")
    if ranks > 1 and not present:
        _check_open_mpi(ranks, env)
    is_multi_worker = ranks > 1 or len(workers) > 1
    # SLURM_PROCID: a task, not an interactive shell around them; SLURM_STEP_NODELIST: of srun's.
    if present or is_multi_worker or "SLURM_PROCID" not in env or tasks == 1:
        return bool(present) or is_multi_worker
    if "SLURM_STEP_NODELIST" not in env:
        raise ConfigError(
            f"environment: Slurm has {tasks} tasks for this job, but the batch script runs the "
            "command once, outside them; put srun before it, or ask for --ntasks=1"
        )
    return True


def _check_open_mpi(ranks: int, env: Mapping[str, str]) -> None:
    """Refuse the traces of a launcher that has not started this process, as in a shell of its."""
    # jax finds the processes of Open MPI 5, which sets no address, through mpi4py.
    address = [] if importlib.util.find_spec("mpi4py") else ["OMPI_MCA_orte_hnp_uri"]
    names = ["OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", *address]
    if missing := [name for name in names if name not in env]:
        raise ConfigError(
            f"environment: OMPI_COMM_WORLD_SIZE={ranks} says that Open MPI runs {ranks} processes, "
            f"but {missing} missing; start the command with mpirun (of Open MPI 5 with mpi4py "
            f"installed), set {', '.join(_EXPLICIT)} in each process, or unset OMPI_COMM_WORLD_SIZE"
        )


def _number(env: Mapping[str, str], name: str) -> int:
    try:
        return int(env.get(name) or 1)
    except ValueError:
        raise ConfigError(f"environment: {name}={env[name]} is not a number") from None


def initialize() -> None:
    """Join the other processes, if the environment says that there are any; set up logging.

    The first process logs from INFO on, the others from WARNING on.

    Raises:
        ConfigError: the environment describes no run of several processes.
        DeviceError: there is no device of the kind that it asks for.
    """
    # absl logs from INFO on, where jax tells of every kind of device that is not in this machine.
    logging.getLogger("jax").setLevel("WARNING")
    if multi_process():
        _join()
    refusal.check_devices()
    form = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    level = "INFO" if jax.process_index() == 0 else "WARNING"
    # Libraries may have set up logging before; without force this would do nothing.
    logging.basicConfig(level=level, format=form, force=True)
    absl = logging.getLogger("absl")
    absl.setLevel("WARNING")  # Orbax tells every phase of every save
    absl.addFilter(_without_traceback)


def _without_traceback(record: logging.LogRecord) -> bool:
    """Orbax logs the traceback of a failed save two or three times; we get it as an exception."""
    return not record.exc_info


def _join() -> None:
    explicit: dict[str, Any] = {}
    if address := os.environ.get(_EXPLICIT[0]):
        # jax takes the port off without asking whether there is one.
        if not re.fullmatch(r".+:\d+", address):
            raise ConfigError(f"{_EXPLICIT[0]}={address}: not a host and a port, as 10.0.0.1:1234")
        explicit = {
            "coordinator_address": address,
            "num_processes": _number(os.environ, _EXPLICIT[1]),
            "process_id": _number(os.environ, _EXPLICIT[2]),
        }
    # jax itself ends with a stack in C++, which no handler in Python sees; so we do before it.
    late = threading.Timer(_INITIALIZATION, _alone, [explicit])
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            **explicit,
            # Later than our own timer, so that our sentence comes first.
            initialization_timeout=_INITIALIZATION + 30,
            heartbeat_timeout_seconds=_HEARTBEAT,
            shutdown_timeout_seconds=_SHUTDOWN,
        )
    except (RuntimeError, ValueError) as error:
        problem = f"environment: the processes of this run cannot be joined: {error}"
        raise ConfigError(problem) from error
    finally:
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
            meet(name)
        return compiled(*args)

    return call


def meet(name: str) -> None:
    """Waits for all processes, for up to an hour: what they do before takes not the same time."""
    if jax.process_count() > 1:
        wait = multihost.get_barrier_sync_fn()
        wait(key=f"vla_jax_{name}", timeout_ms=1000 * _PATIENCE)


def agree(sample: int, failed: bool) -> tuple[int, int | None]:
    """What all processes of a run that is about to leave know together.

    All of them have to ask at the same point.

    Args:
        sample: number of the sample where this process would go on.
        failed: whether it leaves because of an error.

    Returns:
        The least of these numbers, and the first process that has failed, None without one.
    """
    if jax.process_count() == 1:
        return sample, 0 if failed else None
    # As two words: jax has integers of 32 bits.
    words = np.array([sample >> 31, sample & (2**31 - 1), failed], np.int32)
    gathered = np.asarray(multihost_utils.process_allgather(words)).reshape(-1, 3).tolist()
    culprits = [process for process, (_, _, wrong) in enumerate(gathered) if wrong]
    return min((high << 31) + low for high, low, _ in gathered), min(culprits, default=None)


class StopSignal:
    """SIGTERM and SIGINT as a question that all processes answer alike at the same point of a run.

    The first signal asks to save and leave; one that comes later than a moment after it ends the
    process at once, even where it hangs in a compiled program. With several processes jax's
    preemption service takes SIGTERM, always as the first one, and agrees on the point.

    Attributes:
        received: whether `asked` has said so.
    """

    def __init__(self) -> None:
        self.received = False
        self._shared = jax.process_count() > 1
        self._asked = 0
        for number in (signal.SIGINT,) if self._shared else (signal.SIGINT, signal.SIGTERM):
            # A shell starts background jobs with SIGINT ignored; that stays.
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._receive)
        # Python runs a handler when the main thread comes back from what it is in; the numbers of
        # signals arrive here at once.
        numbers, end = os.pipe()
        # set_wakeup_fd takes only a file that never blocks.
        os.set_blocking(end, False)
        signal.set_wakeup_fd(end, warn_on_full_buffer=False)
        threading.Thread(target=_end_on_second, args=(numbers,), daemon=True).start()

    def _receive(self, number: int, _: object) -> None:
        if self.received:
            return
        logger.warning("%s: saving, then exiting", signal.Signals(number).name)
        self.ask()

    def ask(self) -> None:
        """Ask from within, as a signal would: to save and leave."""
        if self._shared:
            os.kill(os.getpid(), signal.SIGTERM)  # to the service, which tells the others
        else:
            self.received = True

    def asked(self) -> bool:
        """Whether to save and leave now; once it is so it stays so.

        Every process asks at the same points of a run: after every step, and after every batch of
        an evaluation.
        """
        if self._shared and not self.received:
            self._asked += 1
            self.received = multihost_utils.reached_preemption_sync_point(self._asked)
        return self.received


def _end_on_second(numbers: int) -> None:
    first = None
    while True:
        number, received_at = os.read(numbers, 1)[0], time.monotonic()
        if number not in (signal.SIGINT, signal.SIGTERM):
            continue
        if first is None:
            first = received_at
        elif received_at - first > _REPEATED:
            print(f"{signal.Signals(number).name} again: ended without saving", file=sys.stderr)
            # The status that shells give to a process which a signal has ended.
            os._exit(128 + number)


def run(main: Callable[[], None], peers: Peers, users: tuple[type[Exception], ...] = ()) -> None:
    """Call `main`; of several processes, one that fails takes the others down at once.

    A Python process that raises would wait for its peers in the shutdown barrier, and they for it
    in a collective, for minutes.

    Args:
        main: the run.
        peers: are told why.
        users: errors whose message says all, without a traceback.
    """
    peers.start()
    with peers.leaving(users):
        main()
    peers.stop()
