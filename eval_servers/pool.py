"""Jobs over worker processes that may crash or hang: every job yields exactly one outcome.

Jobs are handed out one at a time, so the parent knows what each worker was doing when it died (a
simulator's segmentation fault, say). That job is tried once more on another worker; a second crash
is its outcome. Processes are spawned, never forked: simulators hold GL contexts and threads.
"""

from __future__ import annotations

import functools
import logging
import multiprocessing
import signal
import time
import traceback
from collections import deque
from dataclasses import dataclass
from multiprocessing import connection
from typing import Any, Callable, Deque, Iterable, Iterator, List, Optional, Tuple, Type

log = logging.getLogger(__name__)

MAX_TRIES = 2  # of one job
_START_SECONDS = 600.0  # for a worker to make its simulator; ray-traced ones compile for minutes
_GOODBYE_SECONDS = 20.0  # for a worker to close its simulator


class PoolError(RuntimeError):
    """The run cannot go on; the message is for the user."""


@dataclass(frozen=True)
class Crash:
    """Outcome of a job that took its worker down on every try."""

    reason: str


@dataclass
class _Job:
    payload: Any
    tries: int = 0


class _Worker:
    def __init__(self, number: int, make_handler: Callable[[int], Any], fatal: Tuple) -> None:
        # A forked child would inherit GL contexts and locks held by other threads.
        spawn = multiprocessing.get_context("spawn")
        self.number = number
        self.pipe, worker_end = spawn.Pipe()
        make = functools.partial(make_handler, number)
        self.process = spawn.Process(
            target=_work, args=(worker_end, make, fatal), name="worker-%d" % number, daemon=True
        )
        self.process.start()
        worker_end.close()  # so that the worker's death reads as end of file here
        self.job: Optional[_Job] = None
        self.ready = False
        self.since = time.monotonic()

    def stop(self) -> None:
        self.pipe.close()
        self.process.kill()
        self.process.join()


def run(
    make_handler: Callable[[int], Any],
    jobs: Iterable[Any],
    prepare: Callable[[Any], Any],
    workers: int,
    timeout: float,
    fatal: Tuple[Type[BaseException], ...] = (),
) -> Iterator[Tuple[Any, Any]]:
    """Yield (job, outcome) as they come; the outcome is the handler's result or a `Crash`.

    Args:
        make_handler: picklable; called once in each worker, with the worker's number; gives an
            object with `__call__(message) -> result` and `close()`. An exception out of a call
            counts as a crash.
        jobs: what to do, in order.
        prepare: job -> the (picklable) message for the handler, called when the job is handed out.
        workers: processes.
        timeout: seconds a job may take before its worker counts as hung and is killed.
        fatal: exceptions that end the whole run, such as an unreachable policy server.

    Raises:
        PoolError: a fatal exception in a worker, or workers that crash without getting anywhere.
    """
    todo: Deque[_Job] = deque(_Job(payload) for payload in jobs)
    crew: List[_Worker] = []
    hired = crashes = 0
    try:
        while todo or any(worker.job for worker in crew):
            # Never more workers than jobs are left, since each builds a simulator.
            while len(crew) < min(workers, len(todo) + sum(1 for w in crew if w.job)):
                crew.append(_Worker(hired, make_handler, fatal))
                hired += 1
            for worker in crew:
                if worker.ready and worker.job is None and todo:
                    _assign(worker, todo.popleft(), prepare)
            for worker in _reporting(crew, timeout):
                kind, value = _receive(worker)
                if kind == "ready":
                    worker.ready = True
                elif kind == "fatal":
                    raise PoolError(value)
                elif kind == "result":
                    job, worker.job, crashes = worker.job, None, 0
                    yield job.payload if job else None, value
                else:
                    crew.remove(worker)
                    worker.stop()
                    crashes += 1
                    log.warning("worker %d died: %s", worker.number, value)
                    # Every result sets the count to zero, so only a broken setup gets here.
                    if crashes > 2 * workers + 2:
                        raise PoolError(
                            "{} workers died in a row without finishing an episode; the last:"
                            " {}".format(crashes, value)
                        )
                    job = worker.job
                    if job is not None and job.tries < MAX_TRIES:
                        # At the front, so that a job's two tries follow each other and a bad one
                        # shows early.
                        todo.appendleft(job)
                    elif job is not None:
                        yield job.payload, Crash(value)
        _dismiss(crew)
    finally:
        for worker in crew:
            worker.stop()


def _assign(worker: _Worker, job: _Job, prepare: Callable[[Any], Any]) -> None:
    job.tries += 1
    worker.job, worker.since = job, time.monotonic()
    try:
        worker.pipe.send(prepare(job.payload))
    except OSError:  # it died while idle; `_receive` finds out
        log.debug("worker %d is gone", worker.number)


def _reporting(crew: List[_Worker], timeout: float) -> List[_Worker]:
    """Workers with something to read, and those past their time."""
    # Wakes up at least once a second, to notice workers that hang.
    readable = connection.wait([worker.pipe for worker in crew], timeout=min(timeout, 1.0))
    current_time = time.monotonic()
    return [w for w in crew if w.pipe in readable or current_time - w.since > _patience(w, timeout)]


def _patience(worker: _Worker, timeout: float) -> float:
    if not worker.ready:
        return _START_SECONDS
    return timeout if worker.job is not None else float("inf")


def _receive(worker: _Worker) -> Tuple[str, Any]:
    # It was reported without anything to read, so it is past its time.
    if not worker.pipe.poll():
        return "crash", "no answer within {:.0f} s".format(time.monotonic() - worker.since)
    try:
        return worker.pipe.recv()
    except (EOFError, OSError):
        # The exit code is there only once the system has collected the process.
        worker.process.join(timeout=5.0)
        return "crash", "exit code {}".format(worker.process.exitcode)


def _dismiss(crew: List[_Worker]) -> None:
    """Let every worker close its simulator and check itself; raise what it finds."""
    for worker in crew:
        if worker.ready:
            worker.pipe.send(None)
    for worker in crew:
        # A worker that hangs while it closes does not matter: all jobs have their outcomes.
        if not worker.ready or not worker.pipe.poll(_GOODBYE_SECONDS):
            continue
        kind, value = _receive(worker)
        if kind == "fatal":
            raise PoolError(value)
        worker.process.join(timeout=_GOODBYE_SECONDS)


def _work(pipe: Any, make_handler: Callable[[], Any], fatal: Tuple) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    try:
        for report in _reports(pipe, make_handler, fatal):
            pipe.send(report)
    except (BrokenPipeError, ConnectionResetError):  # the parent is gone
        log.debug("nobody listens any more")


def _reports(pipe: Any, make_handler: Callable[[], Any], fatal: Tuple) -> Iterator[Tuple[str, Any]]:
    """Yield a worker's messages, one after another, until it is dismissed or fails."""
    try:
        handler = make_handler()
        yield "ready", None
        while True:
            message = _next_message(pipe)
            if message is None:
                break
            yield "result", handler(message)
        handler.close()
        yield "closed", None
    except fatal as error:
        yield "fatal", str(error)
    except Exception as error:
        where = traceback.format_exc(limit=-1).strip().splitlines()[1].strip()
        yield "crash", "{}: {} ({})".format(type(error).__name__, error, where)


def _next_message(pipe: Any) -> Any:
    try:
        return pipe.recv()
    except EOFError:  # the parent is gone, which dismisses as well
        return None
