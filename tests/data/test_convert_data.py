import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.look_alikes import (
    LENGTHS,
    START,
    TASKS,
    TEXTS,
    TOLD,
    calvin_frame,
    encoded,
    lerobot_pixels,
    lerobot_rows,
    write_calvin_npz,
    write_lerobot,
)
from vla_jax.data.calvin.source import features, open_calvin
from vla_jax.data.decode import decode
from vla_jax.data.errors import FeatureError
from vla_jax.data.formats import find_reader
from vla_jax.data.lerobot.source import open_lerobot
from vla_jax.data.loader import open_datasets
from vla_jax.data.rlds.convert import write_rlds
from vla_jax.data.rlds.index import open_index

tfds = pytest.importorskip("tensorflow_datasets")
SCRIPT = Path(__file__).parents[2] / "launch" / "convert_data.py"


def convert(*args):
    command = [sys.executable, str(SCRIPT), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def episodes(folder, split):
    for episode in tfds.builder_from_directory(str(folder)).as_dataset(split=split):
        steps = [tfds.as_numpy(step) for step in episode.pop("steps")]
        yield steps, tfds.as_numpy(episode)


def test_calvin_windows(tmp_path, data_config, structure):
    src, out = write_calvin_npz(tmp_path / "task_B_B"), tmp_path / "calvin_b" / "1.0.0"
    done = convert("calvin", src, out, "--images=png")
    assert done.returncode == 0, done.stderr
    assert "{'train': 3, 'val': 3} episodes, 100 frames" in done.stdout
    assert sorted(p.name for p in out.parent.iterdir()) == ["1.0.0"]
    spans = [(3, 20), (12, 30), (60, 75)]
    for split in ("train", "val"):
        results = list(episodes(out, split))
        assert len(results) == 3
        for (steps, remainder), (a, b), text, task in zip(
            results, spans, TEXTS, TASKS, strict=True
        ):
            assert remainder["episode_metadata"]["start"] == START + a
            assert remainder["episode_metadata"]["end"] == START + b
            assert remainder["episode_metadata"]["task"].decode() == task
            assert len(steps) == b - a
            for i, step in enumerate(steps):
                frame = calvin_frame(START + a + i)
                observed = step["observation"]
                for name in ("rgb_static", "rgb_gripper"):
                    np.testing.assert_array_equal(observed[name], frame[name])
                np.testing.assert_array_equal(
                    observed["scene_obs"], frame["scene_obs"].astype("f4")
                )
                for name in ("rel_actions", "actions"):
                    np.testing.assert_array_equal(step["action"][name], frame[name].astype("f4"))
                assert step["language_instruction"].decode() == text
                assert (step["is_first"], step["is_last"]) == (i == 0, i == b - a - 1)
    # Both formats train alike.
    mixtures = [
        open_datasets(data_config(("calvin", folder, 1.0)), structure(), 7, "train")
        for folder in (src, out)
    ]
    assert mixtures[0].statistics == mixtures[1].statistics
    single, two = (m.datasets[0].actions for m in mixtures)
    np.testing.assert_array_equal(single, two)
    again = convert("calvin", src, out)
    assert again.returncode == 1
    assert again.stderr.strip().endswith("exists and is not empty")


def test_spans_of_segments_train_like_windows(tmp_path, data_config, structure):
    src = write_calvin_npz(tmp_path / "c")
    for mode in ("windows", "segments"):
        results = {s: open_calvin(src, s, list(features(src)), mode=mode) for s in ("train", "val")}
        write_rlds(results, tmp_path / mode / "1.0.0", "calvin", "png")
    windows, segments = (
        open_datasets(
            data_config(("calvin", tmp_path / mode / "1.0.0", 1.0)), structure(), 7, "val"
        )
        for mode in ("windows", "segments")
    )
    (a,), (b,) = windows.datasets, segments.datasets
    for name in ("actions", "starts", "text", "text_starts"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert a.instructions == b.instructions == TEXTS
    assert a.source.num_episodes == b.source.num_episodes == 3
    for path in ("episode_metadata/start", "episode_metadata/end"):
        index = open_index(tmp_path / "windows" / "1.0.0", "val", [path])
        spans = find_reader(tmp_path / "segments" / "1.0.0").open(
            tmp_path / "segments" / "1.0.0", "val", [path], "", False, skip=False
        )
        np.testing.assert_array_equal(index.low(path), spans.low(path))
    out = np.zeros((2, 3, 16, 16, 3), np.uint8)
    for trajectory in range(3):
        for dataset, pixels in ((a, out[0]), (b, out[1])):
            assert dataset.images("primary", trajectory, np.array([5, 6, 7]), pixels).all()
        np.testing.assert_array_equal(out[0], out[1])
    written: Any = a.source
    joined: Any = b.source
    assert joined.place(20) == (joined._source.root / written.shards[0].name, 0, 15)


def test_calvin_segments_and_jpeg(tmp_path):
    src, out = write_calvin_npz(tmp_path / "c", splits=("training",)), tmp_path / "p" / "2.0.0"
    source = open_calvin(src, "train", list(features(src)), mode="segments")
    assert write_rlds({"train": source}, out, "calvin_play") == {"train": 2}
    (steps, remainder), (other, _) = episodes(out, "train")
    assert (len(steps), len(other)) == (40, 20)
    spans = json.loads(remainder["episode_metadata"]["annotations"])
    assert [(s["start"], s["end"], s["text"]) for s in spans] == [
        (3, 20, TEXTS[0]),
        (12, 30, TEXTS[1]),
    ]
    assert tfds.builder_from_directory(str(out)).version == "2.0.0"
    index = open_index(out, "train", ["steps/action/rel_actions"])
    view = bytes(index.read("steps/observation/rgb_static", 0, 0)[0])
    assert view[:2] == b"\xff\xd8"
    frame = calvin_frame(START)["rgb_static"].astype(int)
    assert np.abs(decode(view).astype(int) - frame).mean() < 12  # noise, at quality 95


@pytest.mark.parametrize("mode", ["windows", "segments"])
def test_calvin_depth(tmp_path, mode):
    src = write_calvin_npz(tmp_path / "c", splits=("training",))
    collected = {}
    for name, flags in (("deep", ["--depth"]), ("flat", [])):
        out = tmp_path / name / "1.0.0"
        done = convert("calvin", src, out, f"--episodes={mode}", *flags)
        assert done.returncode == 0, done.stderr
        collected[name] = list(episodes(out, "train"))
        index = open_index(out, "train", ["steps/action/rel_actions"])
        collected[name].append([bytes(v) for v in index.read(index.cameras[1], 0, 16)])
    assert collected["deep"][-1] == collected["flat"][-1]
    starts = [0, 60] if mode == "segments" else [3, 12, 60]
    for (steps, _), begin in zip(collected["deep"], starts, strict=False):
        for i, step in enumerate(steps):
            observed = step["observation"]["depth_static"]
            assert observed.dtype == np.float32
            np.testing.assert_array_equal(observed, calvin_frame(START + begin + i)["depth_static"])
    assert "depth_static" not in collected["flat"][0][0][0]["observation"]


def test_depth_must_be_there(tmp_path):
    def blind(frame):
        return {k: v for k, v in calvin_frame(frame).items() if not k.startswith("depth")}

    src = write_calvin_npz(tmp_path / "c", splits=("training",), frame=blind)
    with pytest.raises(FeatureError, match="the frames have no depth images"):
        open_calvin(src, "train", depth=True)
    frame = calvin_frame(START + 15)
    np.savez(src / "training" / f"episode_{START:07d}.npz", **frame)
    source = open_calvin(src, "train", depth=True)
    with pytest.raises(FeatureError, match=r"episode 0, frame 0: .*no arrays \['depth_static'\]"):
        source.read("steps/observation/depth_static", 0, 0)


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_lerobot_images_stay_untouched(tmp_path, version):
    pytest.importorskip("pyarrow")
    src, out = write_lerobot(tmp_path / "r", version, "image"), tmp_path / "robot" / "1.0.0"
    done = convert("lerobot", src, out)
    assert done.returncode == 0, done.stderr
    index = open_index(out, "train", ["steps/action", "steps/language_instruction"])
    camera = "steps/observation/images/front"
    assert index.features[camera].encoding == "png"
    for number, length in enumerate(LENGTHS):
        first = int(index.starts[number])
        views = index.read(camera, first, first + length - 1)
        assert [bytes(v) for v in views] == [encoded(p) for p in lerobot_pixels(number, length)]
    for (steps, _), rows, message in zip(episodes(out, "train"), lerobot_rows(), TOLD, strict=True):
        for i, step in enumerate(steps):
            np.testing.assert_array_equal(step["action"], rows["action"][i])
            observed = step["observation"]
            np.testing.assert_array_equal(observed["state"], rows["observation.state"][i])
            assert observed["state_wide"] == rows["observation.state.wide"][i]  # float64, exactly
            assert step["next"]["done"] == rows["next.done"][i]
            assert step["language_instruction"].decode() == message
            assert step["timestamp"] == rows["timestamp"][i]


def test_lerobot_videos_become_images(tmp_path):
    pytest.importorskip("av")
    src, out = write_lerobot(tmp_path / "r", "v3.0"), tmp_path / "robot" / "1.0.0"
    source = open_lerobot(src, "train", ["steps/action", "steps/language_instruction"])
    subset = {p: f for p, f in source.features.items() if p in ("steps/action", *source.cameras)}
    source.features = subset  # the others were not opened
    write_rlds({"train": source}, out, "robot", "png")
    index = open_index(out, "train", ["steps/action"])
    np.testing.assert_array_equal(index.low("steps/action"), source.low("steps/action"))
    for frame in (0, 14, 42):
        written = decode(index.read(source.cameras[0], frame, frame)[0])
        np.testing.assert_array_equal(written, source.read(source.cameras[0], frame, frame)[0])


def test_nothing_is_left_of_a_failed_conversion(tmp_path):
    src, out = write_calvin_npz(tmp_path / "c"), tmp_path / "out" / "1.0.0"
    sources = {"train": open_calvin(src, "train", list(features(src)))}
    (src / "training" / f"episode_{START + 25:07d}.npz").unlink()
    with pytest.raises(ValueError, match="the frame's file is missing"):
        write_rlds(sources, out, "calvin")
    assert not list(out.parent.iterdir())


def test_wrong_folders_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    done = convert("calvin", tmp_path / "empty", tmp_path / "o" / "1.0.0")
    assert done.returncode == 1
    assert "no training/ or validation/" in done.stderr
    assert "Traceback" not in done.stderr


def test_names_that_clash_are_refused(tmp_path):
    source = open_calvin(write_calvin_npz(tmp_path / "c"), "train")
    source.features = {**source.features, "steps/action": source.features["steps/action/actions"]}
    with pytest.raises(FeatureError, match=r"feature and a group of features: \['steps/action'\]"):
        write_rlds({"train": source}, tmp_path / "o" / "1.0.0", "c")
