"""Folders of arrays, and files of numbers, that are made once and then shared."""

import concurrent.futures
import contextlib
import fcntl
import json
import logging
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vla_jax import progress

log = logging.getLogger(__name__)
DONE = "index.json"  # what `build` writes last
SKIPPED = "skipped"  # in it: a list of what was wrong and is left out


def cached_folder(
    directory: Path | None,
    cache_dir: str,
    name: str,
    rebuild: bool,
    build: Callable[[Path], None],
    skip: bool,
) -> Path:
    """The folder `name`, built first where there is none.

    Args:
        directory: the data it belongs to, the folder lies in `vla_index` below; None = not on a
            disk.
        cache_dir: where it lies instead; "" = beside the data if that may be written, else
            ~/.cache/vla_jax.
        name: tells by a digest what is inside.
        rebuild: make it anew even if there is one.
        build: fills an empty folder; writes `DONE`, with `SKIPPED`.
        skip: take one from which something was left out; else it is built anew, as what was wrong
            may have been mended since.
    """
    roots = _roots(directory, cache_dir)
    if not rebuild:
        for root in roots:
            if _fits(root / name, skip):
                return root / name
    root = _first_writable(roots)
    root.mkdir(parents=True, exist_ok=True)
    with _lock(root / f".{name}.lock"):
        if rebuild or not _fits(root / name, skip):
            started = time.monotonic()
            work = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=root))
            try:
                build(work)
                work.chmod(0o755)
                shutil.rmtree(root / name, ignore_errors=True)
                os.replace(work, root / name)
            finally:
                shutil.rmtree(work, ignore_errors=True)
            seconds = time.monotonic() - started
            log.info("indexed in %.1f s: %s", seconds, root / name)
    return root / name


def cached_json(
    directory: Path | None,
    cache_dir: str,
    name: str,
    rebuild: bool,
    make: Callable[[], dict[str, Any]],
) -> dict[str, Any]:
    """What the file `name` beside the folders of `cached_folder` holds; made where there is none.

    No process waits for another here: what is made is small, and the same whoever makes it. Where
    nothing may be written it is made every time.
    """
    roots = _roots(directory, cache_dir)
    for root in [] if rebuild else roots:
        with contextlib.suppress(OSError, ValueError):  # none there, or cut off by a crash
            return json.loads((root / name).read_text(encoding="utf-8"))
    found = make()
    root = _first_writable(roots)
    try:
        root.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=root))
        try:
            (work / name).write_text(json.dumps(found, indent=1), encoding="utf-8")
            os.replace(work / name, root / name)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        log.info("not cached: %s", error)
    return found


def _roots(directory: Path | None, cache_dir: str) -> list[Path]:
    if cache_dir:
        return [Path(cache_dir).expanduser()]
    beside = [] if directory is None else [directory / "vla_index"]
    return [*beside, Path("~/.cache/vla_jax").expanduser()]


def _fits(folder: Path, skip: bool) -> bool:
    done = folder / DONE
    return done.exists() and (skip or not json.loads(done.read_text(encoding="utf-8"))[SKIPPED])


def _first_writable(roots: Sequence[Path]) -> Path:
    return next((root for root in roots if _writable(root)), roots[-1])


def _writable(root: Path) -> bool:
    existing = next(p for p in (root, *root.parents) if p.exists())
    # Mode bits as well: a folder nobody may write is left alone even by root.
    return os.access(existing, os.W_OK) and bool(existing.stat().st_mode & 0o222)


@contextlib.contextmanager
def _lock(path: Path):
    """Lets one process build while others wait; file systems without locks go without."""
    with open(path, "w") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
    path.unlink(missing_ok=True)


def run_jobs(work: Callable[[Any], Any], jobs: Sequence[Any], parallel: bool) -> Iterator[Any]:
    """`work` of every job, in order, under a progress bar; in processes if that is worth it."""
    workers = min(os.cpu_count() or 1, len(jobs), 16)
    if workers < 2 or not parallel:
        yield from progress.bar(map(work, jobs), total=len(jobs), desc="index")
        return
    # spawn: jax has threads by now, and forking a threaded process can deadlock.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context) as pool:
        yield from progress.bar(pool.map(work, jobs), total=len(jobs), desc="index")


def write_columns(folder: Path, parts: Iterable[Mapping[str, np.ndarray]]) -> list[str]:
    """Writes {file stem: rows} part after part; a stem's file holds the rows of all parts.

    Returns:
        The stems.
    """
    columns: dict[str, _Column] = {}
    for part in parts:
        for stem, rows in part.items():
            if stem not in columns:
                columns[stem] = _Column(folder / f"{stem}.npy", rows)
            columns[stem].append(rows)
    for column in columns.values():
        column.close()
    return list(columns)


def map_array(path: Path) -> np.ndarray:
    """A saved array, memory-mapped."""
    mapped = np.load(path, mmap_mode="r")
    return np.asarray(mapped)  # a plain view: indexing np.memmap itself is several times slower


class _Column:
    """An .npy file that grows along its first axis."""

    def __init__(self, path: Path, like: np.ndarray):
        self._file = open(path, "wb")  # noqa: SIM115 - closed by close()
        self._like, self._rows = like[:0], 0
        self._data_at = self._header()

    def _header(self) -> int:
        # numpy pads the header so that the first axis can grow in place.
        description = np.lib.format.header_data_from_array_1_0(self._like)
        description["shape"] = (self._rows, *self._like.shape[1:])
        self._file.seek(0)
        np.lib.format.write_array_header_1_0(self._file, description)
        return self._file.tell()

    def append(self, array: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(array, self._like.dtype).tobytes())
        self._rows += len(array)

    def close(self) -> None:
        if self._header() != self._data_at:
            raise RuntimeError("numpy's header outgrew its padding")
        self._file.close()
