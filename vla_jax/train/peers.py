"""The other processes of a run: who has gone, and why, said before jax aborts this one.

jax ends every process half a minute after one is lost, with a stack of its own and no name. Here
each process writes a sign of life and its step into the coordinator's key-value store, looks at
those of the others, and leaves with one sentence when one of them has stopped or failed.
"""

import logging
import os
import sys
import threading
import time
import traceback
from typing import Any, NoReturn

import jax
from orbax.checkpoint import multihost

logger = logging.getLogger(__name__)

SILENCE = 20.0  # seconds without a sign of life after which a process counts as lost
_PERIOD = 1.0  # seconds between looks; more where there are many processes
_ALIVE, _FAILED = "vla_jax/alive/", "vla_jax/failed/"
_DONE = "done"
_HOW = "start all processes again with the same command"


class Peers:
    """The signs of life of a run of several processes; does nothing for a run of one."""

    def __init__(self) -> None:
        self.count = jax.process_count()
        self._me = jax.process_index()
        self._step = 0
        self._saved: int | None = None
        self._over = threading.Event()
        self._period = max(_PERIOD, self.count / 64)
        self._seen: dict[int, tuple[str, float]] = {}  # process -> what it wrote, and since when
        self._client: Any = None

    def start(self) -> None:
        """Begin to write and to look, in a thread of its own."""
        if self.count == 1:
            return
        self._client = multihost.get_jax_distributed_client()
        if self._me == 0:
            logger.info(
                "%d processes; should one be lost, the others end within a minute: %s, and "
                "training goes on from the newest checkpoint",
                self.count, _HOW,
            )  # fmt: skip
        threading.Thread(target=self._watch, name="peers", daemon=True).start()

    def at(self, step: int) -> None:
        """Note the optimizer steps that this process has begun."""
        self._step = step

    def saved(self, step: int | None) -> None:
        """Note the newest checkpoint, to go on from."""
        self._saved = step

    def stop(self) -> None:
        """This process is done; the others need not wait for its signs."""
        self._over.set()
        if self._client is not None:
            self._write(_DONE)

    def leave(self, error: BaseException, is_a_users: bool) -> NoReturn:
        """End this process because of an error, and say to the others that, and why.

        An error that another process has caused is given to that one, if it is found within
        seconds.

        Args:
            error: what ended the run here.
            is_a_users: its message says all; else a traceback follows.
        """
        kind, text = type(error).__name__, " ".join(str(error).split())[:300]
        if isinstance(error, jax.errors.JaxRuntimeError):
            self._look(patience=3 * self._period, seconds=6 * self._period)
        self._tell(f"at step {self._step}: {kind}: {text}")
        self._over.set()
        time.sleep(3 * self._period)  # so that all have read it: the store may be this process's
        print(f"{os.path.basename(sys.argv[0])}: {kind}: {error}", file=sys.stderr)
        if not is_a_users:
            traceback.print_exception(error)
        _end()

    def _tell(self, text: str) -> None:
        try:
            self._client.key_value_set(f"{_FAILED}{self._me}", text, allow_overwrite=True)
        except jax.errors.JaxRuntimeError:
            logger.debug("the coordinator is gone", exc_info=True)

    def _write(self, text: str) -> None:
        self._client.key_value_set(f"{_ALIVE}{self._me}", text, allow_overwrite=True)

    def _watch(self) -> None:
        number = 0
        while not self._over.wait(self._period):
            number += 1
            try:
                self._write(f"{number} {self._step}")
                found = self._find(SILENCE)
            except jax.errors.JaxRuntimeError as error:
                if self._over.is_set():
                    return
                found = f"process 0, the coordinator, cannot be reached ({_brief(error)})"
            if found and not self._over.is_set():
                self._give_up(found)

    def _look(self, patience: float, seconds: float) -> None:
        """Find out, for some seconds, whether another process is to blame; leave if so."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                found = self._find(patience)
            except jax.errors.JaxRuntimeError as error:
                found = f"process 0, the coordinator, cannot be reached ({_brief(error)})"
            if found:
                self._give_up(found)
            time.sleep(self._period / 4)

    def _find(self, patience: float) -> str:
        """Which other process has failed or is lost, in words; "" if none."""
        for key, text in self._client.key_value_dir_get(_FAILED):
            process = int(key.rpartition("/")[2])
            if process != self._me:
                return f"process {process} failed {text}"
        now = time.monotonic()
        for key, text in self._client.key_value_dir_get(_ALIVE):
            process = int(key.rpartition("/")[2])
            before, since = self._seen.get(process, ("", now))
            if text != before:
                self._seen[process] = text, now
            elif process != self._me and text != _DONE and now - since > patience:
                step = text.rpartition(" ")[2]
                return (
                    f"process {process} has been silent for {now - since:.0f} s, since step {step}"
                )
        return ""

    def _give_up(self, found: str) -> NoReturn:
        where = "the beginning" if self._saved is None else f"step {self._saved}"
        print(
            f"{os.path.basename(sys.argv[0])}: {found}; this is process {self._me}, at step "
            f"{self._step}. {_HOW[0].upper()}{_HOW[1:]}: training goes on from {where}",
            file=sys.stderr,
            flush=True,
        )
        _end()


def _brief(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]


def _end() -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: it would wait for the others in jax's shutdown.
    os._exit(1)
