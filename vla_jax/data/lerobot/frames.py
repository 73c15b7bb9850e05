"""Frames of mp4 files by number: from the file's bytes straight into a decoder.

A file is opened by PyAV once, to see what it is. From then on a table says where its samples lie,
the bytes of a span come by one read, and one of few decoders, which all files of a camera share,
is fed with them: no container is opened, kept or sought in for a frame.
"""

import math
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np

from vla_jax.data.lerobot.mp4 import Samples, read_samples
from vla_jax.data.open_files import Bytes, shared_file
from vla_jax.data.places import DataPath

_TABLE_BYTES = 64 << 20  # of the tables of all files that are kept
_DECODERS = 16  # idle ones that are kept
_FAR = 1 << 16  # bytes between two packets from which both are read by themselves
_PROBES = 16  # samples that are compared with what PyAV says of the file
# Decoders that begin at a key frame as if nothing had been before it; mpeg4's does not always.
_CODECS = ("h264", "hevc", "libdav1d", "av1", "vp9", "libvpx-vp9")
EXACT = 0.2  # share of a frame's time within which a frame is the one that is meant
TIE = 1e-3  # likewise: two frames are as near, and the earlier one is taken


class Kind(NamedTuple):
    """What a decoder has to know of a file; decoders of equal kinds are the same."""

    codec: str
    tag: str
    extradata: bytes | None
    size: tuple[int, int]
    colors: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class File:
    """What is remembered of every file whose frames are found by a table.

    Attributes:
        path: of the file.
        owner: see `shared_file`.
        tick: s in which its times are counted.
        step: s between two frames.
        reach: s that a frame may be off.
        kind: of its decoder.
    """

    path: DataPath
    owner: int
    tick: float
    step: float
    reach: float
    kind: Kind


class _Span(NamedTuple):
    """Samples to be decoded, by the order of decoding, and the frames that are wanted of them."""

    first: int
    last: int
    numbers: list[int]


class Table:
    """Where the frames of one file lie, by the order in which they are shown."""

    def __init__(self, samples: Samples):
        """Sorts the samples by when they are shown."""
        order = np.argsort(samples.shown, kind="stable")
        shown = samples.shown[order] - samples.shown[order[0]]
        self.shown = shown.astype(np.int32) if shown[-1] < 2**31 else shown
        # In most files frames are shown in the order in which they are decoded.
        self.order = None if (np.diff(order) == 1).all() else order.astype(np.int32)
        self.rank = None
        if self.order is not None:
            self.rank = np.empty_like(self.order)
            self.rank[self.order] = np.arange(len(order), dtype=np.int32)
        self.position, self.size = samples.position, samples.size.astype(np.int32)
        self.keys = samples.keys.astype(np.int32)
        arrays = (self.shown, self.order, self.rank, self.position, self.size, self.keys)
        # About a thousand bytes for the objects around the arrays.
        self.nbytes = 1000 + sum(array.nbytes for array in arrays if array is not None)

    def nearest(self, time: float, tick: float, step: float) -> tuple[int, float]:
        """Number of the frame nearest to a time, and how far off it is (all in s)."""
        shown = self.shown
        # As a number of their type: for another one numpy would convert the whole table.
        ticks = min(max(math.ceil((time - EXACT * step) / tick), 0), int(shown[-1]))
        number = int(shown.searchsorted(shown.dtype.type(ticks)))
        later = int(shown[number]) * tick - time
        if number:
            earlier = time - int(shown[number - 1]) * tick
            if earlier <= abs(later) + TIE * step:
                return number - 1, earlier
        return number, abs(later)

    def decoded(self, number: int) -> int:
        """The place in the order of decoding of the frame that is shown as `number`."""
        return number if self.order is None else int(self.order[number])

    def shown_as(self, place: int) -> int:
        """The inverse of `decoded`."""
        return place if self.rank is None else int(self.rank[place])

    def spans(self, numbers: Sequence[int]) -> list[_Span]:
        """What has to be decoded for these frames."""
        spans: list[_Span] = []
        for number in numbers:
            place = self.decoded(number)
            key = int(self.keys.searchsorted(np.int32(place), side="right")) - 1
            # A frame that is shown before the key frame in front of it leans on the one before.
            if key and self.shown_as(int(self.keys[key])) > number:
                key -= 1
            first = int(self.keys[key])
            last = spans[-1] if spans else _Span(0, -2, [])
            if last.first <= first <= last.last + 1:
                spans[-1] = _Span(last.first, max(last.last, place), [*last.numbers, number])
            else:
                spans.append(_Span(first, place, [number]))
        return spans


class Decoder:
    """A decoder and what turns its frames into RGB; for one thread at a time."""

    def __init__(self, context: Any):
        """Takes over a codec's context of PyAV, in whatever state it is."""
        from av import Packet
        from av.video.reformatter import VideoReformatter

        self._context, self._packet = context, cast(Any, Packet)
        # One context for all frames, on this thread: PyAV would make one with its threads a frame.
        self._convert: Any = VideoReformatter()
        # Of this codec alone a frame that is no reference is one for no other frame.
        self._may_skip = context.name == "h264"
        context.flush_buffers()

    def decode(
        self, table: Table, file: Bytes, numbers: Sequence[int]
    ) -> dict[int, np.ndarray] | None:
        """RGB of these frames (ascending); None if the decoder does not show all of them.

        Raises:
            OSError: the file is shorter than its tables say.
            FFmpegError: the data are damaged.
        """
        images: dict[int, np.ndarray] = {}
        for span in table.spans(numbers):
            wanted = set(span.numbers)
            left = len(wanted)
            for frame in self._frames(table, file, span, wanted):
                if frame.pts in wanted:
                    images[frame.pts], left = rgb(self._convert, frame), left - 1
                    if not left:
                        break
            if left:
                return None
            # What is still held back must not come out among the next frames.
            self._context.flush_buffers()
        return images

    def _frames(self, table: Table, file: Bytes, span: _Span, wanted: set[int]) -> Iterator[Any]:
        places, skips = range(span.first, span.last + 1), False
        for place, data in zip(places, _packets(table, file, span), strict=True):
            packet, number = self._packet(data), table.shown_as(place)
            # The decoder hands this number on, so that frames are known again in whatever order
            # they come.
            packet.pts = number
            if self._may_skip and skips != (number not in wanted):
                skips = not skips
                self._context.skip_frame = "NONREF" if skips else "DEFAULT"
            yield from self._context.decode(packet)
        # Without a packet it gives out what it still holds back.
        yield from self._context.decode(None)


def rgb(convert: Any, frame: Any) -> np.ndarray:
    """Pixels [h, x, 3] of a frame, which share its memory."""
    plane = convert.reformat(frame, format="rgb24", threads=1).planes[0]
    rows = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)
    # Decoders pad rows so that each begins at an aligned address.
    return rows[:, : 3 * plane.width].reshape(plane.height, plane.width, 3)


def _packets(table: Table, file: Bytes, span: _Span) -> Iterator[memoryview]:
    """The bytes of every sample of a span."""
    begins = table.position[span.first : span.last + 1].tolist()
    sizes = table.size[span.first : span.last + 1].tolist()
    ends = [begin + size for begin, size in zip(begins, sizes, strict=True)]
    low, high = min(begins), max(ends)
    # Unless other tracks lie in between, one read fetches all.
    content = _bytes(file, low, high - low) if high - low <= sum(sizes) + _FAR else None
    for begin, end in zip(begins, ends, strict=True):
        if content is None:
            yield _bytes(file, begin, end - begin)
        else:
            yield content[begin - low : end - low]


def _bytes(file: Bytes, begin: int, length: int) -> memoryview:
    data = file.read(length, begin)
    # It has been cut off since its tables were written.
    if len(data) < length:
        raise OSError("the file ends early")
    return memoryview(data)


class FrameTables:
    """The tables of all files of a process, the last used ones kept; and their decoders."""

    def __init__(self):
        """Nothing is known yet."""
        self._lock = threading.Lock()
        self._tables: OrderedDict[File, Table] = OrderedDict()
        self._bytes = 0
        self._kinds: dict[Kind, Kind] = {}
        self._idle: list[tuple[Kind, Decoder]] = []

    def file(
        self, path: DataPath, owner: int, stream: Any, step: float, reach: float
    ) -> File | None:
        """What is worth remembering of a file that PyAV has opened; None: no ordinary mp4.

        Raises:
            OSError: it cannot be read.
        """
        context = stream.codec_context
        if context.name not in _CODECS:
            return None
        samples = read_samples(shared_file(path, owner))
        if samples is None or not _agree(samples, stream.index_entries):
            return None
        colors = (context.color_range, context.colorspace, context.color_primaries)
        kind = Kind(
            codec=context.name,
            tag=context.codec_tag,
            extradata=context.extradata,
            size=(context.width, context.height),
            colors=(*map(int, colors), int(context.color_trc)),
        )
        # One object for all that are equal, so that comparing them costs nothing.
        kind = self._kinds.setdefault(kind, kind)
        file = File(path, owner, float(stream.time_base), step, reach, kind)
        self._keep(file, samples)
        return file

    def table(self, file: File) -> Table | None:
        """Its table, read anew if it is not kept any more; None: the file is another by now."""
        with self._lock:
            if file in self._tables:
                self._tables.move_to_end(file)
                return self._tables[file]
        samples = read_samples(shared_file(file.path, file.owner))
        return None if samples is None else self._keep(file, samples)

    def _keep(self, file: File, samples: Samples) -> Table:
        table = Table(samples)
        with self._lock:
            if file not in self._tables:
                self._tables[file] = table
                self._bytes += table.nbytes
            while self._bytes > _TABLE_BYTES and len(self._tables) > 1:
                self._bytes -= self._tables.popitem(last=False)[1].nbytes
        return table

    def take(self, kind: Kind) -> Decoder | None:
        """An idle decoder of this kind."""
        with self._lock:
            for i in reversed(range(len(self._idle))):
                if self._idle[i][0] is kind:
                    return self._idle.pop(i)[1]
        return None

    def give(self, kind: Kind, decoder: Decoder) -> None:
        """Keeps a decoder for the next read."""
        with self._lock:
            self._idle.append((kind, decoder))
            del self._idle[:-_DECODERS]


def _agree(samples: Samples, entries: Any) -> bool:
    """Whether PyAV has found the same samples."""
    n = len(samples.position)
    if len(entries) != n:
        return False
    first = entries[0].timestamp
    for place in {*np.linspace(0, n - 1, min(n, _PROBES)).astype(int).tolist()}:
        entry = entries[place]
        ours = (samples.position[place], samples.size[place], samples.decoded[place])
        if (entry.pos, entry.size, entry.timestamp - first) != ours or entry.is_discard:
            return False
    return True
