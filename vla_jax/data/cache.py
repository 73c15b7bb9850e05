"""Folders of arrays, and files of numbers, that are made once and then shared."""

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import logging
import os
import shutil
import socket
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vla_jax import progress, workers
from vla_jax.data.errors import DataError
from vla_jax.data.places import DataPath, is_remote, opened

log = logging.getLogger(__name__)
DONE = "index.json"  # written last
SKIPPED = "skipped"  # in it: a list of what was wrong and is left out
ARRAYS = "arrays"  # in it: name of every array -> its size and checksum
_CHECKED = 4 << 20  # bytes of an array up to which its checksum is compared at every opening
_FULL = (errno.ENOSPC, errno.EDQUOT)
_BESIDE = "vla_index"  # the folder beside the data
_MAPPED = 1 << 20  # bytes from which an array is mapped: each of these holds a descriptor


def cached_folder(
    directory: DataPath | None,
    cache_dir: str,
    name: str,
    rebuild: bool,
    build: Callable[[Path], dict[str, Any]],
    skip: bool,
    renew: Callable[[dict[str, Any]], dict[str, Any] | None] = lambda meta: meta,
) -> Path:
    """The folder `name`, built first where there is none that is whole and of the same data.

    Args:
        directory: the data it belongs to, the folder lies in `vla_index` below; None = it has no
            place. Below a URL nothing is written, but one that was built on a disk and copied there
            with the data is taken.
        cache_dir: where it lies instead; "" = beside the data if that may be written, else
            ~/.cache/vla_jax.
        name: tells by a digest what is inside.
        rebuild: make it anew even if there is one.
        build: fills an empty folder; returns what `DONE` shall hold, with `SKIPPED`.
        skip: take one from which something was left out; else it is built anew, as what was wrong
            may have been mended since.
        renew: what `DONE` holds -> the same as it should be now; None = the data are others by
            now, in files of the same names and sizes, and the folder is built anew.

    Raises:
        DataError: the folder cannot be written.
    """
    roots = _roots(directory, cache_dir)
    # Looked at without the lock first, as nearly every run finds a finished folder.
    if not rebuild:
        for root in roots:
            if _fits(root / name, skip, renew):
                return root / name
    root = _first_writable(roots)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _lock(root / f".{name}.lock"):
            # Again under the lock: another process may have built it while this one waited.
            if rebuild or not _fits(root / name, skip, renew, logging.DEBUG):
                stored = _stored(directory, name) if not rebuild else None
                if stored is not None:
                    _build(root / name, functools.partial(_copied, stored))
                if stored is None or not _fits(root / name, skip, renew):
                    _build(root / name, build)
    except OSError as error:
        room = "free some space, or " if error.errno in _FULL else ""
        hint = f"{room}set data.cache_dir to a folder that can be written"
        is_file = isinstance(error, FileExistsError | NotADirectoryError)
        reason = "there is a file in its way" if is_file else error
        problem = f"the index cannot be made ({reason}): {hint}"
        raise DataError(problem, root) from error
    return root / name


def _stored(directory: DataPath | None, name: str) -> DataPath | None:
    """A finished folder beside data that lie in an object store."""
    if directory is None or not is_remote(directory):
        return None
    folder = directory / _BESIDE / name
    return folder if (folder / DONE).is_file() else None


def _copied(stored: DataPath, work: Path) -> dict[str, Any]:
    """Fills `work` with a stored folder; whether it is whole is seen as of any other."""
    log.info("the index is copied from %s", stored)
    meta = json.loads((stored / DONE).read_text(encoding="utf-8"))
    for name in meta[ARRAYS]:
        with opened(stored / name) as source, open(work / name, "wb") as target:
            shutil.copyfileobj(source, target, _CHECKED)
    return meta


def _build(folder: Path, build: Callable[[Path], dict[str, Any]]) -> None:
    """Builds beside `folder` and puts the result in its place, whole.

    What is large is on the disk by then. The rest is compared with its checksums whenever it is
    opened, so that nobody has to wait for it; a crash in between costs building it anew.
    """
    started = time.monotonic()
    # Beside the target, as a rename works within one file system only.
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        meta = build(work)
        arrays = _arrays(work)
        (work / DONE).write_text(json.dumps(meta | {ARRAYS: arrays}), encoding="utf-8")
        for name, (size, _) in arrays.items():
            # Smaller ones need no wait: `_fits` compares their checksums.
            if size > _CHECKED:
                sync(work / name)
        # mkdtemp makes folders that only their owner may read; others share this one.
        work.chmod(0o755)
        # Somebody may have linked it from another disk; a file has no business there.
        if folder.is_symlink() or folder.is_file():
            folder.unlink()
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    # A crash costs building anew what it has cut off, which is told from the arrays by their
    # checksums; what is small is built sooner than the disk's journal answers.
    if sum(size for size, _ in arrays.values()) > _CHECKED:
        threading.Thread(target=sync, args=(folder / DONE,), daemon=True).start()
    log.info("indexed in %.1f s: %s", time.monotonic() - started, folder)


def sync(path: Path) -> None:
    """Waits until a file or the entries of a folder are on the disk, where it can be asked for."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes JSON into a file that is whole or as it was before, after a crash too."""
    work = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        work.write_text(json.dumps(content), encoding="utf-8")
        sync(work)
        os.replace(work, path)
    finally:
        work.unlink(missing_ok=True)


def content_of(meta: Mapping[str, Any]) -> str:
    """A digest of all arrays of a folder, from what its `DONE` holds."""
    return hashlib.sha256(json.dumps(meta.get(ARRAYS), sort_keys=True).encode()).hexdigest()


def _arrays(folder: Path) -> dict[str, list[int]]:
    """Size and checksum of every array in a folder."""
    return {p.name: [p.stat().st_size, _checksum(p)] for p in sorted(folder.glob("*.npy"))}


def _checksum(path: Path) -> int:
    crc = 0
    with open(path, "rb", buffering=0) as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc


def cached_json(
    directory: DataPath | None,
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
    content = make()
    root = _first_writable(roots)
    try:
        root.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=root))
        try:
            # Not synced: a file that a crash has cut off is no JSON, and is made again.
            (work / name).write_text(json.dumps(content, indent=1), encoding="utf-8")
            os.replace(work / name, root / name)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        log.info("not cached: %s", error)
    return content


def _roots(directory: DataPath | None, cache_dir: str) -> list[Path]:
    if cache_dir:
        return [Path(cache_dir).expanduser()]
    beside = [] if directory is None or is_remote(directory) else [directory / _BESIDE]
    return [*beside, Path("~/.cache/vla_jax").expanduser()]


def _fits(
    folder: Path,
    skip: bool,
    renew: Callable[[dict[str, Any]], dict[str, Any] | None],
    level: int = logging.WARNING,
) -> bool:
    """Whether the folder is whole, of the data as they are now, and lacks nothing that must be."""
    if not (folder / DONE).exists():
        return False
    try:
        meta = json.loads((folder / DONE).read_text(encoding="utf-8"))
        # What was wrong may have been mended since.
        if meta[SKIPPED] and not skip:
            return False
        for name, (size, crc) in meta[ARRAYS].items():
            path = folder / name
            if path.stat().st_size != size or (size <= _CHECKED and _checksum(path) != crc):
                log.log(level, "%s is damaged and is built anew: %s", folder, name)
                return False
        renewed = renew(meta)
    # An index.json of an older version lacks keys or holds other types.
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.log(level, "%s is damaged, or of before, and is built anew: %r", folder, error)
        return False
    if renewed is None:
        log.log(level, "%s is built anew: the data have changed since", folder)
        return False
    if renewed != meta:
        with contextlib.suppress(OSError):  # a folder that only others may write is as good
            write_json(folder / DONE, renewed)
    return True


def _first_writable(roots: Sequence[Path]) -> Path:
    return next((root for root in roots if _writable(root)), roots[-1])


def _writable(root: Path) -> bool:
    existing = next(p for p in (root, *root.parents) if p.exists())
    # Mode bits as well: a folder nobody may write is left alone even by root.
    return os.access(existing, os.W_OK) and bool(existing.stat().st_mode & 0o222)


@contextlib.contextmanager
def _lock(path: Path):
    """Lets one process build while others wait; file systems without locks go without."""
    # "a+" does not truncate: the file says who holds the lock.
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            log.info("waiting for the index that %s is making", file.read().strip() or "another")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            pass
        try:
            with contextlib.suppress(OSError):
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
                file.flush()
            yield
        finally:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def run_jobs(
    work: Callable[[Any], Any], jobs: Sequence[Any], parallel: bool
) -> Iterator[Iterable[Any]]:
    """What `work` gives for every job, in order, under a progress bar, to be entered.

    Args:
        work: a function of a module.
        jobs: its arguments.
        parallel: whether the work is worth processes.
    """
    count = min(os.cpu_count() or 1, len(jobs), 16)
    if count < 2 or not parallel:
        yield progress.bar(map(work, jobs), total=len(jobs), desc="index")
        return
    with workers.in_order(work, jobs, count) as results:
        yield progress.bar(results, total=len(jobs), desc="index")


def write_columns(
    folder: Path, parts: Generator[Mapping[str, np.ndarray], None, None]
) -> list[str]:
    """Writes {file stem: rows} part after part; a stem's file holds the rows of all parts.

    `parts` is closed in any case: what it still has at work would go on after an error here.

    Returns:
        The stems.
    """
    columns: dict[str, _Column] = {}
    try:
        with contextlib.closing(parts):
            for part in parts:
                for stem, rows in part.items():
                    if stem not in columns:
                        columns[stem] = _Column(folder / f"{stem}.npy", rows)
                    columns[stem].append(rows)
        for column in columns.values():
            column.close()
    finally:
        for column in columns.values():
            # After close() this does nothing; after an error it frees the descriptors.
            column.abandon()
    return list(columns)


def map_array(path: Path) -> np.ndarray:
    """A saved array, read if it is small and memory-mapped otherwise."""
    if path.stat().st_size < _MAPPED:
        return np.load(path)
    mapped = np.load(path, mmap_mode="r")
    return np.asarray(mapped)  # a plain view: indexing np.memmap itself is several times slower


class _Column:
    """An .npy file that grows along its first axis."""

    def __init__(self, path: Path, sample: np.ndarray):
        self._file = open(path, "wb")  # noqa: SIM115 - closed by close()
        self._like, self._rows = sample[:0], 0
        # Written with 0 rows for now; close() writes it again with the count.
        self._data_at = self._header()

    def _header(self) -> int:
        # numpy pads the header so that the first axis can grow in place.
        description = np.lib.format.header_data_from_array_1_0(self._like)
        description["shape"] = (self._rows, *self._like.shape[1:])
        self._file.seek(0)
        np.lib.format.write_array_header_1_0(self._file, description)
        return self._file.tell()

    def append(self, array: np.ndarray) -> None:
        # The header holds one dtype, that of the first part.
        self._file.write(np.ascontiguousarray(array, self._like.dtype).tobytes())
        self._rows += len(array)

    def close(self) -> None:
        if self._header() != self._data_at:
            raise RuntimeError("numpy's header outgrew its padding")
        self._file.close()

    def abandon(self) -> None:
        """Closes the file without a word, as on a full disk; a closed one stays as it is."""
        with contextlib.suppress(OSError):
            self._file.close()
