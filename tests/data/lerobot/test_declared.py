"""What a LeRobot dataset declares, held against what it holds."""

import json
import logging

import numpy as np
import pytest

from tests.data.lerobot.test_errors import V2, V3, change, column, info, table_of
from tests.data.lerobot.test_source import CAMERA, SPEC, TEXT
from tests.data.look_alikes import (
    KEY,
    LENGTHS,
    encoded,
    lerobot_pixels,
    lerobot_rows,
    write_lerobot,
)
from vla_jax.data import errors
from vla_jax.data.filters import Filters
from vla_jax.data.lerobot.meta import Info
from vla_jax.data.lerobot.source import features, open_lerobot
from vla_jax.data.open_dataset import open_dataset

arrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def replace(path, key, made):
    """Puts another column in the place of one; `made` of the number of rows."""
    change(path, lambda t: t.set_column(t.schema.names.index(key), key, made(len(t))))


def opened(folder, **more):
    return open_dataset("robot", SPEC, folder, "train", ["primary"], 7, **more)


def described(folder, **changes):
    info(folder, lambda raw: raw["features"][KEY].update(changes))


@pytest.mark.parametrize(
    ("shape", "names"),
    [
        ((3, 48, 64), None),
        ((3, 48, 64), ["c", "h", "w"]),
        ((3, 48, 64), ["rgb", "height", "width"]),
        ((3, 48, 64), ["channels", "height", "width"]),
        ((48, 64, 3), None),
        ((48, 64, 3), ["y", "x", "color"]),
        ((64, 48, 3), ["width", "height", "channels"]),
        ((3, 64, 48), ["channel", "width", "height"]),
        ((48, 64, 3), ["unknown", "words", "here"]),
    ],
)
def test_the_order_of_an_images_axes(tmp_path, shape, names, caplog):
    folder = write_lerobot(tmp_path / "robot", V2, "image")
    described(folder, shape=shape, names=names)
    assert features(folder)[CAMERA].shape == (48, 64, 3)
    assert opened(folder).image_sizes == {"primary": (48, 64)}
    assert "declared" not in caplog.text


@pytest.mark.parametrize("images", ["image", "video"])
def test_images_of_another_size_than_declared(tmp_path, images, caplog):
    folder = write_lerobot(tmp_path / "robot", V3, images)
    described(folder, shape=(48, 96, 3), names=["height", "width", "channels"])
    dataset = opened(folder)
    assert dataset.image_sizes == {"primary": (48, 64)}
    assert f"robot: camera '{CAMERA}' is declared as 48 x 96, its images are 48 x 64" in caplog.text


def test_one_image_of_another_size(tmp_path, caplog):
    folder = write_lerobot(tmp_path / "robot", V2, "image")
    small = encoded(np.zeros((24, 32, 3), np.uint8))

    def edit(rows):
        rows[5] = {"bytes": small, "path": None}
        return rows

    change(table_of(folder, V2), column(KEY, edit))
    dataset, out = opened(folder), np.zeros((2, 48, 64, 3), np.uint8)
    for _ in range(2):
        dataset.images("primary", 1, np.array([4, 5]), out)
    assert caplog.text.count("an image is 24 x 32, not 48 x 64") == 1
    assert "episode 1, frame 5" in caplog.text


@pytest.mark.parametrize("version", [V2, V3])
def test_rows_are_put_in_order(tmp_path, version, caplog):
    folder = write_lerobot(tmp_path / "robot", version, "image")
    expected = opened(folder)
    path = table_of(folder, version)
    rows = np.random.default_rng(0).permutation(parquet.read_metadata(path).num_rows)
    change(path, lambda table: table.take(arrow.array(rows)))
    dataset = opened(folder)
    np.testing.assert_array_equal(dataset.actions, expected.actions)
    assert "its rows are not in the order of frame_index and are put in order" in caplog.text
    number = 2 if version == V3 else 1
    for step in (0, 3, 4):
        assert dataset.source.read(
            CAMERA, int(dataset.starts[number]) + step, int(dataset.starts[number]) + step
        ) == [encoded(lerobot_pixels(number, step + 1)[step])]


def test_rows_that_repeat_a_frame(tmp_path):
    folder = write_lerobot(tmp_path / "robot", V2, "image")
    change(table_of(folder, V2), column("frame_index", lambda rows: [0, 0, *rows[2:]]))
    with pytest.raises(errors.CorruptRecordError, match="episode 1: a frame_index occurs more"):
        opened(folder)


def test_rows_with_gaps_are_told_and_even_ones_are_not(tmp_path, caplog):
    folder = write_lerobot(tmp_path / "robot", V2, "image")
    change(table_of(folder, V2), column("frame_index", lambda rows: [3 * i for i in rows]))
    opened(folder)
    assert "gaps" not in caplog.text
    change(table_of(folder, V2), column("frame_index", lambda rows: [i + (i > 12) for i in rows]))
    assert opened(folder).lengths.tolist() == list(LENGTHS)
    assert "episode 1: its rows have gaps" in caplog.text


def test_times_that_stand_still(tmp_path):
    pytest.importorskip("av")
    folder = write_lerobot(tmp_path / "robot", V2)
    change(table_of(folder, V2), column("timestamp", lambda rows: [0.0] * len(rows)))
    with pytest.raises(errors.CorruptRecordError, match="episode 1: the timestamps of its rows do"):
        opened(folder)


def test_a_file_table_that_is_out_of_date(tmp_path, caplog):
    folder = write_lerobot(tmp_path / "robot", V3, "image")
    expected = opened(folder)
    path = folder / "meta/episodes/chunk-000/file-000.parquet"
    change(path, column("data/file_index", lambda rows: [0] * len(rows)))
    dataset = opened(folder)
    np.testing.assert_array_equal(dataset.actions, expected.actions)
    assert dataset.source.read(CAMERA, 23, 23) == expected.source.read(CAMERA, 23, 23)
    assert "episode 2: its rows lie in another file than meta names" in caplog.text
    # Rows that are whole in two other files are nobody's.
    data = folder / "data/chunk-000"
    (data / "file-007.parquet").write_bytes((data / "file-001.parquet").read_bytes())
    with pytest.raises(errors.CorruptRecordError, match="episode 2: its rows are not those"):
        opened(folder, rebuild=True)


def test_files_that_lie_beside(tmp_path):
    folder = write_lerobot(tmp_path / "robot", V3, "image")
    expected = opened(folder).actions
    for place in ("data/chunk-000", "meta/episodes/chunk-000"):
        (folder / place / "._file-000.parquet").write_bytes(b"\0\5\26\7 Mac OS X")
        (folder / place / ".DS_Store").write_bytes(b"\0")
    np.testing.assert_array_equal(opened(folder, rebuild=True).actions, expected)


@pytest.mark.parametrize("separator", ["\u2028", "\x85", "\x0b", "\x1c", "\ufeff"])
def test_texts_with_what_looks_like_the_end_of_a_line(tmp_path, separator):
    folder = write_lerobot(tmp_path / "robot", V2, "image")
    texts = [f"pick up{separator}the cup", "open the door"]
    lines = [
        json.dumps({"task_index": i, "task": t}, ensure_ascii=False) for i, t in enumerate(texts)
    ]
    path = folder / "meta" / "tasks.jsonl"
    path.write_text("\ufeff" + "\r\n".join(lines) + "\n", encoding="utf-8")
    assert opened(folder).instructions == texts


def test_a_task_table_with_several_columns_of_text(tmp_path):
    folder = write_lerobot(tmp_path / "robot", V3, "image")
    path, texts = folder / "meta" / "tasks.parquet", ["pick up the cup", "open the door"]
    for columns in (
        {"category": ["a", "b"], "task_index": [0, 1], "task": texts},
        {"category": ["a", "b"], "task_index": [0, 1], "__index_level_0__": texts},
    ):
        parquet.write_table(arrow.table(columns), path)
        assert Info(folder).tasks() == dict(enumerate(texts))
    parquet.write_table(arrow.table({"task_index": [0, 1], "a": texts, "b": texts}), path)
    with pytest.raises(errors.DataError, match="which column holds the tasks"):
        Info(folder).tasks()


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        (lambda n: [[0.0] * 6] + [[0.0] * 8] + [[0.0] * 7] * (n - 2), "float32", r"have \[6, 7, 8"),
        (lambda n: [[0.0] * 8] * n, "float32", r"its rows have \[8\] numbers"),
        (lambda n: [["a"] * 7] * n, "string", "it holds object"),
        (lambda n: [[1e300] * 7] * n, "float64", "holds float64 numbers that are no float32"),
    ],
)
def test_rows_of_another_length_or_type(tmp_path, values, kind, message):
    folder = write_lerobot(tmp_path / "robot", V2, "image")

    def edit(table):
        array = arrow.array(values(len(table)), arrow.list_(getattr(arrow, kind)()))
        return table.set_column(table.schema.names.index("action"), "action", array)

    change(table_of(folder, V2), edit)
    with pytest.raises(errors.FeatureError, match=rf"000001\.parquet: column 'action'.*{message}"):
        opened(folder)


def test_fractions_where_whole_numbers_are_declared(tmp_path):
    folder = write_lerobot(tmp_path / "robot", V2, "image")
    for number in range(3):
        replace(table_of(folder, V2, number), "index", lambda n: arrow.array(np.arange(n) + 0.5))
    with pytest.raises(errors.FeatureError, match="'index' holds float64 numbers that are no int"):
        open_lerobot(folder, "train", ["steps/index"])
    for number in range(3):
        replace(table_of(folder, V2, number), "index", lambda n: arrow.array(np.arange(n) + 0.0))
    assert open_lerobot(folder, "train", ["steps/index"]).low("steps/index").dtype == np.int64


@pytest.mark.parametrize(
    "mark",
    [
        {"info": {"is_depth_map": True}},
        {"info": {"video.is_depth_map": True}},
        {"video_info": {"video.is_depth_map": True}},
    ],
)
def test_a_depth_camera_is_refused_by_name(tmp_path, mark):
    folder = write_lerobot(tmp_path / "robot", V3, "image")
    described(folder, **mark)
    with pytest.raises(errors.FeatureError, match=r"camera 'primary' .*marked as a depth camera"):
        opened(folder)
    assert open_lerobot(folder, "train", [TEXT]).cameras == []


def test_distances_without_a_mark_are_refused(tmp_path):
    folder = write_lerobot(tmp_path / "robot", V2, "image")
    depth = encoded(np.full((48, 64), 1500, np.uint16))
    for number in range(3):
        change(
            table_of(folder, V2, number),
            column(KEY, lambda rows: [{"bytes": depth, "path": None} for _ in rows]),
        )
    with pytest.raises(errors.ImageDecodeError, match=r"numbers of 16 bits .*distances"):
        opened(folder)


def test_pixels_as_numbers_are_refused(tmp_path):
    folder = write_lerobot(tmp_path / "robot", V2, "image")
    described(folder, dtype="uint8")
    with pytest.raises(errors.FeatureError, match=r"'primary' .*stored as numbers .uint8"):
        opened(folder)


def test_numbers_of_episodes_are_the_recordings(tmp_path, caplog):
    folder = write_lerobot(tmp_path / "robot", V2, "image")
    path = table_of(folder, V2, 0)
    path.write_bytes(path.read_bytes()[:-50])
    skips = errors.Skips("robot", "skip")
    retained = opened(folder, filters=Filters(episodes=frozenset([1, 0])), skips=skips)
    assert np.unique(retained.actions[:, 0]).tolist() == [1]
    assert retained.source.numbers.tolist() == [1, 2]
    assert retained.source.place(0)[1] == 1
    with pytest.raises(errors.DataError, match=r"names \[3, 17\], which are no episodes .* 0 to 2"):
        opened(folder, filters=Filters(episodes=frozenset([1, 3, 17])), skips=skips)


def test_other_numbers_in_files_of_the_same_size(tmp_path, caplog):
    folder = write_lerobot(tmp_path / "robot", V2, "image")
    first = np.array(opened(folder).actions)
    path = table_of(folder, V2, 0)
    other = -lerobot_rows()[0]["action"]
    change(
        path,
        lambda table: table.set_column(
            table.schema.names.index("action"),
            "action",
            arrow.FixedSizeListArray.from_arrays(arrow.array(other.reshape(-1)), 7),
        ),
    )
    with caplog.at_level(logging.WARNING):
        dataset = opened(folder)
    np.testing.assert_array_equal(dataset.actions[: LENGTHS[0]], -first[: LENGTHS[0]])
