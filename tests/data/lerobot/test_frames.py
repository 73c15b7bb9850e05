"""Frames by the tables of an mp4 are those that come through its container, to the bit."""

import numpy as np
import pytest

from tests.data.lerobot.test_video_time import TEN, cut, write
from vla_jax.data import errors
from vla_jax.data.lerobot import frames, mp4, video
from vla_jax.data.lerobot.video import VideoFrames
from vla_jax.data.open_files import OpenFile

av = pytest.importorskip("av")
SIZE = (64, 96, 3)
ORDINARY = {
    "reordered": {"bf": "3", "g": "30", "crf": "30"},
    "open_gops": {"bf": "3", "g": "8", "x264-params": "open-gop=1:scenecut=0", "crf": "30"},
    "key_every_second": {"bf": "3", "g": "2", "crf": "30"},
    "no_reordering": {"bf": "0", "g": "12"},
    "pyramid": {"bf": "7", "g": "40", "x264-params": "b-pyramid=strict:b-adapt=0"},
}


def pictures(count, size=SIZE):
    """A patch that moves over a changing ground, so that no two frames are alike."""
    rng = np.random.default_rng(0)
    result = np.empty((count, *size), np.uint8)
    for i in range(count):
        result[i] = np.linspace(i, 200 - i, size[1])[None, :, None] + rng.integers(0, 9, size)
        result[i, 5:25, 2 * i % 70 : 2 * i % 70 + 20] = (200, 3 * i % 250, 30)
    return result


def encode(path, images, codec="libx264", options=None, audio=False):
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=10, options=options or {})
        stream.width, stream.height, stream.pix_fmt = images.shape[2], images.shape[1], "yuv420p"
        sound = out.add_stream("aac", rate=8000, layout="mono") if audio else None
        for i, pixels in enumerate(images):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            if sound is not None:
                noise = np.random.default_rng(i).normal(size=(1, 800)).astype(np.float32)
                frame = av.AudioFrame.from_ndarray(noise, format="fltp", layout="mono")
                frame.sample_rate, frame.pts = 8000, 800 * i
                out.mux(sound.encode(frame))
        out.mux(stream.encode())
        if sound is not None:
            out.mux(sound.encode())
    return path


def same_frames(path, count, is_ordinary=True):
    """Spans and single frames in any order, both ways."""
    reader, container = VideoFrames(10.0), VideoFrames(10.0)
    container._files[path] = None
    rng = np.random.default_rng(1)
    places = [list(range(count)), [0], [count - 1], [3, 3, 4], list(range(0, count, 5))]
    for _ in range(25):
        first = int(rng.integers(0, count))
        places.append(list(range(first, min(first + int(rng.integers(1, 9)), count))))
    for place in places:
        times = [frame / 10 for frame in place]
        ours, reference = reader.read(path, times), container.read(path, times)
        assert len(ours) == len(reference) == len(place)
        for a, b in zip(ours, reference, strict=True):
            np.testing.assert_array_equal(a, b)
    assert (reader._files[path] is not None) == is_ordinary


@pytest.mark.parametrize("name", ORDINARY)
def test_the_frames_of_the_container(tmp_path, name, monkeypatch):
    path = encode(tmp_path / "v.mp4", pictures(64), options=ORDINARY[name])
    opened = []
    plain = video._Video._open
    monkeypatch.setattr(video._Video, "_open", lambda v: (opened.append(v.owner), plain(v)))
    same_frames(path, 64)
    assert len(opened) <= 4  # to look at the file and, if a decoder is missing, once more


@pytest.mark.parametrize(
    ("codec", "options"),
    [("libsvtav1", {"g": "2", "crf": "30", "preset": "12"}),
     ("libsvtav1", {"g": "20", "crf": "30", "preset": "12"}),
     ("libx265", {"x265-params": "log-level=none:keyint=12"}),
     ("libvpx-vp9", {"g": "12", "deadline": "realtime", "cpu-used": "8"}),
     ("mpeg4", {"g": "12", "bf": "2"})],
)  # fmt: skip
def test_other_codecs(tmp_path, codec, options):
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV cannot write {codec}")
    path = encode(tmp_path / "v.mp4", pictures(40), codec, options)
    same_frames(path, 40, is_ordinary=codec != "mpeg4")


def test_sound_between_the_pictures(tmp_path, monkeypatch):
    path = encode(tmp_path / "v.mp4", pictures(40), options={"g": "12", "bf": "2"}, audio=True)
    same_frames(path, 40)
    monkeypatch.setattr(frames, "_FAR", 0)
    same_frames(path, 40)


def test_containers_without_such_tables(tmp_path):
    images = pictures(30)
    same_frames(encode(tmp_path / "v.mkv", images), 30, is_ordinary=False)
    fragments = write(tmp_path / "f.mp4", TEN, {"movflags": "frag_keyframe+empty_moov"})
    same_frames(fragments, 24, is_ordinary=False)


def test_what_a_cut_hides_is_not_shown(tmp_path):
    full = write(tmp_path / "whole.mp4", np.arange(40) / 10, bframes=2, gop=5)
    same_frames(cut(tmp_path / "part.mp4", full, 1.4), 20, is_ordinary=True)


def test_tables_and_files_are_dropped_and_read_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(frames, "_TABLE_BYTES", 3000)
    paths = [encode(tmp_path / f"{i}.mp4", pictures(12) + np.uint8(i)) for i in range(6)]
    reader = VideoFrames(10.0)
    first = [reader.read(path, [0.3, 0.4]) for path in paths]
    assert len(video._tables._tables) < len(paths)
    monkeypatch.setattr(video._Video, "_open", None)  # no container is opened again
    for path, expected in list(zip(paths, first, strict=True)) * 2:
        for a, b in zip(reader.read(path, [0.3, 0.4]), expected, strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_file_that_has_become_shorter_is_told_by_the_container(tmp_path):
    path = encode(tmp_path / "v.mp4", pictures(60), options={"g": "2"})
    reader = VideoFrames(10.0)
    reader.read(path, [0.0])
    data = path.read_bytes()
    with path.open("r+b") as file:
        file.truncate(len(data) * 2 // 3)
    with pytest.raises(errors.DataError, match=r"v\.mp4: the video cannot be opened"):
        reader.read(path, [5.5])


def test_damaged_tables_are_no_tables(tmp_path, monkeypatch):
    data = bytearray(encode(tmp_path / "v.mp4", pictures(20)).read_bytes())
    at = data.index(b"stbl")
    rng, sound = np.random.default_rng(0), 0
    repeat = np.repeat

    def small(values, counts):
        assert np.sum(counts) < 1000, "a damaged count would be written out"
        return repeat(values, counts)

    monkeypatch.setattr(mp4.np, "repeat", small)
    for _ in range(300):
        damaged = bytearray(data)
        place = at + int(rng.integers(0, len(data) - at))
        damaged[place] ^= 1 << int(rng.integers(0, 8))
        path = tmp_path / "damaged.mp4"
        path.write_bytes(damaged)
        samples = mp4.read_samples(OpenFile(path))
        if samples is not None:
            sound += 1
            frames.Table(samples)
    assert 0 < sound < 300
