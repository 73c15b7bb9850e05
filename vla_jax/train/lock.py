"""One run a workdir: a lock that says who holds it."""

import contextlib
import fcntl
import json
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

FILE = "run.lock"
_PATIENCE = 5.0  # seconds for a run that is just ending to let go

logger = logging.getLogger(__name__)


class WorkdirError(RuntimeError):
    """A workdir that cannot be used; the message says why and what to do."""


def check(workdir: Path) -> None:
    """Refuse a workdir that could not be made, before the work that comes first; makes nothing.

    Raises:
        WorkdirError: a file is in its way, or nothing may be written there.
    """
    folder = workdir.absolute()
    try:
        existing = next(path for path in (folder, *folder.parents) if path.exists())
    except OSError as error:  # a name that is too long, or a folder that may not be looked into
        raise _unwritable(workdir, error) from error
    if not existing.is_dir():
        raise _unwritable(workdir, NotADirectoryError(f"{existing} is a file"))
    if not os.access(existing, os.W_OK | os.X_OK):
        raise _unwritable(workdir, PermissionError(f"{existing} may not be written to"))


@contextlib.contextmanager
def held(workdir: Path, active: bool = True) -> Iterator[None]:
    """Own a workdir for the length of the block; makes it where there is none.

    The system releases the lock when the process ends, however it ends.

    Args:
        workdir: of the run.
        active: whether this process is the one that writes there; others only pass through.

    Raises:
        WorkdirError: the folder cannot be written, or another process owns it.
    """
    if not active:
        yield
        return
    with _open(workdir):
        yield


def _open(workdir: Path) -> IO[str]:
    """The lock's file, locked; closing it releases the lock."""
    file = None
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        # Not "w": until the lock is ours the file names its owner.
        file = (workdir / FILE).open("a+", encoding="utf-8")
        _acquire(file, workdir)
        _sign(file)
        return file
    except (OSError, WorkdirError) as error:
        # An open file would keep the lock.
        if file is not None:
            file.close()
        if isinstance(error, WorkdirError):
            raise
        raise _unwritable(workdir, error) from error


def _unwritable(workdir: Path, error: OSError) -> WorkdirError:
    return WorkdirError(f"--workdir={workdir}: cannot be written: {error.strerror or error}")


def _acquire(file: IO[str], workdir: Path) -> None:
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            # The system lets go of this lock even when the process is killed.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() < deadline:
                time.sleep(0.2)
                continue
        except OSError as error:  # some network file systems have no locks
            logger.warning("%s: no locks on this file system: %s", workdir, error.strerror)
            return
        file.seek(0)
        raise WorkdirError(
            f"--workdir={workdir}: another run is writing there ({_read(file)}); wait for it or "
            "stop it, or choose another folder"
        )


def _read(file: IO[str]) -> str:
    try:
        owner = json.loads(file.read())
        return f"process {owner['pid']} on {owner['host']}, since {owner['since']}"
    except (ValueError, KeyError, TypeError):
        return "it does not say which"


def _sign(file: IO[str]) -> None:
    file.truncate(0)
    owner = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": sys.argv,
    }
    file.write(json.dumps(owner) + "\n")
    # Others read the name of the owner while this file stays open.
    file.flush()
