"""What a simulator says of itself, in a process that may crash, hang or print as it likes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any, Optional, Sequence


class AsideError(RuntimeError):
    """The process gave no answer; the message is for the user."""


def ask(module: str, flags: Sequence[str], timeout: float) -> Any:
    """`python -m MODULE FLAGS`; returns the last line of JSON that it prints.

    Args:
        module: of this repository; prints an object or a list.
        flags: for it.
        timeout: seconds.

    Raises:
        AsideError: with the last words of a process that failed or was too slow.
    """
    # The child must find this repository although nothing of it is installed.
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    path = os.pathsep.join([root] + [p for p in [os.environ.get("PYTHONPATH")] if p])
    try:
        done = subprocess.run(
            [sys.executable, "-m", module, *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            timeout=timeout,
            env=dict(os.environ, PYTHONPATH=path),
        )
    except subprocess.TimeoutExpired:
        raise AsideError("no answer within {:g} s".format(timeout)) from None
    # A simulator may print whatever it likes before its answer, which is the last line of JSON.
    answers = [line for line in done.stdout.splitlines() if line.startswith(("{", "[{"))]
    if done.returncode != 0 or not answers:
        words = (done.stderr.strip() or done.stdout.strip()).splitlines() or ["no message"]
        raise AsideError("exit code {}: {}".format(done.returncode, words[-1]))
    return json.loads(answers[-1])


def commit(root: str) -> Optional[str]:
    """Return the commit of a source tree, or None if it is no git checkout of its own."""
    if not os.path.exists(os.path.join(root, ".git")):
        return None
    # Excluding every tag leaves the bare hash, with "-dirty" where files were changed.
    command = ["git", "-C", root, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None
