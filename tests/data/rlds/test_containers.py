"""ArrayRecord and parquet shards, as TFDS writes them, hold what the TFRecord shards do."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from vla_jax.data import features
from vla_jax.data.errors import CorruptRecordError, DataError, TruncatedShardError
from vla_jax.data.formats import find_reader
from vla_jax.data.rlds import containers, records
from vla_jax.data.rlds.index import open_index
from vla_jax.data.rlds.writer import RLDSWriter

LENGTHS = (5, 9, 3, 7)
CAMERA, LOW = "steps/observation/front", ["steps/action", "steps/language_instruction"]


def write(folder):
    """Four episodes in two shards, without noise that would not pack."""
    described = {
        "steps": {
            "observation": {"front": features.image(16, 24, "png")},
            "action": features.tensor((7,)),
            "language_instruction": features.text(),
        }
    }
    rng = np.random.default_rng(0)
    with RLDSWriter(folder, "my_robot", described, shard_bytes=14000) as out:
        for number, length in enumerate(LENGTHS):
            steps = {
                "observation": {"front": rng.integers(0, 255, (length, 16, 24, 3), np.uint8)},
                "action": rng.normal(size=(length, 7)).astype(np.float32),
                "language_instruction": f"task {number}",
            }
            out.write("train", {"steps": steps})
    return folder


def to_array_record(path, examples):
    module = pytest.importorskip("array_record.python.array_record_module")
    writer = module.ArrayRecordWriter(str(path), "group_size:1")
    for example in examples:
        writer.write(example)
    writer.close()


def to_parquet(path, examples, size=100):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    schema = arrow.schema([arrow.field("data", arrow.binary())])
    with parquet.ParquetWriter(path, schema) as out:
        for first in range(0, len(examples), size):
            part = [{"data": example} for example in examples[first : first + size]]
            out.write_batch(arrow.RecordBatch.from_pylist(part, schema))


WRITERS = {"array_record": to_array_record, "parquet": to_parquet}


def convert(folder, kind):
    """Puts the records of a TFRecord dataset into files of another format, in place."""
    for path in sorted(folder.glob("*.tfrecord*")):
        examples = [record for _, record in records.read_records(path)]
        WRITERS[kind](path.with_name(path.name.replace("tfrecord", kind)), examples)
        path.unlink()
    info = json.loads((folder / "dataset_info.json").read_text())
    info["fileFormat"] = kind
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


@pytest.fixture(params=sorted(WRITERS))
def both(request, tmp_path):
    """(the same data in another container, as they were in TFRecord, the container)."""
    sound = write(tmp_path / "a" / "1.0.0")
    other = convert(write(tmp_path / "b" / "1.0.0"), request.param)
    return other, sound, request.param


def everything(folder, cache, **options):
    index = open_index(folder, "train", LOW, str(cache), **options)
    images = [
        [bytes(view) for view in index.read(CAMERA, int(first), int(stop) - 1)]
        for first, stop in zip(index.starts, index.starts[1:], strict=False)
    ]
    codes, table = index.text(LOW[1])
    return index, index.low(LOW[0]).tolist(), [table[code] for code in codes], images


def test_holds_the_same(both, tmp_path):
    other, sound, _ = both
    assert len(list(sound.glob("*.tfrecord*"))) == 2
    result, expected = everything(other, tmp_path), everything(sound, tmp_path)
    assert result[1:] == expected[1:]
    assert result[0].numbers.tolist() == expected[0].numbers.tolist() == [0, 1, 2, 3]
    assert find_reader(other).splits(other) == ["train"]


def test_any_frame_from_any_thread(both, tmp_path, monkeypatch):
    other, sound, _ = both
    monkeypatch.setattr(containers, "_KEPT", 8000)  # so that records are dropped and read again
    result, expected = everything(other, tmp_path)[0], everything(sound, tmp_path)[3]
    flat = [image for episode in expected for image in episode]
    order = np.random.default_rng(1).integers(0, len(flat), 200).tolist()
    with ThreadPoolExecutor(8) as pool:
        views = list(pool.map(lambda frame: result.read(CAMERA, frame, frame)[0], order))
    assert [bytes(view) for view in views] == [flat[frame] for frame in order]


def test_a_changed_shard_is_measured_anew(both, tmp_path):
    other, _, kind = both
    before = everything(other, tmp_path)
    path = sorted(other.glob(f"*{kind}*"))[0]
    backwards = [record for _, record, _ in containers.CONTAINERS[kind].scan(path, False)][::-1]
    WRITERS[kind](path, backwards)
    after = everything(other, tmp_path)
    assert after[2] != before[2]
    assert sorted(after[2]) == sorted(before[2])


@pytest.mark.parametrize("damage", ["cut", "zeroed", "empty", "foreign"])
def test_damage_is_named(both, tmp_path, damage):
    other, _, kind = both
    path = sorted(other.glob(f"*{kind}*"))[0]
    data = path.read_bytes()
    half = len(data) // 2
    path.write_bytes(
        {
            "cut": data[:half],
            "zeroed": bytes(200) + data[200:],
            "empty": b"",
            "foreign": b"<!DOCTYPE html><html></html>" + bytes(1 << 17),
        }[damage]
    )
    with pytest.raises((CorruptRecordError, TruncatedShardError), match=path.name):
        everything(other, tmp_path)
    index = everything(other, tmp_path, skip=True)[0]
    assert set(index.shard.tolist()) == {1}
    assert index.skipped


def test_a_shard_that_changes_under_the_run(both, tmp_path):
    other, _, kind = both
    index = open_index(other, "train", LOW, str(tmp_path))
    for path in other.glob(f"*{kind}*"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=rf"{kind}.*episode 0"):
        index.read(CAMERA, 0, 1)


def test_another_container_is_named(tmp_path):
    folder = convert(write(tmp_path / "1.0.0"), "parquet")
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "riegeli"}))
    with pytest.raises(DataError, match="'riegeli'; the index reads tfrecord, array_record, parq"):
        open_index(folder, "train", LOW, str(tmp_path))
