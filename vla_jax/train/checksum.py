"""Checksums of the files of a folder, so that damage is noticed before it is trained on.

A folder is sealed when it is complete: `checksums.json` in it lists size and SHA-256 of every file,
and all of it is on the disk by then, not only in the cache of the operating system. Damage is what
disks, copies and crashes do; a seal is no protection against somebody who wants to deceive.
"""

import functools
import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SEAL = "checksums.json"


def seal(folder: str | Path) -> None:
    """Write all files of a folder through to the disk and list their checksums beside them."""
    folder = Path(folder)
    files = _files(folder)
    with ThreadPoolExecutor() as pool:  # hashlib lets go of the interpreter's lock
        entries = dict(pool.map(lambda path: _entry(folder, path), files))
    # The seal appears whole or not at all: half of one would condemn good files.
    beside = folder / f"{SEAL}.tmp"
    with beside.open("w", encoding="utf-8") as file:
        json.dump({"algorithm": "sha256", "files": entries}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, folder / SEAL)
    # A new name lasts only once its directory is synced, too.
    for directory in {folder, *(path.parent for path in files)}:
        _sync_directory(directory)


def is_sealed(folder: str | Path) -> bool:
    """Whether the folder has a list of checksums; folders of earlier versions have none."""
    return (Path(folder) / SEAL).is_file()


def problems(folder: str | Path, part: tuple[int, int] = (0, 1)) -> list[str]:
    """What differs between a folder and its seal, one line for each file; [] if nothing does.

    A folder without a seal is looked at for what a crash leaves: files without content.

    Args:
        folder: to check.
        part: (i, n): every n-th file from the i-th on, so that n processes share the work.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return [f"{folder.name}: missing"]
    if not is_sealed(folder):
        return [f"{_name(folder, path)}: empty" for path in _files(folder) if not _size(path)]
    try:
        listed = json.loads((folder / SEAL).read_text(encoding="utf-8"))["files"]
        # Sorted, so that processes that share the work cut the same list.
        entries = sorted((name, int(size), str(digest)) for name, (size, digest) in listed.items())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{folder.name}/{SEAL}: cannot be read: {error}"]
    with ThreadPoolExecutor() as pool:
        checked = pool.map(lambda entry: _problem(folder, *entry), entries[part[0] :: part[1]])
        return [problem for problem in checked if problem]


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content; a file that did not change is read once."""
    stat = path.stat()
    # Size, time and inode together tell whether it is still the file that was read.
    return _digest(path, stat.st_size, stat.st_mtime_ns, stat.st_ino)


@functools.lru_cache(maxsize=4096)
def _digest(path: Path, *identity: int) -> str:
    del identity  # a part of the cache's key alone
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(folder: Path) -> Sequence[Path]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    # A seal cannot list itself, nor its own temporary file.
    return sorted(path for path in paths if not path.name.startswith(SEAL))


def _entry(folder: Path, path: Path) -> tuple[str, tuple[int, str]]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
        return path.relative_to(folder).as_posix(), (os.fstat(file.fileno()).st_size, digest)


def _problem(folder: Path, name: str, size: int, digest: str) -> str:
    path = folder / name
    try:
        # The size first: a file that was cut short need not be read.
        actual_size = path.stat().st_size
        if actual_size != size:
            return f"{folder.name}/{name}: {actual_size} bytes, were {size}"
        return "" if file_digest(path) == digest else f"{folder.name}/{name}: other content"
    except OSError as error:
        return f"{folder.name}/{name}: {error.strerror}"


def _name(folder: Path, path: Path) -> str:
    return f"{folder.name}/{path.relative_to(folder).as_posix()}"


def _size(path: Path) -> int:
    return path.stat().st_size


def _sync_directory(directory: Path) -> None:
    """Make new names last; some network file systems refuse, and order writes on their own."""
    number = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError:
        return
    finally:
        os.close(number)
