import json
import sys

import numpy as np
import pytest

from tests.data.look_alikes import (
    KEY,
    LENGTHS,
    TOLD,
    encoded,
    lerobot_pixels,
    lerobot_rows,
    write_lerobot,
    write_video,
)
from vla_jax.data import errors
from vla_jax.data.lerobot.source import features, open_lerobot
from vla_jax.data.lerobot.video import VideoFrames
from vla_jax.data.open_dataset import open_dataset
from vla_jax.data.spec import DatasetSpec, Trajectory

pytest.importorskip("pyarrow")
av = pytest.importorskip("av")
CAMERA, TEXT = "steps/observation/images/front", "steps/language_instruction"
COLUMNS = {
    "steps/action": "action",
    "steps/observation/state": "observation.state",
    "steps/observation/state_wide": "observation.state.wide",
    "steps/next/done": "next.done",
    "steps/index": "index",
}
SPEC = DatasetSpec(
    images={"primary": "observation/images/front"},
    features={"action": "action", "language": "language_instruction"},
    standardize=lambda e: Trajectory(action=e["action"], language=e["language"]),
    gripper_env=(0.0, 1.0),
)


def is_picture(pixels, number, step):
    """Lossy coding moves a colour by a few levels; steps are 10 apart, episodes 70."""
    expected = lerobot_pixels(number, step + 1)[step].astype(int)
    return np.abs(pixels.astype(int) - expected)[..., :2].mean() < 4


@pytest.mark.parametrize("version", ["v2.0", "v2.1", "v3.0"])
def test_numbers_texts_and_pictures(tmp_path, version):
    folder = write_lerobot(tmp_path / "robot", version)
    source = open_lerobot(folder, "train", [*COLUMNS, TEXT, "steps/note"])
    assert source.starts.tolist() == [0, *np.cumsum(LENGTHS)]
    rows = lerobot_rows()
    for path, key in COLUMNS.items():
        expected = np.concatenate([episode[key] for episode in rows])
        assert source.low(path).dtype == expected.dtype
        np.testing.assert_array_equal(source.low(path), expected)
    for path, expected in ((TEXT, TOLD), ("steps/note", ["note 0", "note 1", "note 2"])):
        codes, table = source.text(path)
        assert [table[c] for c in codes] == np.repeat(expected, LENGTHS).tolist()
    assert source.cameras == [CAMERA]
    assert source.features[CAMERA].shape == (48, 64, 3)
    order = np.random.default_rng(0).permutation(sum(LENGTHS))
    for frame in order.tolist():
        number = int(np.searchsorted(source.starts, frame, side="right")) - 1
        step = frame - int(source.starts[number])
        last = min(frame + 3, int(source.starts[number + 1]) - 1)
        for i, pixels in enumerate(source.read(CAMERA, frame, last)):
            assert is_picture(pixels, number, step + i), (number, step, i)
    assert source.place(int(source.starts[2]) + 4)[1:] == (2, 4)


def test_images_in_parquet_are_handed_out_as_they_are(tmp_path):
    for version in ("v2.1", "v3.0"):
        source = open_lerobot(write_lerobot(tmp_path / version, version, "image"), "train")
        content = source.read(CAMERA, 15, 21)
        expected = [encoded(p) for p in lerobot_pixels(1, LENGTHS[1])[2:9]]
        assert content == expected


@pytest.mark.parametrize(("codec", "gop"), [("libx264", 250), ("mpeg4", 12), ("libsvtav1", 2)])
def test_random_access_gives_the_frames_of_a_pass(tmp_path, codec, gop):
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV cannot write {codec}")
    pictures = lerobot_pixels(1, 25, (64, 64))
    path = write_video(tmp_path / "video.mp4", pictures, codec=codec, gop=gop)
    with av.open(str(path)) as container:
        expected = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    assert len(expected) == len(pictures)
    videos = VideoFrames(10.0)
    for frame in [0, 24, 3, 4, 5, 23, 11, 11, 0, 24]:
        (result,) = videos.read(path, [frame / 10])
        np.testing.assert_array_equal(result, expected[frame])
    for time in (2.6, 100.0):
        with pytest.raises(
            errors.ImageDecodeError, match=r"video.mp4, frame 0: the video has no frame"
        ):
            videos.read(path, [time])


def test_batches_come_from_a_dataset(tmp_path):
    folder = write_lerobot(tmp_path / "robot", "v3.0")
    dataset = open_dataset("robot", SPEC, folder, "train", ["primary"], 7)
    assert dataset.lengths.tolist() == list(LENGTHS)
    assert dataset.instructions == ["pick up the cup", "open the door"]
    out = np.zeros((3, 48, 64, 3), np.uint8)
    assert dataset.images("primary", 1, np.array([0, 0, 1]), out).all()
    assert is_picture(out[1], 1, 0)
    assert is_picture(out[2], 1, 1)
    tail = open_dataset("robot", SPEC, folder, "train", ["primary"], 7, "tail", 0.3)
    np.testing.assert_array_equal(tail.actions, lerobot_rows()[2]["action"])


def test_a_split_of_some_episodes(tmp_path):
    folder = write_lerobot(tmp_path / "robot", "v3.0", "image")
    path = folder / "meta" / "info.json"
    info = json.loads(path.read_text()) | {"splits": {"train": "1:3", "test": "0:1"}}
    path.write_text(json.dumps(info))
    source = open_lerobot(folder, "train", ["steps/index"])
    np.testing.assert_array_equal(source.low("steps/index"), np.arange(LENGTHS[0], sum(LENGTHS)))
    assert source.read(CAMERA, 0, 0) == [encoded(lerobot_pixels(1, 1)[0])]
    with pytest.raises(errors.DataError, match=r"no split 'val'; it has \['test', 'train'\]"):
        open_lerobot(folder, "val")


def test_what_is_wrong_is_named(tmp_path):
    folder = write_lerobot(tmp_path / "robot", "v2.1")
    video = folder / "videos" / "chunk-000" / KEY / "episode_000001.mp4"
    data = video.read_bytes()
    with pytest.raises(errors.FeatureError, match=r"no such feature: \['steps/actoin'\]"):
        open_lerobot(folder, "train", ["steps/actoin"])
    video.write_bytes(data[: len(data) // 2])
    with pytest.raises(
        errors.DataError, match=r"episode_000001.mp4, episode 1, frame 2.*front.*op"
    ):
        open_lerobot(folder, "train").read(CAMERA, 15, 16)
    # A codec nobody has: the name of the codec in the file's sample description.
    assert data.count(b"avc1") >= 1
    video.write_bytes(data.replace(b"avc1", b"zzz9"))
    with pytest.raises(errors.DataError, match=r"no decoder for this video.*ffmpeg -i IN -c:v"):
        open_lerobot(folder, "train").read(CAMERA, 15, 16)
    video.unlink()
    with pytest.raises(errors.DataError, match=r"episode_000001.mp4, episode 1: the file is"):
        open_lerobot(folder, "train")
    path = folder / "meta" / "info.json"
    path.write_text(path.read_text().replace("v2.1", "v1.6"))
    with pytest.raises(errors.DataError, match=r"of version v1.6; read are \['v2.0'"):
        features(folder)


def test_rows_of_other_episodes_are_noticed(tmp_path):
    folder = write_lerobot(tmp_path / "robot", "v2.1", "image")
    first, second = (folder / "data/chunk-000" / f"episode_00000{i}.parquet" for i in (0, 2))
    first.write_bytes(second.read_bytes())
    with pytest.raises(
        errors.CorruptRecordError, match=r"000000\.parquet, episode 0: its rows are not"
    ):
        open_lerobot(folder, "train", ["steps/action"])


@pytest.mark.parametrize("package", ["av", "pyarrow"])
def test_missing_packages_are_asked_for(tmp_path, monkeypatch, package):
    folder = write_lerobot(tmp_path / "robot", "v3.0")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(errors.DataError, match=r"pip install .*lerobot"):
        open_lerobot(folder, "train", ["steps/action"]).read(CAMERA, 0, 0)


def test_unsound_files_can_be_left_out(tmp_path):
    folder = write_lerobot(tmp_path / "robot", "v2.1")
    (folder / "data" / "chunk-000" / "episode_000001.parquet").write_bytes(b"not parquet")
    with pytest.raises(errors.DataError, match=r"000001\.parquet: cannot be read"):
        open_lerobot(folder, "train", ["steps/action"])
    source = open_lerobot(folder, "train", ["steps/action", TEXT], skip=True)
    expected = np.concatenate([lerobot_rows()[i]["action"] for i in (0, 2)])
    np.testing.assert_array_equal(source.low("steps/action"), expected)
    assert is_picture(source.read(CAMERA, 15, 15)[0], 2, 2)
    ((error, count),) = source.skipped
    assert (count, "000001.parquet" in str(error)) == (1, True)
