"""Data behind URLs: the same batches as from a disk, read by ranges of bytes."""

import shutil

import jax
import numpy as np
import pytest

from bench.range_server import RangeServer
from tests.data.look_alikes import write_lerobot
from tests.data.test_loader import encode
from vla_jax.data import places
from vla_jax.data.errors import DataError
from vla_jax.data.lerobot.source import open_lerobot
from vla_jax.data.loader import Loader
from vla_jax.data.mixture import open_datasets
from vla_jax.data.places import RemoteFile, data_path, is_remote

pytest.importorskip("aiohttp")
COLUMNS = ["steps/action", "steps/language_instruction"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture
def served(tmp_path, bridge):
    folder = tmp_path / "served"
    shutil.copytree(bridge, folder / "bridge_dataset/1.0.0")
    with RangeServer(folder) as server:
        yield server, folder


def batches(where, data_config, structure, count=4, **options):
    config = data_config(("bridge_dataset", where, 1.0), normalization="none", val_fraction=0.0)
    mixture = open_datasets(config, structure(window=2), 7, "train")
    with Loader(mixture, encode, 8, 3, **options) as loader:
        return [next(loader) for _ in range(count)], loader.state()


def assert_equal(ours, expected):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def test_rlds_gives_the_batches_of_the_disk(served, bridge, tmp_path, data_config, structure):
    server, folder = served
    url = f"{server.url}/bridge_dataset/1.0.0"
    expected, position = batches(bridge, data_config, structure)
    ours, same_position = batches(url, data_config, structure)
    assert_equal(ours, expected)
    assert same_position == position  # so that a run of one place goes on with the other
    resumed, _ = batches(url, data_config, structure, 2, start={**position, "samples": 16})
    assert_equal(resumed, expected[2:])
    assert sorted(p.name for p in folder.rglob("*") if "vla_index" in p.parts) == []


def test_only_ranges_are_read_once_there_is_an_index(served, data_config, structure):
    server, folder = served
    url = f"{server.url}/bridge_dataset/1.0.0"
    batches(url, data_config, structure, 1)
    server.requests.clear()
    batches(url, data_config, structure, 1, prefetch=1)
    shards = [r for r in server.requests if "tfrecord" in r[0]]
    sizes = {p.name: p.stat().st_size for p in folder.rglob("*tfrecord*")}
    assert shards
    assert all(size < sizes[name.rpartition("/")[2]] for name, _, size in shards)


def test_an_index_that_lies_beside_the_data_is_copied(
    served, tmp_path, data_config, structure, caplog
):
    server, folder = served
    local = folder / "bridge_dataset/1.0.0"
    config = data_config(("bridge_dataset", local, 1.0), normalization="none", val_fraction=0.0)
    open_datasets(
        type(config)(**{**vars(config), "cache_dir": ""}), structure(window=2), 7, "train"
    )
    assert (local / "vla_index").is_dir()
    with caplog.at_level("INFO"):
        batches(f"{server.url}/bridge_dataset/1.0.0", data_config, structure, 1)
    assert "the index is copied from" in caplog.text
    assert "indexed in" in caplog.text
    # A shard is read front to back only to build an index.
    assert not any(size > 1 << 20 for name, _, size in server.requests if "tfrecord" in name)


def test_a_shard_that_is_replaced_is_indexed_anew(served, data_config, structure, caplog):
    server, folder = served
    url = f"{server.url}/bridge_dataset/1.0.0"
    batches(url, data_config, structure, 1)
    shard = next(folder.rglob("*tfrecord*"))
    shard.write_bytes(shard.read_bytes())  # another time: another version, for all a store knows
    with caplog.at_level("WARNING"):
        batches(url, data_config, structure, 1)
    assert "the data have changed since" in caplog.text


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_lerobot_gives_the_frames_of_the_disk(tmp_path, version):
    pytest.importorskip("av")
    folder = write_lerobot(tmp_path / "served" / "robot", version)
    expected = open_lerobot(folder, "train", COLUMNS)
    with RangeServer(tmp_path / "served") as server:
        ours = open_lerobot(f"{server.url}/robot", "train", COLUMNS)
        assert is_remote(ours.root)
        assert ours.digest == expected.digest
        for path in COLUMNS[:1]:
            np.testing.assert_array_equal(ours.low(path), expected.low(path))
        spans = ours.starts[:-1].tolist(), (ours.starts[1:] - 1).tolist()
        for camera in ours.cameras:
            for first, last in zip(*spans, strict=True):
                pairs = zip(
                    ours.read(camera, first, last), expected.read(camera, first, last), strict=True
                )
                for a, b in pairs:
                    np.testing.assert_array_equal(a, b)


def test_a_request_that_fails_is_made_again(served, monkeypatch):
    server, folder = served
    shard = next(folder.rglob("*tfrecord*"))
    file = RemoteFile(data_path(f"{server.url}/{shard.relative_to(folder)}"))
    monkeypatch.setattr(places, "_WAITS", (0.0, 0.0))
    server.failures = 2
    assert file.read(100, 50) == shard.read_bytes()[50:150]
    server.failures = 3
    with pytest.raises(OSError, match="the store does not answer: 503"):
        file.read(100, 50)


def test_a_server_that_sends_files_whole_is_refused(served):
    _, folder = served
    shard = next(folder.rglob("*tfrecord*"))
    with RangeServer(folder, takes_ranges=False) as server:
        file = RemoteFile(data_path(f"{server.url}/{shard.relative_to(folder)}"))
        with pytest.raises(OSError, match="does not send ranges"):
            file.read(100, 50)


def test_what_cannot_be_read_is_refused_in_words(served, data_config, structure):
    server, _ = served
    for url, message in (
        (f"{server.url}/nowhere", "shows none of the known formats: RLDS"),
        ("zz://bucket/data", "zz.*a folder, https://"),
    ):
        with pytest.raises(DataError, match=message):
            batches(url, data_config, structure, 1)
