"""Single frames out of video files, in any order; PyAV (the extra `lerobot`).

A frame is found by its time, counted from the first frame that the stream shows: containers begin
at other times than 0 when they are fragmented, cut, or keep no edit list. The frame nearest to the
time that is asked for is taken, as the video may have more frames a second than rows.

Decoding begins at the key frame before it. LeRobot's own videos have a key frame every second
frame, so that this is cheap; with the usual 250 frames between two key frames it is not, and
converting the dataset pays. Ordinary mp4 files are read by their tables (`frames.py`); all others,
and those in which something is unexpected, through PyAV's containers, a few of which are kept open.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from vla_jax.data.errors import CorruptRecordError, DataError, ImageDecodeError
from vla_jax.data.lerobot.frames import EXACT, TIE, Decoder, File, FrameTables, rgb
from vla_jax.data.open_files import new_owner, shared_file
from vla_jax.data.places import DataPath, is_remote
from vla_jax.files import explain_file
from vla_jax.shipped import install_hint

_IDLE = 16  # opened videos of all datasets that are kept for the next read
_AHEAD = 8  # frames that are decoded and dropped rather than sought
_BLOCK = 1 << 18  # bytes that are asked for at a time where PyAV reads from a store
_BACK = (0.0, 1.0, 10.0)  # s before the frame where a seek may have to begin
_lock = threading.Lock()
_idle: "OrderedDict[int, _Video]" = OrderedDict()
_tables = FrameTables()


class VideoFrames:
    """Frames of the videos of one dataset, for any number of threads."""

    def __init__(self, fps: float):
        """Videos beside rows of `fps` a second; a frame is off by at most half a row's time."""
        self._fps, self._starts, self._owner = fps, {}, new_owner()
        # All that have been looked at; None: it has to be read through its container.
        self._files: dict[DataPath, File | None] = {}

    def read(self, path: DataPath, times: Sequence[float]) -> list[np.ndarray]:
        """RGB pixels, uint8 [h, x, 3] each, of the frames nearest to `times` (s, ascending).

        Raises:
            DataError: the file, its codec or PyAV is missing.
            ImageDecodeError: there is no such frame, or it is corrupt; its number counts `times`.
        """
        if path not in self._files:
            self._files[path] = self._look(path)
        file = self._files[path]
        pixels = None if file is None else self._by_table(file, times)
        # Whatever is wrong with a file is found and told by the container.
        return self._by_container(path, times) if pixels is None else pixels

    def _look(self, path: DataPath) -> File | None:
        """Opens a file for the first time."""
        video = self._take(path)
        try:
            file = _tables.file(path, self._owner, video.stream, video.step, video.reach)
        except OSError:
            file = None
        if file is None:
            self._keep(video)
        else:
            _tables.give(file.kind, video.decoder())
        return file

    def _by_table(self, file: File, times: Sequence[float]) -> list[np.ndarray] | None:
        """The frames, or None if the container has to be asked."""
        from av.error import FFmpegError

        try:
            table = _tables.table(file)
            if table is None:
                return None
            nearest = [table.nearest(time, file.tick, file.step) for time in times]
            if max(off for _, off in nearest) > file.reach:
                return None
            numbers = [number for number, _ in nearest]
            opened = shared_file(file.path, file.owner)
            # A new one comes out of the container, which is opened for it.
            decoder = _tables.take(file.kind) or self._take(file.path).decoder()
            images = decoder.decode(table, opened, sorted(set(numbers)))
        except (OSError, FFmpegError):  # the decoder's state is unknown now
            return None
        if images is None:
            return None
        _tables.give(file.kind, decoder)
        return [images[number] for number in numbers]

    def _by_container(self, path: DataPath, times: Sequence[float]) -> list[np.ndarray]:
        video, pixels = self._take(path), []
        try:
            for time in times:
                try:
                    pixels.append(video.frame(time))
                except ImageDecodeError as error:
                    raise ImageDecodeError(error.problem, error.file, frame=len(pixels)) from error
        except BaseException:  # the video's state is unknown now
            video.close()
            raise
        self._keep(video)
        return pixels

    @staticmethod
    def _keep(video: "_Video") -> None:
        with _lock:
            _idle[id(video)] = video
            while len(_idle) > _IDLE:
                _idle.popitem(last=False)[1].close()

    def _take(self, path: DataPath) -> "_Video":
        with _lock:
            key = next((k for k, v in _idle.items() if v.owner is self and v.path == path), None)
            if key is not None:
                return _idle.pop(key)
        video = _Video(path, self._fps, self._starts.get(path))
        video.owner, self._starts[path] = self, video.start
        return video


class _Video:
    """One opened file and the frame it is at."""

    def __init__(self, path: DataPath, fps: float, start: float | None):
        try:
            import av  # noqa: F401 - asked for first, for the hint
            from av.error import FFmpegError
            from av.video.reformatter import VideoReformatter
        except ImportError as error:
            hint = f"videos need PyAV: {install_hint('lerobot')}"
            raise DataError(hint, path) from error
        self.path, self._errors, self._fps = path, FFmpegError, fps
        self.owner: Any = None
        self._open()
        rate = self.stream.average_rate or self.stream.guessed_rate
        self.step = 1 / float(rate) if rate else 1 / fps
        # Half a row's time; of a video with more frames one of them, if its rate can be believed.
        self.reach = min(0.5 / fps, max(self.step, 0.25 / fps))
        # One context for all frames, on this thread: PyAV would make one with its threads a frame.
        self._convert: Any = VideoReformatter()
        self.start = 0.0
        self.start = self._first_time() if start is None else start

    def _open(self) -> None:
        import av

        try:
            self._container: Any = av.open(self._source())
        except (OSError, self._errors, UnicodeError) as error:
            other = explain_file(self.path)
            if other:
                raise CorruptRecordError(other, self.path) from error
            raise DataError(f"the video cannot be opened: {error}", self.path) from error
        streams = self._container.streams.video
        self.stream: Any = streams[0] if streams else None
        if self.stream is None or self.stream.codec_context is None:
            self._container.close()
            raise DataError(
                f"PyAV {av.__version__} has no decoder for this video. Install a build that has "
                "it, or encode the video anew: ffmpeg -i IN -c:v libx264 -g 2 OUT",
                self.path,
            )
        self.stream.codec_context.thread_count = 1  # the loader's threads decode side by side
        self._now: Any = None
        self._coming: Iterator[Any] = self._container.decode(self.stream)

    def _source(self) -> Any:
        """What PyAV opens: the name of a file on a disk, or an opened file of another place."""
        remote: Any = self.path
        return remote.open("rb", block_size=_BLOCK) if is_remote(remote) else str(remote)

    def _first_time(self) -> float:
        """Time of the first frame that is shown."""
        try:
            self._now = next(self._coming, None)
        except (OSError, self._errors) as error:
            problem = f"corrupt video at its beginning: {error}"
            raise ImageDecodeError(problem, self.path) from error
        if self._now is None or self._now.time is None:
            raise ImageDecodeError("the video has no frames", self.path)
        bits = self._now.format.components[0].bits
        if self._now.format.name.startswith("gray") and bits > 8:
            problem = f"the video is grey of {bits} bits, distances and no colors"
            raise ImageDecodeError(problem, self.path)
        return float(self._now.time)

    def frame(self, time: float) -> np.ndarray:
        """The frame nearest to `time`."""
        try:
            nearest = self._forward(time) if self._near(time) else None
            # Each try begins earlier, and the last one at the very beginning.
            for back in () if nearest is not None else (*_BACK, time):
                self._seek(max(time - back, 0.0))
                nearest = self._forward(time)
                if nearest is not None:
                    break
            if nearest is None:
                nearest = self._from_the_beginning(time)
            if nearest is not None:
                return rgb(self._convert, nearest)
        except (OSError, self._errors) as error:
            raise ImageDecodeError(f"corrupt video at {time:.3f} s: {error}", self.path) from error
        problem = f"the video has no frame at {time:.3f} s{self._extent()}"
        raise ImageDecodeError(problem, self.path)

    def _extent(self) -> str:
        """What the container says of the video's rate and length, and what follows from it."""
        length = self.stream.duration
        ends = f" and ends after {float(length * self.stream.time_base):.3f} s" if length else ""
        return (
            f": it has {1 / self.step:.4g} frames a second{ends}; the rows of {self._fps:.4g} a "
            "second and their timestamps must fit it"
        )

    def _from_the_beginning(self, time: float) -> Any:
        """The frame nearest to `time` of a container in which one cannot seek back that far."""
        if self._now is not None and self._time(self._now) <= time:
            return None  # it has been passed, and is not there
        self._container.close()
        self._open()
        return self._forward(time)

    def _time(self, frame: Any) -> float:
        return float(frame.time) - self.start

    def _near(self, time: float) -> bool:
        """Whether the frame comes soon, so that decoding on beats seeking."""
        if self._now is None:
            return False
        return -EXACT * self.step <= time - self._time(self._now) < _AHEAD * self.step

    def _seek(self, time: float) -> None:
        # A quarter of a frame on, so that rounding down to a tick does not end at the frame before.
        target = int((time + self.start + self.step / 4) / self.stream.time_base)
        self._container.seek(target, stream=self.stream, backward=True)
        self._coming, self._now = self._container.decode(self.stream), None

    def _forward(self, time: float) -> Any:
        """The frame nearest to `time`, or None if it is not between here and the end."""
        if self._now is None:
            self._now = next(self._coming, None)
            if self._now is None:
                return None
            # A seek that ended behind the time, and not at the beginning, has to go further back.
            slack = EXACT * self.step
            if self._time(self._now) > max(time, 0.0) + slack:
                return None
        before = None
        while self._time(self._now) < time - EXACT * self.step:
            before, following = self._now, next(self._coming, None)
            if following is None:
                break
            self._now = following
        nearest = self._now
        if before is not None:
            earlier, later = time - self._time(before), self._time(nearest) - time
            if earlier <= abs(later) + TIE * self.step:
                nearest = before
        return nearest if abs(self._time(nearest) - time) <= self.reach else None

    @property
    def tick(self) -> float:
        """Seconds in which the file counts its times."""
        return float(self.stream.time_base)

    def decoder(self) -> Decoder:
        """Its decoder, which outlives the container that is closed now."""
        context = self.stream.codec_context
        self.close()
        return Decoder(context)

    def close(self) -> None:
        self._container.close()
