"""Single frames out of video files, in any order; PyAV (the extra `lerobot`).

A frame is found by its time: seek to the key frame before it, decode up to it. LeRobot's own videos
have a key frame every second frame, so that this is cheap; with the usual 250 frames between two
key frames it is not, and converting the dataset pays.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vla_jax.data.errors import DataError, ImageDecodeError
from vla_jax.shipped import install_hint

_IDLE = 16  # opened videos kept for the next read
_AHEAD = 8  # frames that are decoded and dropped rather than sought
_BACK = (0.0, 1.0, 10.0)  # s before the frame where a seek may have to begin


class VideoFrames:
    """Frames of the videos of one dataset, for any number of threads."""

    def __init__(self, fps: float):
        """Videos of `fps` frames a second; a frame is off by less than half a frame's time."""
        self._fps, self._lock = fps, threading.Lock()
        self._idle: OrderedDict[int, _Video] = OrderedDict()

    def read(self, path: Path, times: Sequence[float]) -> list[np.ndarray]:
        """RGB pixels, uint8 [h, x, 3] each, of the frames shown at `times` (s, ascending).

        Raises:
            DataError: the file, its codec or PyAV is missing.
            ImageDecodeError: there is no such frame, or it is corrupt; its number counts `times`.
        """
        video, found = self._take(path), []
        for time in times:
            try:
                found.append(video.frame(time))
            except ImageDecodeError as error:
                raise ImageDecodeError(error.problem, error.file, frame=len(found)) from error
        with self._lock:  # not after an error: the video's state is unknown then
            self._idle[id(video)] = video
            while len(self._idle) > _IDLE:
                self._idle.popitem(last=False)[1].close()
        return found

    def _take(self, path: Path) -> "_Video":
        with self._lock:
            key = next((k for k, video in self._idle.items() if video.path == path), None)
            if key is not None:
                return self._idle.pop(key)
        return _Video(path, self._fps)


class _Video:
    """One opened file and the frame it is at."""

    def __init__(self, path: Path, fps: float):
        try:
            import av
            from av.error import FFmpegError
        except ImportError as error:
            hint = f"videos need PyAV: {install_hint('lerobot')}"
            raise DataError(hint, path) from error
        self.path, self._half, self._errors = path, 0.5 / fps, FFmpegError
        try:
            self._container: Any = av.open(str(path))
        except (OSError, self._errors) as error:
            raise DataError(f"the video cannot be opened: {error}", path) from error
        streams = self._container.streams.video
        self._stream: Any = streams[0] if streams else None
        if self._stream is None or self._stream.codec_context is None:
            raise DataError(
                f"PyAV {av.__version__} has no decoder for this video. Install a build that has "
                "it, or encode the video anew: ffmpeg -i IN -c:v libx264 -g 2 OUT",
                path,
            )
        self._stream.codec_context.thread_count = 1  # the loader's threads decode side by side
        self._now: Any = None
        self._coming: Iterator[Any] = iter(())

    def frame(self, time: float) -> np.ndarray:
        try:
            found = self._forward(time) if self._near(time) else None
            for back in () if found is not None else (*_BACK, time):
                self._seek(max(time - back, 0.0))
                found = self._forward(time)
                if found is not None:
                    break
        except (OSError, self._errors) as error:
            raise ImageDecodeError(f"corrupt video at {time:.3f} s: {error}", self.path) from error
        if found is None:
            raise ImageDecodeError(f"the video has no frame at {time:.3f} s", self.path)
        return found.to_ndarray(format="rgb24")

    def _near(self, time: float) -> bool:
        """Whether the frame comes soon, so that decoding on beats seeking."""
        if self._now is None:
            return False
        return -self._half < time - self._now.time < 2 * self._half * _AHEAD

    def _seek(self, time: float) -> None:
        target = int((time + self._half / 2) / self._stream.time_base)
        self._container.seek(target, stream=self._stream, backward=True)
        self._coming, self._now = self._container.decode(self._stream), None

    def _forward(self, time: float) -> Any:
        """The frame at `time`, or None if it is not between here and the end."""
        while self._now is None or self._now.time <= time - self._half:
            self._now = next(self._coming, None)
            if self._now is None:
                return None
        return self._now if self._now.time < time + self._half else None

    def close(self) -> None:
        self._container.close()
