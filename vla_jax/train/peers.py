"""The other processes of a run: who has gone, and why, said before jax aborts this one.

jax ends every process half a minute after one is lost, with a stack of its own and no name. Here
each process writes a sign of life and its step into the coordinator's key-value store, looks at
those of the others, and leaves with one sentence when one of them has stopped or failed.
"""

import contextlib
import logging
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any, NoReturn

import jax
from orbax.checkpoint import multihost

from vla_jax.commands import as_typed, program

logger = logging.getLogger(__name__)

SILENCE = 20.0  # seconds without a sign of life after which a process counts as lost
_PERIOD = 1.0  # seconds between looks; more where there are many processes
_ALIVE, _FAILED = "vla_jax/alive/", "vla_jax/failed/"
_ADDRESS = "vla_jax/address"
_DONE, _BYE = "done", b"."
_GONE = "process 0, the coordinator, cannot be reached"
_HOW = "start all processes again with the same command"


class Peers:
    """The signs of life of a run of several processes; does nothing for a run of one."""

    def __init__(self) -> None:
        self.count, self._me = jax.process_count(), jax.process_index()
        self._step = 0
        self._saved: int | None = None
        self._over = threading.Event()
        # One coordinator answers all of them, so that many processes must ask less often.
        self._period = max(_PERIOD, self.count / 64)
        self._asking: float | None = None  # since when the coordinator has been asked something
        self._ends: list[socket.socket] = []  # of connections that tell when a process is gone
        self._seen: dict[int, tuple[str, float]] = {}  # process -> what it wrote, and since when
        self._client: Any = None

    def start(self) -> None:
        """Begin to write and to look, in threads of its own."""
        if self.count == 1:
            return
        self._client = multihost.get_jax_distributed_client()
        if self._me == 0:
            logger.info(
                "%d processes; should one be lost, the others end within a minute: %s, and "
                "training goes on from the newest checkpoint",
                self.count, _HOW,
            )  # fmt: skip
        for work in (self._watch, self._time, self._accept if self._me == 0 else self._hold):
            # A daemon, so that no thread keeps a finished process alive.
            threading.Thread(target=work, name="peers", daemon=True).start()

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
        for end in self._ends:
            with contextlib.suppress(OSError):
                # Without this byte the end of a connection means a crash.
                end.sendall(_BYE)

    @contextlib.contextmanager
    def leaving(self, users: tuple[type[Exception], ...]) -> Iterator[None]:
        """Around work whose errors the others must hear of before anything waits for them.

        Args:
            users: errors whose message says all, without a traceback.
        """
        try:
            yield
        except BaseException as error:
            if self.count > 1:
                self.leave(error, isinstance(error, users))
            raise

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
            # A broken collective is mostly the fault of a peer: give that one time to be found.
            self._look(patience=3 * self._period, seconds=6 * self._period)
        self._tell(f"at step {self._step}: {kind}: {text}")
        self._over.set()
        print(f"{program()}: {kind}: {as_typed(str(error))}", file=sys.stderr, flush=True)
        if not is_a_users:
            traceback.print_exception(error)
        if self._me == 0:
            # So that all have read it: the store is this process's. The others must not stay, as
            # jax aborts them when it ends.
            time.sleep(3 * self._period)
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
            # A counter, so that the text changes even while one long step runs.
            number += 1
            self._asking = time.monotonic()
            try:
                self._write(f"{number} {self._step}")
                reason = self._find(SILENCE)
                self._asking = None
            except jax.errors.JaxRuntimeError as error:
                if self._over.is_set():
                    return
                reason = f"{_GONE} ({_brief(error)})"
            if reason and not self._over.is_set():
                self._give_up(reason)

    def _time(self) -> None:
        """Notice that the coordinator does not answer: a question to it has no end of its own."""
        while not self._over.wait(self._period):
            # Read once: the other thread may set it to None at any time.
            since = self._asking
            if since is not None and time.monotonic() - since > SILENCE:
                self._give_up(f"process 0, the coordinator, has not answered for {SILENCE:.0f} s")

    def _accept(self) -> None:
        """In the coordinator: hold a connection to every other process, which ends with this one.

        When the coordinator is gone jax aborts the others within milliseconds, without a name.
        """
        with socket.create_server(("", 0), backlog=self.count) as server:
            address = f"{socket.gethostname()} {server.getsockname()[1]}"
            self._client.key_value_set(_ADDRESS, address, allow_overwrite=True)
            # Bounded, in case something unrelated keeps connecting to the port.
            while not self._over.is_set() and len(self._ends) < 4 * self.count:
                self._ends.append(server.accept()[0])

    def _hold(self) -> None:
        """In the others: wait for the end of that connection; without one `_watch` is left."""
        host, port = self._client.blocking_key_value_get(_ADDRESS, 60_000).split(" ")
        # First by the name that jax itself was given: the host's own may not resolve here.
        named = os.environ.get("JAX_COORDINATOR_ADDRESS", "").rpartition(":")[0].strip("[]")
        for each in filter(None, (named, host)):
            try:
                with socket.create_connection((each, int(port)), timeout=10) as end:
                    end.settimeout(None)
                    is_over = end.recv(1) == _BYE
            except ConnectionResetError:
                is_over = False
            except OSError:
                continue
            if not is_over and not self._over.is_set():
                self._give_up(_GONE)
            return

    def _look(self, patience: float, seconds: float) -> None:
        """Find out, for some seconds, whether another process is to blame; leave if so."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                reason = self._find(patience)
            except jax.errors.JaxRuntimeError as error:
                reason = f"{_GONE} ({_brief(error)})"
            if reason:
                self._give_up(reason)
            time.sleep(self._period / 4)

    def _find(self, patience: float) -> str:
        """Which other process has failed or is lost, in words; "" if none."""
        # Failures first: who has failed is soon silent too, and the reason says more than the
        # silence.
        for key, text in self._client.key_value_dir_get(_FAILED):
            process = int(key.rpartition("/")[2])
            if process != self._me:
                return f"process {process} failed {text}"
        tick = time.monotonic()
        for key, text in self._client.key_value_dir_get(_ALIVE):
            process = int(key.rpartition("/")[2])
            # Measured by this process's clock, because those of several hosts differ.
            before, since = self._seen.get(process, ("", tick))
            if text != before:
                self._seen[process] = text, tick
            elif process != self._me and text != _DONE and tick - since > patience:
                step = text.rpartition(" ")[2]
                return (
                    f"process {process} has been silent for {tick - since:.0f} s, since step {step}"
                )
        return ""

    def _give_up(self, reason: str) -> NoReturn:
        where = "the beginning" if self._saved is None else f"step {self._saved}"
        print(
            f"{program()}: {reason}; this is process {self._me}, at step "
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
