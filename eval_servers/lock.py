"""One evaluation a folder: a lock that says who holds it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from typing import IO, Iterator, Type

try:
    import fcntl
except ImportError:  # no such locks on Windows, where no simulator of ours runs
    fcntl = None  # type: ignore[assignment]

FILE = "run.lock"


@contextlib.contextmanager
def held(folder: str, error: Type[Exception]) -> Iterator[None]:
    """Own a folder for the length of the block; makes it where there is none.

    The system releases the lock when the process ends, however it ends.

    Args:
        folder: to own.
        error: what to raise, with a message that names the owner, if another process owns it.

    Raises:
        OSError: the folder cannot be written.
    """
    os.makedirs(folder, exist_ok=True)
    # Mode "w" would erase the owner's name before the lock is tried.
    with open(os.path.join(folder, FILE), "a+", encoding="utf-8") as file:
        if not _acquire(file):
            file.seek(0)
            raise error(
                "{}: another evaluation is writing there ({}); wait for it or stop it, or name "
                "another folder".format(folder, _read(file))
            )
        _sign(file)
        yield


def _acquire(file: IO[str]) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some network file systems have no locks
        return True
    return True


def _sign(file: IO[str]) -> None:
    file.truncate(0)
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    json.dump({"pid": os.getpid(), "host": socket.gethostname(), "since": since}, file)
    file.flush()


def _read(file: IO[str]) -> str:
    try:
        owner = json.loads(file.read())
        return "process {pid} on {host}, since {since}".format(**owner)
    except (ValueError, KeyError, TypeError):
        return "it does not say which"
