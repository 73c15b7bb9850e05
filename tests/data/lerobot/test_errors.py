"""LeRobot datasets, broken in every way: a named error with its place, or a counted skip."""

import json

import numpy as np
import pytest

from tests.data.lerobot.test_source import CAMERA, SPEC, TEXT
from tests.data.look_alikes import KEY, LENGTHS, TOLD, write_lerobot, write_video
from vla_jax.data import errors
from vla_jax.data.errors import Skips
from vla_jax.data.lerobot.source import open_lerobot
from vla_jax.data.open_dataset import open_dataset

arrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
V2, V3 = "v2.1", "v3.0"


def table_of(folder, version, number=1):
    name = f"file-{number:03d}" if version == V3 else f"episode_{number:06d}"
    return folder / "data" / "chunk-000" / f"{name}.parquet"


def change(path, edit):
    parquet.write_table(edit(parquet.read_table(path)), path)


def column(key, values):
    def edit(table):
        created = values(table[key].to_pylist())
        return table.set_column(
            table.schema.names.index(key), key, arrow.array(created, table[key].type)
        )

    return edit


def lines(folder, name, edit):
    path = folder / "meta" / name
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in edit(rows)))


def info(folder, edit):
    path = folder / "meta" / "info.json"
    raw = json.loads(path.read_text())
    edit(raw)
    path.write_text(json.dumps(raw))


def truncated(folder, version):
    path = table_of(folder, version)
    path.write_bytes(path.read_bytes()[:-100])


def missing(folder, version):
    table_of(folder, version).unlink()


def fewer_rows(folder, version):
    change(table_of(folder, version), lambda table: table.slice(0, len(table) - 2))


def more_rows(folder, version):
    change(table_of(folder, version), lambda t: arrow.concat_tables([t, t.slice(len(t) - 3)]))


def other_task(folder, version):
    change(table_of(folder, version), column("task_index", lambda rows: [7] * len(rows)))


def not_finite(folder, version):
    def edit(rows):
        rows[2][3] = np.nan
        return rows

    change(table_of(folder, version), column("action", edit))


def empty(folder, version):
    change(table_of(folder, V2), lambda table: table.slice(0, 0))
    lines(
        folder, "episodes.jsonl", lambda rows: [r | {"length": r["length"] * (i != 1)}
        for i, r in enumerate(rows)],
    )  # fmt: skip


def empty_in_a_file(folder, version):
    path = folder / "meta" / "episodes" / "chunk-000" / "file-000.parquet"
    change(path, column("length", lambda rows: [rows[0], 0, rows[2]]))
    change(table_of(folder, V3, 0), lambda table: table.slice(0, LENGTHS[0]))


def beyond_meta(folder, version):
    info(folder, lambda raw: raw["splits"].update(train="0:5"))


def without_video(folder, version):
    (folder / "videos" / "chunk-000" / KEY / "episode_000001.mp4").unlink()


# What is done, to which version, with video; the error, its place; episodes that skipping loses.
BROKEN = [
    (truncated, V2, errors.TruncatedShardError, "000001.parquet: cannot be read: its end is", [1]),
    (truncated, V3, errors.TruncatedShardError, "file-001.parquet: cannot be read: its end", [2]),
    (missing, V2, errors.DataError, "000001.parquet, episode 1: the file is missing", [1]),
    (missing, V3, errors.DataError, "file-001.parquet, episode 2: the file is missing", [2]),
    (fewer_rows, V2, errors.CorruptRecordError, "episode 1: its rows are not .*: 9 .*, 7 are", [1]),
    (more_rows, V2, errors.CorruptRecordError, "episode 1: its rows are not .*: 9 .*, 12 are", [1]),
    (more_rows, V3, errors.CorruptRecordError, "episode 2: its rows are not those", [2]),
    (other_task, V2, errors.FeatureError, r"episode 1: frames have task_index \[7\]", [1]),
    (not_finite, V3, errors.ActionError, "file-001.parquet, episode 2, frame 2: robot: the a", [2]),
    (empty, V2, errors.EmptyTrajectoryError, "000001.parquet, episode 1: the episode has no", [1]),
    (empty_in_a_file, V3, errors.EmptyTrajectoryError, "000.parquet, episode 1: the episode", [1]),
    (beyond_meta, V2, errors.TruncatedShardError, "meta, episode 3: lacks 2 of the 5 episodes", []),
    (beyond_meta, V3, errors.TruncatedShardError, "meta, episode 3: lacks 2 of the 5 episodes", []),
]


@pytest.mark.parametrize("case", BROKEN, ids=lambda case: f"{case[0].__name__}-{case[1]}")
def test_episodes(tmp_path, case):
    damage, version, kind, message, lost = case
    folder = write_lerobot(tmp_path / "robot", version, "image")
    damage(folder, version)

    def opened(skips):
        return open_dataset("robot", SPEC, folder, "train", ["primary"], 7, skips=skips)

    with pytest.raises(kind, match=message) as raised:
        opened(None)
    assert type(raised.value) is kind
    for _ in range(2):  # the second time from what the first one has kept
        skips = Skips("robot", "skip")
        dataset = opened(skips)
        left = [i for i in range(len(LENGTHS)) if i not in lost]
        assert dataset.lengths.tolist() == [LENGTHS[i] for i in left]
        assert np.unique(dataset.actions[:, 0]).tolist() == left
        assert skips.counts == {kind.__name__: len(lost) or 2}


def test_mended_files_are_used_again(tmp_path):
    folder = write_lerobot(tmp_path / "robot", V2, "image")
    file = sorted(folder.glob("data/*/*.parquet"))[1]
    sound = file.read_bytes()
    file.write_bytes(sound[:-4] + bytes(4))  # keeps its size
    assert open_lerobot(folder, "train", [TEXT], skip=True).num_episodes == len(LENGTHS) - 1
    file.write_bytes(sound)
    assert open_lerobot(folder, "train", [TEXT]).num_episodes == len(LENGTHS)


def test_a_video_that_is_missing(tmp_path):
    pytest.importorskip("av")
    folder = write_lerobot(tmp_path / "robot", V2)
    without_video(folder, V2)
    with pytest.raises(errors.DataError, match=r"000001\.mp4, episode 1: the file is missing"):
        open_lerobot(folder, "train", [TEXT])
    source = open_lerobot(folder, "train", [TEXT], skip=True)
    assert source.num_episodes == 2
    assert [(e.episode, count) for e, count in source.skipped] == [(1, 1)]


def test_a_video_that_is_too_short_names_the_frame(tmp_path):
    pytest.importorskip("av")
    folder = write_lerobot(tmp_path / "robot", V2)
    video = folder / "videos" / "chunk-000" / KEY / "episode_000001.mp4"
    write_video(video, np.zeros((5, 48, 64, 3), np.uint8))
    source = open_lerobot(folder, "train")
    with pytest.raises(errors.ImageDecodeError, match=r"000001\.mp4, episode 1, frame 5: .*front"):
        source.read(CAMERA, LENGTHS[0] + 3, LENGTHS[0] + 6)


@pytest.mark.parametrize("version", [V2, V3])
def test_images_that_are_missing(tmp_path, version):
    folder = write_lerobot(tmp_path / "robot", version, "image")
    path, number = table_of(folder, version), 2 if version == V3 else 1
    first = sum(LENGTHS[:number])

    def edit(rows):
        rows[4] = None
        return rows

    change(path, column(KEY, edit))
    source = open_lerobot(folder, "train")
    assert len(source.read(CAMERA, first, first + 3)) == 4
    with pytest.raises(errors.ImageDecodeError, match=rf"episode {number}, frame 4: .*no image"):
        source.read(CAMERA, first + 2, first + 6)
    change(path, lambda table: table.drop([KEY]))
    with pytest.raises(errors.MissingCameraError, match=rf"episode {number}, frame 2: camera"):
        open_lerobot(folder, "train").read(CAMERA, first + 2, first + 6)
    source = open_lerobot(folder, "train")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(errors.TruncatedShardError, match=rf"episode {number}, frame 2"):
        source.read(CAMERA, first + 2, first + 6)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: info(f, lambda raw: raw["splits"].update(train="80%")), "the split 'train' is"),
        (lambda f: info(f, lambda raw: raw["features"]["action"].pop("dtype")), "info.json.*dtype"),
        (lambda f: info(f, lambda raw: raw.update(chunks_size=0.5)), "chunks_size 0.5, no number"),
        (lambda f: info(f, lambda raw: raw.update(features=[1])), "not a LeRobot info.json"),
        (lambda f: lines(f, "episodes.jsonl", lambda r: [{"episode_index": 0}]), "list of episod"),
        (lambda f: lines(f, "episodes.jsonl", lambda r: [*r, r[1]]), r"more than once: \[1\]"),
        (lambda f: lines(f, "tasks.jsonl", lambda r: [{"task": "x"}]), "is not a list of tasks"),
        (lambda f: (f / "meta" / "tasks.jsonl").unlink(), "tasks.jsonl: cannot be read"),
    ],
)
def test_meta_that_is_wrong(tmp_path, damage, message):
    folder = write_lerobot(tmp_path / "robot", V2, "image")
    damage(folder)
    with pytest.raises(errors.DataError, match=message):
        open_lerobot(folder, "train", ["steps/action", TEXT])


def test_episodes_of_no_split_are_told(tmp_path, caplog):
    folder = write_lerobot(tmp_path / "robot", V2, "image")
    info(folder, lambda raw: (raw.pop("splits"), raw.update(total_episodes=2)))
    source = open_lerobot(folder, "train", [TEXT])
    assert source.text(TEXT)[1] == list(dict.fromkeys(TOLD[:2]))
    assert "1 episodes are in no split: [2]" in caplog.text


@pytest.mark.parametrize("version", [V2, V3])
def test_a_task_number_that_stands_for_several(tmp_path, version):
    folder = write_lerobot(tmp_path / "set", version)
    if version == V2:
        lines(folder, "tasks.jsonl", lambda rows: [*rows, rows[0]])  # twice the same is no harm
    open_lerobot(folder, "train", [TEXT])
    if version == V2:
        lines(folder, "tasks.jsonl", lambda rows: [*rows, {"task_index": 0, "task": "wipe"}])
    else:
        path = folder / "meta/tasks.parquet"
        parquet.write_table(arrow.table({"task_index": [0, 0], "task": ["pick", "wipe"]}), path)
    with pytest.raises(errors.DataError, match="task_index 0 stands for several tasks"):
        open_lerobot(folder, "train", [TEXT])


def test_a_task_that_is_no_text(tmp_path):
    folder = write_lerobot(tmp_path / "set", V2)
    lines(folder, "tasks.jsonl", lambda rows: [{**row, "task": None} for row in rows])
    with pytest.raises(errors.DataError, match=r"tasks are no texts: \[None"):
        open_lerobot(folder, "train", [TEXT])


def test_a_time_that_a_video_lacks_says_what_it_has(tmp_path):
    folder = write_lerobot(tmp_path / "set", V2)
    video = folder / "videos" / "chunk-000" / KEY / "episode_000000.mp4"
    write_video(video, np.zeros((5, 48, 64, 3), np.uint8))
    source = open_lerobot(folder, "train", ["steps/action"])
    match = r"no frame at 0\.900 s: it has 10 frames a second and ends after 0\.500 s; the rows"
    with pytest.raises(errors.ImageDecodeError, match=match):
        source.read(CAMERA, 9, 9)
