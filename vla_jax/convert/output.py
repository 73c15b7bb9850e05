"""All or nothing: outputs are written beside their place and renamed into it once whole."""

import os
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class OutputError(ValueError):
    """A place that cannot be written to."""


def check_free(path: str | Path, overwrite: bool = False) -> None:
    """Refuse a place that is taken; an empty folder is not.

    Raises:
        OutputError: if something is there and `overwrite` is off.
    """
    path = Path(path).absolute()
    taken = path.exists() and not (path.is_dir() and not any(path.iterdir()))
    if taken and not overwrite:
        raise OutputError(f"{path}: exists; choose another OUT or add --overwrite")


@contextmanager
def whole(path: str | Path, overwrite: bool = False, folder: bool = True) -> Iterator[Path]:
    """A path to write to, which becomes `path` if the block ends well and vanishes if it does not.

    Args:
        path: the output; its parents are made.
        overwrite: replace what is there; it stays until the new one is whole.
        folder: make the path a folder; otherwise it is left for a file.

    Raises:
        OutputError: if something is there and `overwrite` is off.
    """
    check_free(path, overwrite)
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, as a rename is atomic only within one file system.
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    try:
        if folder:
            beside.mkdir()
        yield beside
        if path.exists():
            # No folder can be renamed over one that is not empty, so the old one steps aside.
            os.replace(path, old)
        try:
            os.replace(beside, path)
        except OSError:
            # The new output failed to take the place that the old one has just left.
            if old.exists():
                os.replace(old, path)
            raise
    finally:
        # After success `beside` is gone, after a failure `old` is back in its place.
        for left in (beside, old):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


def peak_rss_bytes() -> int:
    """Most memory this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # ru_maxrss counts bytes on macOS and KiB on Linux.
    return peak if sys.platform == "darwin" else peak * 1024


class Stopwatch:
    """Wall time since it was made, CPU time and memory of the process, as text."""

    def __init__(self) -> None:
        self._began = time.perf_counter()

    def __str__(self) -> str:
        wall = time.perf_counter() - self._began
        used = f"{time.process_time():.1f} s of CPU, peak RSS {peak_rss_bytes() / 2**30:.2f} GiB"
        return f"{wall:.1f} s, {used}"
