"""Where the samples of an mp4 or mov file lie, and when each is shown.

Read from the movie's tables alone, so that one frame of a file of any size can be found without
opening it again. What is not the ordinary file (fragments, several tracks of video, edits that cut
something away) is left to the library that opens all of them.

Source: ISO/IEC 14496-12, "ISO base media file format"; the names of boxes are its own.

Axis letters: n samples.
"""

import struct
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from vla_jax.data.open_files import Bytes

_LARGEST = 64 << 20  # bytes of a movie box that are believed
_HEADER = 8  # bytes of a box's size and name


class Samples(NamedTuple):
    """The samples of the one track of video, in the order in which they are decoded.

    Attributes:
        position: of the first byte of each in the file.
        size: bytes of each.
        decoded: when each is decoded, in ticks of the track, counted from 0.
        shown: when each is shown, in ticks of the track.
        keys: numbers of those that are decoded without any other.
    """

    position: Int64[np.ndarray, "n"]
    size: Int64[np.ndarray, "n"]
    decoded: Int64[np.ndarray, "n"]
    shown: Int64[np.ndarray, "n"]
    keys: Int64[np.ndarray, "k"]


def read_samples(file: Bytes) -> Samples | None:
    """The samples of an opened file; None of a file that has no such tables or unusual ones."""
    try:
        movie = _movie(file)
        if movie is None or _find(movie, b"mvex") is not None:
            return None
        tracks = [box for name, box in _boxes(movie) if name == b"trak" and _is_video(box)]
        return _samples(tracks[0], file.size) if len(tracks) == 1 else None
    except (struct.error, ValueError, IndexError, OverflowError):
        return None


def _movie(file: Bytes) -> memoryview | None:
    """The content of the box `moov`; None of a file without one, or one of fragments."""
    at, end, movie = 0, file.size, None
    while at + _HEADER <= end:
        head = file.read(16, at)
        size, name = struct.unpack(">I4s", head[:_HEADER])
        begin = at + _HEADER
        if size == 1:  # the size follows in 64 bits
            size, begin = struct.unpack(">Q", head[_HEADER:])[0], at + 16
        elif size == 0:  # to the end of the file
            size = end - at
        # Both boxes announce fragments, whose samples stand in tables of their own.
        if size < begin - at or name in (b"moof", b"sidx"):
            return None
        if name == b"moov":
            # One movie a file is ordinary, and a damaged size must not make us read gigabytes.
            if movie is not None or size > _LARGEST:
                return None
            movie = memoryview(file.read(at + size - begin, begin))
        at += size
    return movie


def _boxes(content: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    at = 0
    while at + _HEADER <= len(content):
        size, name = struct.unpack_from(">I4s", content, at)
        # That covers 0 and 1, which mean something else and do not occur inside an ordinary movie.
        if size < _HEADER or at + size > len(content):
            raise ValueError(f"a box of {size} bytes")
        yield name, content[at + _HEADER : at + size]
        at += size


def _find(content: memoryview, *path: bytes) -> memoryview | None:
    """The first box at a path."""
    for name in path:
        inner = next((box for kind, box in _boxes(content) if kind == name), None)
        if inner is None:
            return None
        content = inner
    return content


def _is_video(track: memoryview) -> bool:
    handler = _find(track, b"mdia", b"hdlr")
    # Before the kind of a track stand four bytes of version and flags and four zeros.
    return handler is not None and bytes(handler[8:12]) == b"vide"


def _samples(track: memoryview, file_size: int) -> Samples | None:
    tables = _find(track, b"mdia", b"minf", b"stbl")
    if tables is None:
        return None
    named = dict(_boxes(tables))
    offsets = named.get(b"stco", named.get(b"co64"))
    required = [named.get(name) for name in (b"stsd", b"stts", b"stsc", b"stsz")]
    if offsets is None or any(box is None for box in required):
        return None
    described, times, chunks, sizes = (box for box in required if box is not None)
    if _count(described) != 1:  # of several kinds, each packet tells which
        return None
    # One size for all samples, or 0 and a table with the size of each.
    fixed, n = struct.unpack_from(">II", sizes, 4)
    if fixed * n > file_size:  # a damaged count would otherwise be believed and take gigabytes
        return None
    size = np.full(n, fixed) if fixed else _rows(sizes, 1, 8)[:, 0].astype(np.int64)
    # `co64` is the same table with 64 bits an offset, for files beyond 4 GiB.
    starts = _rows(offsets, 1, kind=">u8" if b"stco" not in named else ">u4")[:, 0]
    position = _positions(size, starts.astype(np.int64), _rows(chunks, 3).astype(np.int64))
    durations = _runs(_rows(times, 2), n)
    if not n or not len(position) == len(size) == n:
        return None
    # The file gives durations; a sample's time is the sum of those before it.
    decoded = np.cumsum(durations) - durations
    shown = decoded
    if b"ctts" in named:  # of video that is shown in another order
        # Signed, as later writers shift frames to the front as well.
        shown = decoded + _runs(_rows(named[b"ctts"], 2, kind=">i4"), n)
    # Without a table of key frames every sample is one.
    keys = np.arange(n)
    if b"stss" in named:
        keys = _rows(named[b"stss"], 1)[:, 0].astype(np.int64) - 1
    if not len(keys) or keys[0] != 0 or keys[-1] >= n or (np.diff(keys) <= 0).any():
        return None
    if not _is_whole(_find(track, b"edts", b"elst"), int(shown.min())):
        return None
    return Samples(position, size, decoded, shown, keys)


def _count(box: memoryview) -> int:
    return struct.unpack_from(">I", box, 4)[0]


def _rows(box: memoryview, columns: int, at: int = 4, kind: str = ">u4") -> np.ndarray:
    """A table of whole numbers, with how many rows it has in front."""
    rows = struct.unpack_from(">I", box, at)[0]
    numbers = np.frombuffer(box, kind, rows * columns, at + 4)
    return numbers.reshape(rows, columns)


def _runs(rows: np.ndarray, n: int) -> Int64[np.ndarray, "n"]:
    """Of rows (how often, what) each as often, which are `n` in all."""
    counts = rows[:, 0].astype(np.int64)
    # Before they are written out: a single damaged count may stand for four billion samples.
    if counts.sum() != n:
        raise ValueError("runs and samples differ")
    return np.repeat(rows[:, 1].astype(np.int64), counts)


def _positions(
    size: Int64[np.ndarray, "n"], starts: Int64[np.ndarray, "c"], chunks: Int64[np.ndarray, "r 3"]
) -> Int64[np.ndarray, "n"]:
    """Where samples begin that lie in chunks, one after another."""
    # From chunk `first` on each holds so many samples, until the next row says otherwise.
    first, held = chunks[:, 0] - 1, chunks[:, 1]
    per_chunk = np.repeat(held, np.diff(first, append=len(starts)))
    if len(per_chunk) != len(starts) or per_chunk.sum() != len(size):
        raise ValueError("chunks and samples differ")
    # Samples of a chunk lie back to back: each begins where its chunk does, plus the bytes of those
    # before it in the chunk. A chunk without samples at the end has no first one, hence the
    # minimum.
    begins = np.cumsum(size) - size
    firsts = np.cumsum(per_chunk) - per_chunk
    return np.repeat(starts - begins[np.minimum(firsts, len(size) - 1)], per_chunk) + begins


def _is_whole(edits: memoryview | None, first: int) -> bool:
    """Whether an edit list, if any, shows the whole track from its first frame on."""
    if edits is None:
        return True
    entry = ">QqI" if edits[0] == 1 else ">IiI"
    starts = []
    for number in range(_count(edits)):
        _, start, rate = struct.unpack_from(entry, edits, 8 + number * struct.calcsize(entry))
        # The rate has 16 bits before the point and 16 behind: this is 1, ordinary speed.
        if rate != 1 << 16:
            return False
        if start != -1:  # -1: nothing is shown, which only shifts what follows
            starts.append(start)
    # An edit that begins later than the first frame cuts something away.
    return len(starts) == 1 and 0 <= starts[0] <= first
