"""How a program ends when a person, a disk or a machine has made it impossible: with one sentence.

The message of such an error says what is wrong and what to do; a traceback would only hide it.
`--debug` shows the traceback all the same, for whoever looks for the cause in the code.
"""

import argparse
import contextlib
import errno
import gc
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from vla_jax.commands import as_typed, program

# What people, disks, machines and other libraries cause; a bug of ours may hide among them.
CAUSED = (OSError, ValueError, RuntimeError, ImportError, LookupError, MemoryError)
_OURS = ("vla_jax", "launch", "eval_servers", "configs", "__main__")
HELP = "show the traceback of an error that is otherwise one line"


class DeviceError(RuntimeError):
    """The machine has no device of the kind that the environment asks for."""


class FlagError(ValueError):
    """What a flag names cannot be used; the message begins with the flag."""


@contextlib.contextmanager
def naming(flag: str) -> Iterator[None]:
    """Around the reading of what a flag names, so that its errors begin with the flag.

    Args:
        flag: as it is written, `--checkpoint`.

    Raises:
        FlagError: in place of any of `CAUSED`.
    """
    try:
        yield
    except CAUSED as error:
        raise FlagError(f"{flag}: {describe(error)}") from error


class Problems:
    """What checks that do not depend on one another refuse, told together.

    Whoever mends a problem is not sent on to the next one so.

    Args:
        kinds: errors whose message says all; others pass through at once.
    """

    def __init__(self, *kinds: type[Exception]):
        self._kinds, self._errors = kinds, []

    @contextlib.contextmanager
    def part(self) -> Iterator[None]:
        """Around one of the checks, which ends at its first error."""
        try:
            yield
        except self._kinds as error:
            self._errors.append(error)

    def refuse(self) -> None:
        """Raise what was refused, if anything was.

        Raises:
            FlagError: in place of several errors.
        """
        if len(self._errors) == 1:
            raise self._errors[0]
        if self._errors:
            texts = [describe(error).replace("\n", "\n  ") for error in self._errors]
            raise FlagError(f"{len(texts)} problems:\n  " + "\n  ".join(texts))


def check_paths(flags: argparse.Namespace, *names: str, positional: Sequence[str] = ()) -> None:
    """Refuse files and folders that are not there, before the work that they are needed after.

    Args:
        flags: as parsed.
        names: of those that name a path, or nothing.
        positional: of those that are written without a name.

    Raises:
        FlagError: naming all of them, with their flags.
    """
    labels = dict.fromkeys(positional, "") | {f: f"--{f.replace('_', '-')}=" for f in names}
    paths = {name: getattr(flags, name) for name in labels}
    missing = [
        f"{labels[name]}{path}: no such file or folder"
        for name, path in paths.items()
        if path and not Path(path).expanduser().exists()
    ]
    if missing:
        raise FlagError("; ".join(missing))


def add_flag(parser: argparse.ArgumentParser) -> None:
    """Adds `--debug`."""
    parser.add_argument("--debug", action="store_true", help=HELP)


def quiet_interrupt() -> None:
    """Ctrl-C ends the program with one line from now on; `--debug` shows where it was.

    What is being written is cleaned up, and the status is that of a process that SIGINT has ended.
    """
    if sys.excepthook is sys.__excepthook__:
        sys.excepthook = _tell_interrupt
    # Ignored it stays, as a shell starts background jobs; so does what somebody else has set.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raises KeyboardInterrupt where it is not swallowed."""
    # jax has a callback run at every garbage collection. What is raised there is printed and
    # dropped, and as collections take long while modules load, Ctrl-C mostly comes then.
    callbacks = [getattr(callback, "__code__", None) for callback in gc.callbacks]
    if frame is not None and frame.f_code in callbacks:
        threading.Timer(0.01, os.kill, (os.getpid(), number)).start()
        return
    raise KeyboardInterrupt


def _tell_interrupt(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    if issubclass(kind, KeyboardInterrupt) and "--debug" not in sys.argv:
        print(f"{program()}: interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def tell(error: Exception, debug: bool) -> int:
    """Says in a line why this program ends; returns its exit status.

    Args:
        error: what has been raised.
        debug: raise it again instead, so that Python shows where it comes from.
    """
    if debug:
        raise error
    print(f"{program()}: {as_typed(describe(error))}", file=sys.stderr)
    return 1


def describe(error: Exception) -> str:
    """What to say of an error; one that is not ours gets its kind, and how to learn more."""
    # As text such an error begins with its number, which tells most people nothing.
    if isinstance(error, OSError) and error.strerror:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        text = error.strerror + (": free some space, or write elsewhere" if full else "")
        return f"{error.filename}: {text}" if error.filename else text
    # KeyError puts its message in quotes.
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if _is_ours(error):
        return text
    kind = type(error).__name__
    return f"{text} ({kind}; --debug shows where)" if text else f"{kind}; --debug shows where"


def raised_in(error: BaseException, file: str | Path) -> bool:
    """Whether an error has come out of the code of a file."""
    name = str(Path(file).absolute())
    return any(
        str(Path(frame.filename).absolute()) == name
        for frame in traceback.extract_tb(error.__traceback__)
    )


def in_file(error: BaseException, file: str | Path) -> str:
    """What to say of an error that a person's own Python file causes: line, kind and words.

    Args:
        error: what has been raised while the file was run.
        file: its path.
    """
    name = str(Path(file).absolute())
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if str(Path(frame.filename).absolute()) == name]
    line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
    words = error.msg if isinstance(error, SyntaxError) else error
    return f"{file}{f', line {line}' if line else ''}: {type(error).__name__}: {words}"


def _is_ours(error: Exception) -> bool:
    """Whether our own code has raised an error, and so has worded it."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    raised_in = place.tb_frame.f_globals["__name__"] if place else type(error).__module__
    return raised_in.partition(".")[0] in _OURS


def check_devices() -> list[Any]:
    """The devices that jax finds, started here.

    Raises:
        DeviceError: none of the kind that JAX_PLATFORMS asks for, or their driver fails.
    """
    try:
        import jax

        return jax.devices()
    # jax's own assertion fails where the plugin of the platform is not installed.
    except (RuntimeError, AssertionError) as error:
        asked = os.environ.get("JAX_PLATFORMS", "")
        why = f": {error}" if str(error) else ""
        way = (
            f"JAX_PLATFORMS={asked} asks for them; unset it, or install what they need"
            if asked
            else "JAX_PLATFORMS=cpu goes without"
        )
        raise DeviceError(
            f"jax cannot use the devices of this machine{why}. {way}; `python launch/doctor.py` "
            "says what is missing"
        ) from error
