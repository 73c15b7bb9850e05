import json

import numpy as np
import pytest

from tests.data.look_alikes import START, TASKS, TEXTS, calvin_frame, write_calvin_npz
from vla_jax.data import errors
from vla_jax.data.calvin import source as calvin_module
from vla_jax.data.calvin.annotations import LONGEST, Annotation, cut
from vla_jax.data.calvin.source import open_calvin
from vla_jax.data.loader import Loader, open_datasets

REL, ROBOT = "steps/action/rel_actions", "steps/observation/robot_obs"
STATIC, TEXT = "steps/observation/rgb_static", "steps/language_instruction"


@pytest.fixture
def folder(tmp_path):
    return write_calvin_npz(tmp_path / "task_B_B")


def test_windows_are_the_annotated_spans(folder):
    source = open_calvin(folder, "train", [REL, ROBOT, TEXT])
    assert source.starts.tolist() == [0, 17, 35, 50]
    ids = [*range(3, 20), *range(12, 30), *range(60, 75)]
    frames = [calvin_frame(START + i) for i in ids]
    expected = np.stack([f["rel_actions"] for f in frames]).astype(np.float32)
    np.testing.assert_array_equal(source.low(REL), expected)
    expected = np.stack([f["robot_obs"] for f in frames]).astype(np.float32)
    np.testing.assert_array_equal(source.low(ROBOT), expected)
    codes, table = source.text(TEXT)
    assert [table[c] for c in codes] == [TEXTS[0]] * 17 + [TEXTS[1]] * 18 + [TEXTS[2]] * 15
    for first, last in ((0, 16), (20, 24), (49, 49)):
        for frame, pixels in zip(
            range(first, last + 1), source.read(STATIC, first, last), strict=True
        ):
            np.testing.assert_array_equal(pixels, frames[frame]["rgb_static"])
    path, episode, step = source.place(36)
    assert (path.name, episode, step) == (f"episode_{START + 61:07d}.npz", 2, 1)


def test_what_is_known_of_an_episode(folder):
    source = open_calvin(folder, "val")
    assert source.low("episode_metadata/start").tolist() == [START + i for i in (3, 12, 60)]
    assert source.low("episode_metadata/end").tolist() == [START + i for i in (20, 30, 75)]
    for name, expected in (
        ("task", TASKS),
        ("scene", ["calvin_scene_B", "calvin_scene_B", "calvin_scene_C"]),
    ):
        codes, table = source.text(f"episode_metadata/{name}")
        assert [table[c] for c in codes] == expected


def test_segments_hold_every_frame_once(folder):
    source = open_calvin(folder, "train", [REL], mode="segments")
    assert source.starts.tolist() == [0, 40, 60]
    expected = [calvin_frame(START + i)["rel_actions"] for i in (*range(40), *range(60, 80))]
    np.testing.assert_array_equal(source.low(REL), np.stack(expected).astype(np.float32))
    codes, table = source.text(TEXT)
    messages = [table[c] for c in codes]
    assert messages[:31] == [""] * 3 + [TEXTS[0]] * 17 + [TEXTS[1]] * 10 + [""]
    codes, table = source.text("episode_metadata/annotations")
    assert json.loads(table[codes[0]]) == [
        {"start": 3, "end": 20, "task": TASKS[0], "text": TEXTS[0]},
        {"start": 12, "end": 30, "task": TASKS[1], "text": TEXTS[1]},
    ]
    assert json.loads(table[codes[1]]) == [
        {"start": 0, "end": 15, "task": TASKS[2], "text": TEXTS[2]}
    ]


def test_no_annotation_is_cut_in_two(tmp_path):
    recordings = np.array([[0, 1999], [5000, 5009]])
    inside = [Annotation(s, s + 64, "", "") for s in (100, 480, 500, 1100, 1936)]
    pieces = cut(recordings, inside)
    assert [p[0] for p in pieces] == [0, 480, 992, 1504, 5000]
    assert [p[1] for p in pieces] == [480, 992, 1504, 2000, 5010]
    assert all(
        a.start >= start and a.end <= stop for start, stop, separate in pieces for a in separate
    )
    assert sum(len(separate) for _, _, separate in pieces) == len(inside)
    endless = [Annotation(s, s + 64, "", "") for s in range(0, 1900, 10)]
    lengths = [stop - start for start, stop, _ in cut(recordings[:1], endless)]
    assert lengths == [LONGEST, LONGEST, LONGEST, 2000 - 3 * LONGEST]


def test_annotation_across_recordings_is_left_out_aloud(tmp_path, caplog):
    root = write_calvin_npz(tmp_path / "c", spans=((3, 20), (30, 65)), splits=("training",))
    source = open_calvin(root, "train")
    assert source.num_episodes == 1
    assert f"left out 1 of 2 annotations, which no recording holds: [({START + 30}" in caplog.text


def test_batches_equal_those_of_the_frames(folder, data_config, structure):
    config = data_config(("calvin", folder, 1.0), normalization="none")
    mixture = open_datasets(config, structure(cameras=("primary", "wrist")), 7, "train")
    assert mixture.num_windows == 50
    assert open_datasets(config, structure(), 7, "val").num_windows == 50  # the folder's own

    def encode(text):
        ids = np.full(40, 1, np.int32)
        ids[: len(text)] = [ord(c) for c in text]
        return ids, np.arange(40) < len(text)

    firsts, observed = {TEXTS[0]: 3, TEXTS[1]: 12, TEXTS[2]: 60}, 0
    with Loader(mixture, encode, 5, 0, shuffle=False) as batches:
        for batch in batches:
            images, chunk = batch.observation.images, batch.actions.chunk
            for row in range(5):
                ids = batch.observation.text[row][batch.observation.text_mask[row]]
                begin = START + firsts["".join(map(chr, ids))]
                pixel = images["primary"][row, -1, 0, 0].astype(int)
                frame = START // 65536 * 65536 + 256 * pixel[0] + pixel[1]
                assert frame >= begin
                expected = calvin_frame(frame)
                np.testing.assert_array_equal(images["wrist"][row, -1], expected["rgb_gripper"])
                action = expected["rel_actions"].astype(np.float32)
                np.testing.assert_allclose(chunk[row, -1, 0, :6], action[:6], atol=1e-6)
                assert chunk[row, -1, 0, 6] == (action[6] + 1) / 2
                observed += 1
    assert observed == 50


def test_numbers_are_copied_once_and_in_parallel_the_same(folder, tmp_path, monkeypatch):
    serial = open_calvin(folder, "train", [REL])
    path = next((folder / "training" / "vla_index").glob("*/low_0.npy"))
    before = path.stat().st_mtime_ns
    assert open_calvin(folder, "train", [REL]).digest == serial.digest
    assert path.stat().st_mtime_ns == before
    monkeypatch.setattr(calvin_module, "_PARALLEL_FRAMES", 0)
    monkeypatch.setattr(calvin_module, "_JOB", 16)
    parallel = open_calvin(folder, "train", [REL], str(tmp_path / "other"))
    np.testing.assert_array_equal(parallel.low(REL), serial.low(REL))


@pytest.mark.parametrize(
    ("breaking", "error", "message"),
    [
        (lambda p: p.unlink(), errors.DataError, "the frame's file is missing"),
        (lambda p: p.write_bytes(p.read_bytes()[:500]), errors.TruncatedShardError, "its end is"),
        (lambda p: p.write_bytes(b""), errors.TruncatedShardError, "its end is missing"),
        (lambda p: np.save(p.open("wb"), np.zeros(3)), errors.CorruptRecordError, "is no .npz"),
        (
            lambda p: np.savez(p, actions=np.zeros(7)),
            errors.FeatureError,
            r"no arrays \['rel_actions'\]",
        ),
    ],
)
def test_unsound_frames_are_named(folder, breaking, error, message):
    breaking(folder / "training" / "episode_0358500.npz")
    with pytest.raises(error, match=rf"0358500.npz, episode 0, frame 15: .*{message}"):
        open_calvin(folder, "train", [REL])
    assert not list((folder / "training" / "vla_index").glob("*/index.json"))


def test_unsound_images_name_episode_and_frame(folder):
    source = open_calvin(folder, "train", [REL])
    frame = calvin_frame(START + 15)
    path = folder / "training" / f"episode_{START + 15:07d}.npz"
    np.savez(path, **{**frame, "rgb_static": frame["rgb_static"].astype(np.float32)})
    with pytest.raises(errors.FeatureError, match=r"episode 1, frame 3: 'rgb_static' is float32"):
        source.read(STATIC, 18, 21)
    path.unlink()
    with pytest.raises(errors.DataError, match=r"episode 1, frame 3: the frame's file is missing"):
        source.read(STATIC, 18, 21)


class Hostile:
    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return open, (str(self.victim), "w")


@pytest.mark.parametrize(
    "name", ["lang_annotations/auto_lang_ann.npy", "scene_info.npy"], ids=["texts", "scenes"]
)
def test_files_that_carry_code_do_not_run_it(folder, tmp_path, name):
    victim = tmp_path / "victim"
    target = next(folder.glob(f"training/{name}"))
    np.save(target, {"language": Hostile(victim)}, allow_pickle=True)  # type: ignore[arg-type]
    with pytest.raises(errors.DataError, match="which is no data"):
        open_calvin(folder, "train").text("episode_metadata/scene")
    assert not victim.exists()


def test_without_annotations_there_are_segments_only(folder):
    for path in folder.glob("*/lang_annotations/auto_lang_ann.npy"):
        path.unlink()
    with pytest.raises(errors.DataError, match=r"auto_lang_ann\.npy: does not exist"):
        open_calvin(folder, "train")
    assert open_calvin(folder, "train", mode="segments").num_episodes == 2


def test_wrong_folder_is_pointed_to_the_right_one(folder, data_config, structure):
    for wrong in (folder.parent, folder / "training"):
        config = data_config(("calvin", wrong, 1.0))
        with pytest.raises(errors.DataError, match=rf"none of the known.*did you mean.*{folder}"):
            open_datasets(config, structure(), 7, "train")


def test_unsound_episodes_can_be_left_out(folder):
    for step in (15, 16, 28):  # of the first two episodes, and of the second alone
        (folder / "training" / f"episode_{START + step:07d}.npz").write_bytes(b"not a zip")
    for _ in range(2):  # also when the numbers are copied already
        source = open_calvin(folder, "train", [REL, TEXT], skip=True)
        assert source.starts.tolist() == [0, 15]
        expected = [calvin_frame(START + i)["rel_actions"] for i in range(60, 75)]
        np.testing.assert_array_equal(source.low(REL), np.stack(expected).astype(np.float32))
        codes, table = source.text(TEXT)
        assert [table[c] for c in codes] == [TEXTS[2]] * 15
        assert [count for _, count in source.skipped] == [1, 1]
        assert [str(e).partition(".npz")[2] for e, _ in source.skipped] == [
            f", episode {episode}, frame {frame}: the frame cannot be read: it is no .npz"
            for episode, frame in ((0, 12), (1, 3))
        ]
    # Mended, they are used again, and where nothing may be left out they are read again.
    for step in (15, 16, 28):
        path = folder / "training" / f"episode_{START + step:07d}.npz"
        np.savez_compressed(path, **calvin_frame(START + step))
    assert open_calvin(folder, "train", [REL, TEXT]).starts.tolist() == [0, 17, 35, 50]


def test_what_frames_hold_is_told_by_one_that_is_sound(folder, data_config, structure):
    first, last = (folder / "training" / f"episode_{START + i:07d}.npz" for i in (0, 39))
    first.write_bytes(first.read_bytes()[:500])
    last.unlink()
    # Neither is of an annotated span; of recordings both are.
    assert open_calvin(folder, "train", [REL]).num_episodes == 3
    with pytest.raises(errors.TruncatedShardError, match="episode 0, frame 0: the frame cannot"):
        open_calvin(folder, "train", [REL], mode="segments")
    source = open_calvin(folder, "train", [REL], skip=True, mode="segments")
    assert source.starts.tolist() == [0, 20]
    for frame in range(START, START + 40):
        (folder / "training" / f"episode_{frame:07d}.npz").unlink(missing_ok=True)
    with pytest.raises(errors.DataError, match="the frame's file is missing"):
        open_datasets(data_config(("calvin", folder, 1.0)), structure(), 7, "train")


def test_a_camera_that_no_frame_has(tmp_path, data_config, structure):
    def keep(frame):
        left_out = ("rgb_gripper", "scene_obs")
        return {k: v for k, v in calvin_frame(frame).items() if k not in left_out}

    root = write_calvin_npz(tmp_path / "c", frame=keep)
    config = data_config(("calvin", root, 1.0))
    assert open_datasets(config, structure(), 7, "train").num_windows == 50
    cameras = structure(cameras=("primary", "wrist"))
    with pytest.raises(errors.MissingCameraError, match="no camera 'wrist'; its cameras are"):
        open_datasets(config, cameras, 7, "train")


def test_a_camera_that_one_frame_lacks(folder):
    source = open_calvin(folder, "train", [REL])
    frame = {k: v for k, v in calvin_frame(START + 15).items() if k != "rgb_static"}
    np.savez(folder / "training" / f"episode_{START + 15:07d}.npz", **frame)
    with pytest.raises(errors.MissingCameraError, match=r"episode 1, frame 3: .*'rgb_static'"):
        source.read(STATIC, 18, 21)


def test_annotations_without_frames(tmp_path):
    root = write_calvin_npz(tmp_path / "c", spans=((3, 20), (7, 7)), splits=("training",))
    with pytest.raises(errors.EmptyTrajectoryError, match=r"auto_lang_ann\.npy, episode 1: the an"):
        open_calvin(root, "train")
    source = open_calvin(root, "train", skip=True)
    assert source.num_episodes == 1
    ((error, count),) = source.skipped
    assert (type(error), count) == (errors.EmptyTrajectoryError, 1)


@pytest.mark.parametrize("text", [None, ["pull the handle"], 3])
def test_annotations_that_are_no_texts(folder, text):
    path = folder / "training" / "lang_annotations" / "auto_lang_ann.npy"
    tree = np.load(path, allow_pickle=True).item()
    tree["language"]["ann"][0] = text
    np.save(path, tree, allow_pickle=True)
    with pytest.raises(errors.DataError, match=r"auto_lang_ann\.npy: .*is no text"):
        open_calvin(folder, "train")


def test_annotations_in_bytes(folder):
    path = folder / "training" / "lang_annotations" / "auto_lang_ann.npy"
    tree = np.load(path, allow_pickle=True).item()
    tree["language"]["ann"] = [text.encode() for text in tree["language"]["ann"]]
    np.save(path, tree, allow_pickle=True)
    assert "b'" not in "".join(open_calvin(folder, "train").text("steps/language_instruction")[1])


@pytest.mark.parametrize("wrong", [np.nan, np.inf, 358482.5, "a zip"])
def test_ends_of_recordings_that_are_no_frames(folder, wrong):
    path = folder / "training" / "ep_start_end_ids.npy"
    if isinstance(wrong, str):
        path.write_bytes(b"PK\x03\x04")
    else:
        ends = np.load(path).astype(float)
        ends[0, 0] = wrong
        np.save(path, ends)
    with pytest.raises(errors.DataError, match=r"ep_start_end_ids\.npy: (holds numbers|cannot be)"):
        open_calvin(folder, "train")
