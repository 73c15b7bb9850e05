"""Work done by several processes, which Ctrl-C ends at once and without leaving one behind."""

import concurrent.futures
import contextlib
import functools
import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any

# In a worker: whether it is at a job, and whether Ctrl-C has come.
_at_work = False
_interrupted = False


@contextlib.contextmanager
def in_order(
    work: Callable[[Any], Any], jobs: Iterable[Any], workers: int
) -> Iterator[Iterator[Any]]:
    """What `work` gives for every job, in the order of the jobs, as an iterator to be entered.

    On leaving, the jobs that nobody has begun are canceled, and those at work are waited for.
    Ctrl-C interrupts these.

    Args:
        work: a function of a module, as the processes have to find it.
        jobs: its arguments; they and the results are copied between the processes.
        workers: processes.
    """
    # A fork would copy locks whose threads it does not copy, and jax has threads.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context, _start) as pool:
        try:
            # The processes start with the first job, and with the signals blocked that this thread
            # blocks. Ctrl-C while they import would be a traceback of each.
            blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                results = pool.map(functools.partial(_interruptible, work), jobs)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            yield results
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _start() -> None:
    """Lets Ctrl-C end a worker's jobs, not the worker.

    One that ends in the middle of a long message leaves the pool waiting for the rest, for ever.
    """
    # A shell starts background jobs with SIGINT ignored; that stays.
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _interrupt)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _interrupt(number: int, frame: FrameType | None) -> None:
    global _interrupted
    _interrupted = True
    if _at_work:
        raise KeyboardInterrupt


def _interruptible(work: Callable[[Any], Any], job: Any) -> Any:
    """Does a job; Ctrl-C is a KeyboardInterrupt of it and of those after it, for the parent."""
    global _at_work
    _at_work = True
    try:
        if _interrupted:
            raise KeyboardInterrupt
        return work(job)
    finally:
        _at_work = False
