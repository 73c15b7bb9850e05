import errno
import functools
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.data.conftest import write_calvin
from vla_jax.data import errors, features, open_files
from vla_jax.data.rlds import build_index, containers, crc32c, records
from vla_jax.data.rlds import index as rlds_index
from vla_jax.data.rlds.index import open_index

LOW = ("steps/action", "steps/language_instruction", "episode_metadata/episode_id")


@pytest.fixture
def copy(bridge, tmp_path):
    """A writable copy of the fixture."""
    return shutil.copytree(bridge, tmp_path / "bridge_dataset" / "1.0.0", copy_function=shutil.copy)


def shard_of(folder):
    return next(folder.glob("*-train.tfrecord-*"))


def test_read_returns_the_bytes_of_the_record(bridge, tmp_path):
    index = open_index(bridge, "train", LOW, str(tmp_path))
    path = "steps/observation/image_1"
    _, record = list(records.read_records(shard_of(bridge)))[2]
    spans = records.byte_spans(record, records.walk_example(record)[path])
    expected = [record[a:b] for a, b in spans]
    first = int(index.starts[2])
    assert [bytes(v) for v in index.read(path, first + 3, first + 7)] == expected[3:8]
    assert index.place(first + 3) == (shard_of(bridge), 2, 3)


def test_low_dimensional_arrays_and_text(bridge, tmp_path):
    index = open_index(bridge, "train", LOW, str(tmp_path))
    assert index.starts.tolist() == [0, 10, 20, 30, 40]
    assert index.low("steps/action").shape == (40, 7)
    assert index.low("episode_metadata/episode_id").shape == (4,)
    codes, table = index.text("steps/language_instruction")
    assert table[codes[15]] == "flip pot upright which is in sink"
    assert table[codes[35]] == "turn lever vertical to front"


def test_index_lies_beside_the_data_and_moves_with_it(copy, tmp_path):
    open_index(copy, "train", LOW)
    assert list(copy.glob("vla_index/*/index.json"))
    moved = copy.rename(tmp_path / "elsewhere")
    before = next((moved / "vla_index").glob("*/index.json")).stat().st_mtime_ns
    index = open_index(moved, "train", LOW)
    assert next((moved / "vla_index").glob("*/index.json")).stat().st_mtime_ns == before
    assert len(index.read(index.cameras[0], 0, 9)) == 10


def test_others_may_read_a_shared_index(copy):
    open_index(copy, "train", LOW)
    (folder,) = (path.parent for path in copy.glob("vla_index/*/index.json"))
    # Temporary folders, as which it began, are for one user alone.
    assert folder.stat().st_mode & 0o777 == 0o755


def test_unwritable_data_fall_back_to_the_user_cache(copy, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    copy.chmod(0o555)
    try:
        open_index(copy, "train", LOW)
    finally:
        copy.chmod(0o755)
    assert not (copy / "vla_index").exists()
    assert list((tmp_path / "home" / ".cache" / "vla_jax").glob("*/index.json"))


def test_changed_data_are_indexed_anew(tmp_path):
    folder = write_calvin(tmp_path / "d" / "1.0.0", [4, 4])
    before = open_index(folder, "train", ["steps/rel_actions"])
    shutil.rmtree(folder)
    write_calvin(folder, [4, 5])
    after = open_index(folder, "train", ["steps/rel_actions"])
    assert before.digest != after.digest
    assert after.starts.tolist() == [0, 4, 9]


def cut(path):
    path.write_bytes(path.read_bytes()[:-9])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 64
    path.write_bytes(bytes(data))


def older(path):
    meta = json.loads(path.read_text())
    path.write_text(json.dumps({k: meta[k] for k in ("name", "shards", "skipped")}))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("starts.npy", lambda path: np.save(path, np.zeros(5, np.int64))),
        ("low_0.npy", cut),
        ("low_0.npy", flip),
        ("camera_0_at.npy", lambda path: path.unlink()),
        ("index.json", cut),
        ("index.json", lambda path: path.write_bytes(b"")),
        ("index.json", lambda path: path.write_text("[]")),
        ("index.json", older),
    ],
)
def test_a_damaged_index_is_built_anew(copy, name, damage, caplog):
    expected = np.array(open_index(copy, "train", LOW).low("steps/action"))
    damage(next((copy / "vla_index").glob(f"*/{name}")))
    index = open_index(copy, "train", LOW)
    assert "is built anew" in caplog.text
    assert index.starts.tolist() == [0, 10, 20, 30, 40]
    np.testing.assert_array_equal(index.low("steps/action"), expected)
    assert open_index(copy, "train", LOW, rebuild=True).starts[-1] == 40
    leftovers = [p for p in (copy / "vla_index").iterdir() if p.name.startswith(".")]
    assert not leftovers


def other_actions(shard):
    """The shard with its actions negated: of the same size, written at the same time."""
    then, out = shard.stat(), []
    for _, record in records.read_records(shard):
        raw, field = bytearray(record), records.walk_example(record)["steps/action"]
        for _, start, stop in records.message_fields(record, field.start, field.stop):
            raw[start:stop] = (-np.frombuffer(record[start:stop], "<f4")).tobytes()
        out.append(records.frame_record(bytes(raw)))
    return b"".join(out), (then.st_atime_ns, then.st_mtime_ns)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_file_of_the_same_size_with_other_actions_is_read_anew(copy, in_place, tmp_path):
    before = open_index(copy, "train", LOW)
    actions = np.array(before.low("steps/action"))
    shard = shard_of(copy)
    data, times = other_actions(shard)
    if in_place:
        shard.write_bytes(data)
    else:
        (copy / "new").write_bytes(data)
        (copy / "new").replace(shard)
    os.utime(shard, ns=times)
    after = open_index(copy, "train", LOW)
    np.testing.assert_array_equal(after.low("steps/action"), -actions)
    assert (after.digest, after.content != before.content) == (before.digest, True)
    # A copy elsewhere, with the index beside it, is the same data.
    moved = shutil.copytree(copy, tmp_path / "copy", copy_function=shutil.copyfile)
    built = next((moved / "vla_index").glob("*/low_0.npy")).stat().st_mtime_ns
    assert open_index(moved, "train", LOW).content == after.content
    assert next((moved / "vla_index").glob("*/low_0.npy")).stat().st_mtime_ns == built


def test_a_full_disk_is_named(copy, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(rlds_index, "index_shards", full)
    with pytest.raises(errors.DataError, match=r"cannot be made .*No space.*data.cache_dir"):
        open_index(copy, "train", LOW)
    assert not list((copy / "vla_index").iterdir())


def test_other_features_make_another_index(copy):
    open_index(copy, "train", ["steps/action"])
    index = open_index(copy, "train", ["steps/observation/state"])
    assert index.low("steps/observation/state").shape == (40, 7)


def test_parallel_build_equals_the_serial_one(tmp_path, monkeypatch):
    folder = write_calvin(tmp_path / "d" / "1.0.0", [4, 9, 2, 6], shard_bytes=1)
    low = ["steps/rel_actions", "steps/language_instruction"]
    serial = open_index(folder, "train", low, str(tmp_path / "a"))
    monkeypatch.setattr(build_index, "_PARALLEL_BYTES", 0)
    parallel = open_index(folder, "train", low, str(tmp_path / "b"))
    assert len(serial.shards) == 4
    np.testing.assert_array_equal(serial.starts, parallel.starts)
    for path in low:
        np.testing.assert_array_equal(serial.low(path), parallel.low(path))
    assert serial.text(low[1])[1] == parallel.text(low[1])[1] == ["task 0", "task 1", "task 2"]
    for camera in serial.cameras:
        assert serial.read(camera, 4, 12) == parallel.read(camera, 4, 12)
    assert serial.place(13)[1:] == (0, 0)  # episode 2 is the first of its shard


def test_many_datasets_need_few_open_files(tmp_path, monkeypatch):
    fewer = functools.lru_cache(maxsize=3)(open_files.OpenFile)
    monkeypatch.setattr(containers, "shared_file", lambda path, _: fewer(path))
    folders = [
        write_calvin(tmp_path / name / "1.0.0", [2] * 6, shard_bytes=1) for name in ("c", "d")
    ]
    indices = [open_index(folder, "train", ["steps/rel_actions"]) for folder in folders]
    for frame in [0, 3, 5, 7, 9, 11, 0, 11]:
        for index in indices:
            assert len(index.read(index.cameras[0], frame, frame)[0])
    assert fewer.cache_info().currsize == 3
    held = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    assert sum(name.startswith(str(tmp_path)) and ".tfrecord" in name for name in held) <= 3


def test_missing_split_and_shard(copy):
    with pytest.raises(errors.DataError, match=r"no split 'test'; it has \['train'\]"):
        open_index(copy, "test", LOW)
    shard_of(copy).unlink()
    with pytest.raises(errors.DataError, match="1 of 1 shards are missing"):
        open_index(copy, "train", LOW)


def test_a_folder_above_the_dataset_is_pointed_down(copy):
    with pytest.raises(errors.DataError, match=r"did you mean one of .*1\.0\.0"):
        open_index(copy.parent, "train", LOW)


def test_wrong_feature_name_lists_the_features(copy):
    with pytest.raises(errors.FeatureError, match=r"steps/actoin.*steps/action"):
        open_index(copy, "train", ["steps/actoin"])


def test_feature_that_the_records_lack_names_the_episode(copy):
    path = copy / "features.json"
    path.write_text(path.read_text().replace('"discount"', '"discounts"'))
    with pytest.raises(errors.FeatureError, match=r"episode 0: .*no feature 'steps/discounts'"):
        open_index(copy, "train", ["steps/discounts"])


def test_feature_of_another_width_names_the_episode(copy):
    path = copy / "features.json"
    path.write_text(path.read_text().replace('"7"', '"6"'))
    with pytest.raises(errors.FeatureError, match=r"episode 0: .*70 numbers do not fill .*\(6,\)"):
        open_index(copy, "train", ["steps/action"])


def test_truncated_shard(copy):
    shard = shard_of(copy)
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(errors.TruncatedShardError, match=rf"{shard.name}, episode 3: ends 100 b"):
        open_index(copy, "train", LOW)
    assert not list(copy.glob("vla_index/*/index.json"))


def test_shard_that_ends_between_records(copy):
    shard = shard_of(copy)
    offset, record = list(records.read_records(shard))[2]
    shard.write_bytes(shard.read_bytes()[: offset + len(record) + 4])
    with pytest.raises(errors.TruncatedShardError, match=r"holds 3 episodes, .* says 4"):
        open_index(copy, "train", LOW)


def test_shard_that_shrinks_after_indexing(copy):
    index = open_index(copy, "train", LOW)
    shard_of(copy).write_bytes(shard_of(copy).read_bytes()[:1000])
    with pytest.raises(errors.DataError, match="episode 2, frame 0: the shard has become shorter"):
        index.read(index.cameras[0], 20, 22)


def test_checksums_are_checked_on_request_or_where_they_are_quick(copy, monkeypatch):
    monkeypatch.setattr(crc32c, "FAST", False)
    shard = shard_of(copy)
    data = bytearray(shard.read_bytes())
    data[5000] ^= 255  # inside a JPEG: nothing else would notice
    shard.write_bytes(data)
    open_index(copy, "train", LOW)
    with pytest.raises(errors.CorruptRecordError, match="episode 0"):
        open_index(copy, "train", LOW, rebuild=True, check_crc=True)
    monkeypatch.setattr(crc32c, "FAST", True)
    with pytest.raises(errors.CorruptRecordError, match="episode 0: checksum of the record"):
        open_index(copy, "train", LOW, rebuild=True)
    # The records behind the damaged one are found all the same.
    index = open_index(copy, "train", LOW, rebuild=True, skip=True)
    assert index.numbers.tolist() == [1, 2, 3]
    assert index.every == range(4)


def test_empty_trajectory(tmp_path):
    folder = write_calvin(tmp_path / "d" / "1.0.0", [3, 3])
    described = features.load_features(folder / "features.json")
    empty = records.build_example(
        {
            p: (records.BYTES if f.kind != "tensor" else records.FLOAT, [])
            for p, f in described.items()
        }
    )
    shard = shard_of(folder)
    first = next(iter(records.read_records(shard)))[1]
    shard.write_bytes(records.frame_record(first) + records.frame_record(empty))
    with pytest.raises(errors.EmptyTrajectoryError, match="episode 1: the episode has no steps"):
        open_index(folder, "train", ["steps/rel_actions"])


def test_array_record_shards_are_refused(copy):
    path = copy / "dataset_info.json"
    info = json.loads(path.read_text())
    path.write_text(json.dumps({**info, "fileFormat": "array_record"}))
    with pytest.raises(errors.DataError, match="array_record"):
        open_index(copy, "train", LOW)


def test_descriptions_with_a_byte_order_mark(copy):
    for name in ("dataset_info.json", "features.json"):
        (copy / name).write_text("\ufeff" + (copy / name).read_text(), "utf-8")
    assert open_index(copy, "train", LOW).starts.tolist() == [0, 10, 20, 30, 40]


def test_a_split_without_lengths_is_not_called_empty_alone(copy):
    raw = json.loads((copy / "dataset_info.json").read_text())
    for split in raw["splits"]:
        del split["shardLengths"]
    (copy / "dataset_info.json").write_text(json.dumps(raw))
    with pytest.raises(errors.EmptyTrajectoryError, match="gives no shardLengths for it"):
        open_index(copy, "train", LOW)


@pytest.mark.parametrize("kind", ["file", "link", "dangling link"])
def test_what_stands_in_the_place_of_an_index_is_replaced(copy, tmp_path, kind):
    open_index(copy, "train", LOW)
    folder = next(p for p in (copy / "vla_index").iterdir() if p.is_dir())
    elsewhere = tmp_path / "elsewhere"
    shutil.move(folder, elsewhere)
    if kind == "file":
        folder.write_text("")
    else:
        folder.symlink_to(elsewhere if kind == "link" else tmp_path / "nowhere")
        open_index(copy, "train", LOW)  # a link to a whole one is followed
        (elsewhere / "starts.npy").write_bytes(b"")
    assert open_index(copy, "train", LOW).starts.tolist() == [0, 10, 20, 30, 40]


@pytest.mark.parametrize("below", ["", "/below"])
def test_a_cache_folder_that_is_a_file_names_the_way_out(copy, tmp_path, below):
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.DataError, match=r"cannot be made .*: set data\.cache_dir to a"):
        open_index(copy, "train", LOW, f"{tmp_path}/file{below}")
