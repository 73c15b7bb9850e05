"""Where data lie: in a folder on a disk, or behind the URL of an object store.

A URL becomes a path of universal_pathlib, which has the methods of `pathlib.Path` and speaks by
fsspec to all that fsspec has an implementation for: http, gs, s3, hf and more. Images are asked for
by ranges of bytes, and nothing is kept on a disk but the index.
"""

import concurrent.futures
import os
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from vla_jax.data.errors import DataError
from vla_jax.shipped import install_hint

# A `UPath` has the methods of a `Path` but is none, so that checks at run time let anything pass.
if TYPE_CHECKING:
    DataPath = Path  # that can be read
    NamedPath = PurePath  # that messages name, and that may lead nowhere
else:
    DataPath = NamedPath = Any

AT_ONCE = 32  # requests of a process that wait for a store at the same time
_WAITS = (0.2, 1.0, 5.0)  # s before a request that failed is made again
_AHEAD = 8 << 20  # bytes that are read ahead where a file is read from front to back
# What stores tell of a file that changes when its content does; the first one that is there counts.
_VERSIONS = ("ETag", "etag", "md5Hash", "generation", "LastModified", "Last-Modified", "mtime")


def data_path(where: str | DataPath) -> DataPath:
    """A folder or file as a path, with `~` spelled out; a URL as one that has the same methods.

    Raises:
        DataError: there is no such kind of URL.
    """
    text = str(where)
    if "://" not in text:
        return Path(where).expanduser()
    if text.startswith("file://"):
        return Path(text.removeprefix("file://"))
    from upath import UPath  # takes a tenth of a second that most runs need not wait

    try:
        url: Any = UPath(where)
    except ValueError as error:
        schemes = "https://, gs://, s3:// or hf://"
        raise DataError(f"{error}; data are read from a folder, {schemes}", text) from error
    return url


def is_remote(path: NamedPath) -> bool:
    """Whether it lies on no disk of this machine."""
    return not isinstance(path, os.PathLike)


def require_store(path: DataPath) -> None:
    """Looks for the package that reads from this kind of URL; of a folder there is none.

    Raises:
        DataError: it is not installed.
    """
    remote: Any = path
    try:
        if is_remote(path):
            remote.fs  # noqa: B018 - making it imports the package
    except ImportError as error:
        raise DataError(f"{error}, or: {install_hint('cloud')}", str(path)) from error


def require_disk(path: DataPath, what: str) -> None:
    """Refuses URLs.

    Raises:
        DataError: it is one.
    """
    if is_remote(path):
        raise DataError(f"{what} can be read from a disk only: copy the data first", str(path))


def opened(path: DataPath) -> Any:
    """A binary file that is read from front to back.

    Raises:
        OSError: it cannot be opened.
    """
    if not is_remote(path):
        return open(path, "rb")
    remote: Any = path
    return remote.open("rb", block_size=_AHEAD, cache_type="readahead")


def stamp(path: NamedPath) -> list[int]:
    """Changes whenever a file is replaced or written to; [] if it is missing.

    The time of the last change of an inode cannot be set by hand, unlike that of its content. Of
    what lies in a store it is the store's own word for the version. This is also the way to ask
    whether a file is there: fsspec would have a web server send all of it.
    """
    try:
        if not is_remote(path):
            status = os.stat(path)
            return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
        remote: Any = path
        info = remote.fs.info(remote.path)
    except OSError:
        return []
    version = next((info[key] for key in _VERSIONS if info.get(key)), "")
    return [int(info.get("size") or 0), zlib.crc32(repr(version).encode())]


def stamps(paths: Iterable[NamedPath]) -> list[list[int]]:
    """`stamp` of several files; of a store's, many are asked for at once."""
    listed = list(paths)
    if not any(map(is_remote, listed)):
        return [stamp(path) for path in listed]
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(stamp, listed))


def unchanged(then: list[int], now: list[int]) -> bool:
    """Whether two stamps are of one version of a file.

    An index may have been built on a disk and been copied with its data into a store, which knows
    nothing of the disk's times: then the size must do.
    """
    return now == then if len(now) == len(then) else bool(now and then) and now[0] == then[0]


class RemoteFile:
    """A file of an object store; for any number of threads at once."""

    def __init__(self, path: DataPath):
        """Asks for nothing yet."""
        remote: Any = path
        self._system, self._path = remote.fs, remote.path

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return int(self._system.size(self._path))

    def read(self, size: int, at: int) -> bytes:
        """Up to `size` bytes from `at` on; asked for again a few times if that fails.

        Raises:
            OSError: the store does not answer, or sends more than that.
        """
        data = _patiently(lambda: self._system.cat_file(self._path, start=at, end=at + size))
        return _checked(data, size)


def read_ranges(spans: Sequence[tuple[DataPath, int, int]]) -> list[bytes | None]:
    """Bytes `begin`..`end`, exclusive, of files of one store, all asked for at the same time.

    Asked for one by one, each would cost several times as much of the processor.

    Args:
        spans: (file, begin, end) of each.

    Returns:
        The bytes; None where that failed, and is to be asked for alone.
    """
    if not spans:
        return []
    # A URL makes its name anew whenever it is asked, so that each is asked once.
    files: dict[int, Any] = {id(path): path for path, _, _ in spans}
    names = {key: file.path for key, file in files.items()}
    begins, ends = [begin for _, begin, _ in spans], [end for _, _, end in spans]
    system: Any = next(iter(files.values())).fs
    # A gap of None keeps fsspec from reading what lies between two ranges.
    parts = system.cat_ranges([names[id(path)] for path, _, _ in spans], begins, ends, max_gap=None)
    return [
        part if isinstance(part, bytes) and len(part) == end - begin else None
        for part, begin, end in zip(parts, begins, ends, strict=True)
    ]


def _patiently(request: Callable[[], bytes]) -> bytes:
    for wait in (*_WAITS, None):
        try:
            return request()
        except FileNotFoundError:
            raise
        # The implementations raise their own; of most the next one goes well.
        except Exception as error:
            if wait is None:
                reason = str(error) or type(error).__name__
                raise OSError(None, f"the store does not answer: {reason}") from error
            time.sleep(wait)
    raise AssertionError("the last one has returned or raised")


def _checked(data: bytes, size: int) -> bytes:
    if len(data) > size:
        raise OSError(None, "the server does not send ranges of a file, only all of it")
    return data
