import os
import shutil
import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest

from tests.data.conftest import write_calvin
from vla_jax.config import ConfigError
from vla_jax.data import errors
from vla_jax.data.decode import decode
from vla_jax.data.formats import find_reader
from vla_jax.data.loader import Loader, open_datasets
from vla_jax.data.open_dataset import open_dataset
from vla_jax.data.oxe import get_spec
from vla_jax.data.rlds import stream as stream_records
from vla_jax.data.rlds.index import open_index

tf = pytest.importorskip("tensorflow")
tfds = pytest.importorskip("tensorflow_datasets")
LENGTHS = [7, 3, 11, 5, 4, 9, 6]


def encode(text):
    ids = np.full(64, 1, np.int32)
    ids[: len(text)] = [ord(c) for c in text[:64]]
    return ids, np.arange(64) < len(text)


def rows(mixture, batches, size=8, **options):
    """What the loader gives, window by window, as bytes (without the sample numbers)."""
    collected = []
    with Loader(mixture, encode, size, 3, **options) as loader:
        for _, batch in zip(range(batches), loader, strict=False):
            observation = batch.observation
            parts = [
                *observation.images.values(),
                *observation.image_mask.values(),
                observation.text,
                observation.proprio,
            ]
            parts += [batch.actions.chunk, batch.actions.mask]
            for row in range(len(observation.text)):
                collected.append(b"".join(p[row].tobytes() for p in parts if p is not None))
    return collected


@pytest.fixture
def both(data_config, structure):
    """The same mixture from the index and from the stream."""

    def build(spec, folder, split: Any = "train", window=3, cameras=("primary",), **changes):
        shape = structure(window=window, cameras=cameras)
        return [
            open_datasets(data_config((spec, folder, 1.0), reader=r, **changes), shape, 7, split)
            for r in ("index", "stream")
        ]

    return build


@pytest.mark.parametrize("split", ["train", "val"])
def test_bridge_is_the_same_by_index_and_stream(bridge, both, split):
    # A few trajectories; VLA_JAX_BRIDGE names another version folder.
    bridge = os.environ.get("VLA_JAX_BRIDGE", bridge)
    index, stream = both("bridge_dataset", bridge, split, 4, ("primary", "secondary"))
    assert index.statistics == stream.statistics
    assert index.action_specs == stream.action_specs
    assert index.instructions == stream.instructions
    (a,), (b,) = index.datasets, stream.datasets
    for name in ("actions", "starts", "text", "text_starts", "proprio"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    # Every window, in order.
    assert rows(index, 100, shuffle=False, pad_last=True) == rows(
        stream, 100, shuffle=False, pad_last=True
    )
    # One pass of the shuffled stream holds the windows of the index, each once.
    count = index.num_windows
    one_pass = rows(stream, count, size=1)
    assert Counter(one_pass) == Counter(rows(index, count, size=1, shuffle=False))
    assert one_pass != rows(index, count, size=1, shuffle=False)


def test_bridge_trajectories_are_those_of_tfds(bridge, tmp_path):
    spec, reader = get_spec("bridge_dataset"), find_reader(bridge, "stream")
    dataset = open_dataset(
        "b", spec, bridge, "train", ["primary"], 7, cache_dir=str(tmp_path), reader=reader
    )
    episodes = tfds.builder_from_directory(str(bridge)).as_dataset(split="train")
    for number, episode in enumerate(episodes):
        steps = [tfds.as_numpy(step) for step in episode["steps"]]
        columns = {
            "state": np.stack([s["observation"]["state"] for s in steps]),
            "action": np.stack([s["action"] for s in steps]),
            "language": np.array([s["language_instruction"].decode() for s in steps], object),
        }
        expected = spec.standardize(columns)
        first, stop = dataset.starts[number : number + 2]
        np.testing.assert_array_equal(dataset.actions[first:stop], expected.action[expected.keep])


def test_a_stream_visits_every_window_once_a_pass(tmp_path, both):
    folder = write_calvin(tmp_path / "c" / "1.0.0", LENGTHS, shard_bytes=2000)
    assert len(list(folder.glob("*.tfrecord-*"))) >= 3
    index, stream = both("calvin", folder, pool=3, val_fraction=0.0)
    expected = Counter(rows(index, 1000, size=1, shuffle=False))
    assert sum(expected.values()) == sum(LENGTHS)
    for processes in (1, 2, 3):
        shares = [_first_pass(stream, process, processes) for process in range(processes)]
        assert sum(shares, Counter()) == expected  # disjoint, and all there is


def _first_pass(mixture, process, processes):
    """Windows of the process's share of the episodes: those up to the first that comes again."""
    fraction = np.array_split(np.arange(len(LENGTHS)), processes)[process]
    count = sum(LENGTHS[e] for e in fraction)
    options = {"process_index": process, "process_count": processes}
    return Counter(rows(mixture, count, size=processes, **options))


def test_two_runs_are_the_same_and_other_seeds_are_not(tmp_path, data_config, structure):
    folder = write_calvin(tmp_path / "c" / "1.0.0", LENGTHS, shard_bytes=2000)
    config = data_config(("calvin", folder, 1.0), reader="stream", pool=3, val_fraction=0.0)
    mixture = open_datasets(config, structure(), 7, "train")
    assert rows(mixture, 12) == rows(mixture, 12)
    assert rows(mixture, 12) != rows(mixture, 12, start=8)


def test_a_pool_holds_no_more_than_it_says(tmp_path, both):
    folder = write_calvin(tmp_path / "c" / "1.0.0", LENGTHS)
    _, stream = both("calvin", folder, pool=2, val_fraction=0.0)
    with Loader(stream, encode, 1, 0, prefetch=1) as loader:
        source: Any = loader._datasets[0].source
        held = source.held
        for _ in range(60):
            next(loader)
            assert len(held) <= 4  # the pool, and one finished in each of the batches under way


def test_an_evaluation_can_be_shared(tmp_path, both):
    folder = write_calvin(tmp_path / "c" / "1.0.0", LENGTHS)
    index, stream = both("calvin", folder, "val", val_fraction=0.6)
    options = {"shuffle": False, "pad_last": True, "process_count": 2, "size": 6}
    for process in (0, 1):
        assert rows(index, 99, process_index=process, **options) == rows(
            stream, 99, process_index=process, **options
        )


def test_more_processes_than_trajectories(tmp_path, both):
    _, stream = both("calvin", write_calvin(tmp_path / "c" / "1.0.0", [5, 5]), val_fraction=0.0)
    with pytest.raises(errors.DataError, match="2 trajectories cannot be streamed to 4 processes"):
        Loader(stream, encode, 4, 0, process_index=3, process_count=4)


def test_what_is_wrong_is_named(tmp_path, bridge):
    folder = shutil.copytree(bridge, tmp_path / "b" / "1.0.0", copy_function=shutil.copy)
    (shard,) = folder.glob("*-train.tfrecord-*")
    low, data = ["steps/action"], shard.read_bytes()
    with pytest.raises(errors.DataError, match="no split 'test'"):
        stream_records.open_stream(folder, "test", low)
    shard.write_bytes(data[:-100])
    with pytest.raises(
        errors.TruncatedShardError, match=r"train.tfrecord.*, episode 3: ends early"
    ):
        stream_records.open_stream(folder, "train", low)
    source = stream_records.open_stream(folder, "train", low, skip=True)
    assert source.num_episodes == 3
    broken = bytearray(data)
    broken[5000] ^= 255  # inside an image: TensorFlow checks all CRCs
    shard.write_bytes(broken)
    with pytest.raises(errors.CorruptRecordError, match=r"episode 0: is no TFRecord"):
        stream_records.open_stream(folder, "train", low)
    with pytest.raises(errors.DataError, match="not a TFDS version folder"):
        stream_records.open_stream(folder.parent, "train", low)


def test_images_can_be_read_without_a_loader(bridge, tmp_path):
    stream = stream_records.open_stream(bridge, "train", ["steps/action"], str(tmp_path))
    index = open_index(bridge, "train", ["steps/action"], str(tmp_path))
    camera = index.cameras[0]
    assert [bytes(v) for v in stream.read(camera, 13, 17)] == [
        bytes(v) for v in index.read(camera, 13, 17)
    ]
    assert stream.place(13) == index.place(13)


def test_tensorflow_is_asked_for(bridge, data_config, structure, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    config = data_config(("bridge_dataset", bridge, 1.0), reader="stream")
    with pytest.raises(errors.DataError, match=r"pip install .*data"):
        open_datasets(config, structure(), 7, "train")


class Trajectories:
    """What dlimp gives: one dict a trajectory, one entry a step, images still encoded."""

    def __init__(self, folder, change=lambda t, i: t, order=None):
        self.folder, self.change, self.order = folder, change, order

    def __iter__(self):
        builder = tfds.builder_from_directory(str(self.folder))
        skip = {"steps": tfds.decode.SkipDecoding()}
        results = [e["steps"] for e in builder.as_dataset(split="train", decoders=skip)]
        for number in self.order or range(len(results)):
            yield self.change(results[number], number)


def test_given_trajectories_equal_the_files(bridge, data_config, structure):
    shape, config = structure(), data_config(("bridge_dataset", bridge, 1.0))
    index = open_datasets(config, shape, 7, "train")
    inputs = {"bridge_dataset": Trajectories(bridge)}
    stream = open_datasets(config, shape, 7, "train", trajectories=inputs)
    assert stream.statistics == index.statistics
    expected = rows(index, 99, shuffle=False, pad_last=True)
    assert rows(stream, 99, shuffle=False, pad_last=True) == expected
    one_pass = rows(stream, index.num_windows, size=1)
    assert Counter(one_pass) == Counter(rows(index, 999, size=1, shuffle=False))


def test_dlimp_itself_equals_the_files(bridge, data_config, structure):
    dlimp = pytest.importorskip("dlimp")
    builder = tfds.builder_from_directory(str(bridge))
    dataset = dlimp.DLataset.from_rlds(builder, split="train", shuffle=False)
    shape, config = structure(), data_config(("bridge_dataset", bridge, 1.0))
    index = open_datasets(config, shape, 7, "train")
    inputs = {"bridge_dataset": dataset}
    stream = open_datasets(config, shape, 7, "train", trajectories=inputs)
    assert stream.statistics == index.statistics
    expected = rows(index, 99, shuffle=False, pad_last=True)
    assert rows(stream, 99, shuffle=False, pad_last=True) == expected


def test_tf_data_and_transforms_are_taken(bridge, data_config, structure, tmp_path):
    # A transform in TensorFlow that also decodes, and trajectories that are alike.
    def build():
        for steps in Trajectories(bridge):
            yield steps["action"], steps["observation"]["state"], steps["observation"]["image_0"]

    kinds = [tf.float32, tf.float32, tf.string]
    signature = tuple(
        tf.TensorSpec([None, 7], k) if k == tf.float32 else tf.TensorSpec([None], k) for k in kinds
    )
    dataset = tf.data.Dataset.from_generator(build, output_signature=signature)

    def change(action, state, image):
        pixels = tf.map_fn(tf.io.decode_jpeg, image, fn_output_signature=tf.uint8)
        length = tf.shape(action)[0]
        return {
            "observation": {"image_0": pixels, "state": state},
            "action": action,
            "language_instruction": tf.fill([length], "wave"),
            "_len": length,
        }

    dataset = dataset.map(change)
    dataset = dataset.concatenate(dataset.take(1))
    config = data_config(("bridge_dataset", "unused", 1.0), val_fraction=0.0)
    mixture = open_datasets(
        config, structure(window=1), 7, "train", trajectories={"bridge_dataset": dataset}
    )
    assert mixture.instructions == ["wave"]
    assert mixture.image_sizes == {"primary": (64, 64)}
    assert mixture.num_windows == 5 * 9
    index = open_index(bridge, "train", ["steps/action"], str(tmp_path))
    (batch,) = _take(mixture, 1)
    expected = decode(index.read("steps/observation/image_0", 0, 0)[0])
    np.testing.assert_array_equal(batch.observation.images["primary"][0, 0], expected)
    assert len(rows(mixture, 99, size=1)) == 99


def _take(mixture, count):
    with Loader(mixture, encode, 4, 0, shuffle=False) as loader:
        return [next(loader) for _ in range(count)]


def test_given_trajectories_may_change_their_order_but_not_themselves(
    bridge, data_config, structure
):
    config, shape = data_config(("bridge_dataset", bridge, 1.0), val_fraction=0.0), structure()
    ordered = Trajectories(bridge)
    mixture = open_datasets(config, shape, 7, "train", trajectories={"bridge_dataset": ordered})
    expected = rows(mixture, 99, shuffle=False, pad_last=True)
    ordered.order = [2, 0, 3, 1]
    assert rows(mixture, 99, shuffle=False, pad_last=True) == expected

    def shaken(steps, number):
        return {**steps, "action": steps["action"] + np.float32(number == 2)}

    ordered.change = shaken
    with pytest.raises(errors.DataError, match="must not change"):
        rows(mixture, 99, shuffle=False)
    with pytest.raises(errors.DataError, match="iterable more than once"):
        open_datasets(config, shape, 7, "train", trajectories={"bridge_dataset": iter([])})
    with pytest.raises(ConfigError, match=r"given for \['bridge'\]; the datasets are \['bridge_d"):
        open_datasets(config, shape, 7, "train", trajectories={"bridge": ordered})
