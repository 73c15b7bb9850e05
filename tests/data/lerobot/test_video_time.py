"""Which frame of a video is shown at a row's time, whatever the container."""

from fractions import Fraction

import numpy as np
import pytest

from vla_jax.data import errors
from vla_jax.data.lerobot import video
from vla_jax.data.lerobot.video import VideoFrames

av = pytest.importorskip("av")
SIZE = (48, 64, 3)


def write(path, times, options=None, codec="libx264", bframes=2, gop=12):
    """A video whose frame i is of the grey level 6 * i, shown at `times[i]` seconds."""
    with av.open(str(path), "w", options=options or {}) as out:
        stream = out.add_stream(codec, rate=30)
        stream.width, stream.height, stream.pix_fmt = SIZE[1], SIZE[0], "yuv420p"
        stream.codec_context.gop_size = gop
        if codec == "libx264":
            stream.options = {"bf": str(bframes), "qp": "4"}
        stream.codec_context.time_base = Fraction(1, 1000)
        for i, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full(SIZE, 6 * i, np.uint8), format="rgb24")
            frame.pts, frame.time_base = round(1000 * time), Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def cut(path, source, begin):
    """Copies the packets from a key frame on, with the times they have."""
    with av.open(str(source)) as inside, av.open(str(path), "w") as out:
        stream = out.add_stream_from_template(inside.streams.video[0])
        started = False
        for packet in inside.demux(video=0):
            started = started or (packet.is_keyframe and packet.pts is not None
                                  and float(packet.pts * packet.time_base) >= begin)  # fmt: skip
            if started and packet.dts is not None:
                packet.stream = stream
                out.mux(packet)
    return path


def shown(path, fps, times):
    return [
        round(float(p.mean()) / 6) for p in VideoFrames(fps).read(path, [float(t) for t in times])
    ]


TEN = np.arange(24) / 10
CONTAINERS = {
    "plain.mp4": ({}, 0.0),
    "fragmented.mp4": ({"movflags": "frag_keyframe+empty_moov"}, 0.0),
    "default_base.mp4": ({"movflags": "frag_every_frame+empty_moov+default_base_moof"}, 0.0),
    "no_edit_list.mp4": ({"use_editlist": "0"}, 0.0),
    "late.mp4": ({}, 0.5),
    "late_without_edit_list.mp4": ({"use_editlist": "0"}, 7.3),
    "plain.mkv": ({}, 0.0),
    "late.mkv": ({}, 3.2),
    "plain.mov": ({}, 0.0),
    "stream.ts": ({}, 0.0),
    "late.ts": ({}, 11.7),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_time_counts_from_the_first_frame(tmp_path, name):
    options, begin = CONTAINERS[name]
    path = write(tmp_path / name, TEN + begin, options)
    assert shown(path, 10.0, TEN) == list(range(24))
    for i in (13, 2, 3, 23, 0, 12, 11):  # by seeking, in any order
        assert shown(path, 10.0, TEN[i : i + 1]) == [i]


def test_a_cut_begins_at_its_own_first_frame(tmp_path):
    full = write(tmp_path / "whole.mp4", np.arange(40) / 10, bframes=0, gop=5)
    part = cut(tmp_path / "part.mp4", full, 1.4)
    assert shown(part, 10.0, TEN[:20]) == list(range(15, 35))


@pytest.mark.parametrize(("rate", "rows"), [(15, 5), (30, 10), (60, 20), (25, 10), (50, 15)])
def test_the_nearest_frame_of_a_video_of_a_higher_rate(tmp_path, rate, rows):
    path = write(tmp_path / "fast.mp4", np.arange(40) / rate)
    times = (np.arange(40 * rows // rate) / rows).astype(np.float32).astype(float)
    nearest = [int(np.abs(np.arange(40) / rate - t).argmin()) for t in times - 1e-6]
    assert shown(path, float(rows), times) == nearest
    for i in (3, 0, len(times) - 1):
        assert shown(path, float(rows), times[i : i + 1]) == nearest[i : i + 1]


def test_frames_that_come_unevenly(tmp_path):
    times = np.cumsum([0, 0.1, 0.13, 0.08, 0.09, 0.12, 0.1, 0.1, 0.06])
    path = write(tmp_path / "uneven.mp4", times)
    assert shown(path, 10.0, np.arange(8) / 10) == [
        int(np.abs(times - t).argmin()) for t in np.arange(8) / 10
    ]


def test_a_time_without_a_frame(tmp_path):
    path = write(tmp_path / "short.mp4", TEN[:5])
    with pytest.raises(errors.ImageDecodeError, match=r"frame 1: the video has no frame at 0.500"):
        VideoFrames(10.0).read(path, [0.4, 0.5])
    gap = write(tmp_path / "gap.mp4", [0.0, 0.1, 0.5, 0.6])
    with pytest.raises(errors.ImageDecodeError, match=r"no frame at 0\.300"):
        VideoFrames(10.0).read(gap, [0.3])


def test_few_videos_stay_open_over_all_datasets(tmp_path, monkeypatch):
    monkeypatch.setattr(video, "_IDLE", 3)
    path = write(tmp_path / "v.mkv", TEN)
    datasets = [VideoFrames(10.0) for _ in range(8)]
    for _ in range(2):
        for frames in datasets:
            assert len(frames.read(path, [0.3])) == 1
    assert len(video._idle) <= 3


def test_a_video_of_distances_is_refused(tmp_path):
    path = tmp_path / "depth.mkv"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = SIZE[1], SIZE[0], "gray16le"
        depth = np.full(SIZE[:2], 1500, np.uint16)
        out.mux(stream.encode(av.VideoFrame.from_ndarray(depth, format="gray16le")))
        out.mux(stream.encode())
    with pytest.raises(errors.ImageDecodeError, match="grey of 16 bits, distances"):
        VideoFrames(10.0).read(path, [0.0])
