import json

import numpy as np
import pytest

from vla_jax.data.loader import open_datasets
from vla_jax.data.rlds import records
from vla_jax.data.units import statistics
from vla_jax.data.units.foreign_statistics import read_statistics


def test_equal_to_numpy_on_the_raw_records_bit_for_bit(bridge, data_config, structure):
    """Independent of index and specs: parses the shard, relabels by loop, asks numpy."""
    actions, proprio = [], []
    for _, record in records.read_records(next(bridge.glob("*-train.tfrecord-*"))):
        fields = records.walk_example(record)
        language = records.byte_spans(record, fields["steps/language_instruction"])
        if language[0, 0] == language[0, 1]:
            continue
        state = records.floats(record, fields["steps/observation/state"]).reshape(-1, 7)
        raw = records.floats(record, fields["steps/action"]).reshape(-1, 7)
        for t in range(len(state) - 1):
            later = [g for g in raw[t:, 6] if g > 0.95 or g < 0.05]
            gripper = np.float32(later[0] > 0.95 if later else raw[-1, 6])
            actions.append(np.append(state[t + 1, :6] - state[t, :6], gripper))
            proprio.append(state[t])
    config = data_config(("bridge_dataset", bridge, 1.0), val_fraction=0.0)
    mixture = open_datasets(config, structure(), 7, "train")
    result = mixture.statistics["bridge_dataset"]
    assert result["num_trajectories"] == 4
    assert result["num_transitions"] == len(actions) == 36
    for key, values in (("action", actions), ("proprio", proprio)):
        values = np.array(values, np.float32)
        assert result[key]["q01"] == np.quantile(values, 0.01, axis=0).tolist()
        assert result[key]["q99"] == np.quantile(values, 0.99, axis=0).tolist()
        assert result[key]["min"] == values.min(axis=0).tolist()
        assert result[key]["max"] == values.max(axis=0).tolist()
        assert result[key]["mean"] == values.mean(axis=0, dtype=np.float64).tolist()
        assert result[key]["std"] == values.std(axis=0, dtype=np.float64).tolist()
    assert result["action"]["mask"] == [True] * 6 + [False]


def test_train_statistics_leave_out_validation(calvin, data_config, structure):
    config = data_config(("calvin", calvin, 1.0), val_fraction=0.25)
    train = open_datasets(config, structure(), 7, "train")
    val = open_datasets(config, structure(), 7, "val")
    assert train.statistics == val.statistics
    assert train.statistics["calvin"]["num_trajectories"] == 3
    assert train.statistics["calvin"]["action"]["max"][0] == np.float32(0.02)
    assert val.datasets[0].lengths.tolist() == [5]


def test_float32_means_do_not_saturate():
    # A float32 running sum of ones stops at 2**24; over many frames the mean would drift.
    many = np.ones((1 << 20, 2), np.float32)
    many[:, 1] = 0.1
    result = statistics.statistics(many, None, 1)["action"]
    assert result["mean"][0] == 1.0
    assert result["mean"][1] == pytest.approx(np.float32(0.1), abs=1e-12)


def test_cached_beside_the_index(calvin, data_config, structure):
    def opened(**changes):
        config = data_config(("calvin", calvin, 1.0), cache_dir="", **changes)
        return open_datasets(config, structure(), 7, "train").statistics

    def files():
        return sorted((calvin / "vla_index").glob("*-statistics-*.json"))

    measured = opened(val_fraction=0.0)
    (file,) = files()
    assert read_statistics(file) == measured
    assert [p.name for p in file.parent.iterdir() if p.is_file()] == [file.name]  # no leftovers
    marked = json.loads(file.read_text())
    marked["calvin"]["action"]["mean"][0] = 7.0
    file.write_text(json.dumps(marked))
    assert opened(val_fraction=0.0) == marked  # read, not measured
    assert (
        opened(val_fraction=0.25)["calvin"]["num_trajectories"] == 3
    )  # another part, another file
    assert len(files()) == 2
    assert opened(val_fraction=0.0, index="rebuild") == measured
    file.write_text(file.read_text()[:40])
    assert opened(val_fraction=0.0) == measured
    assert read_statistics(file) == measured


def test_uncached_where_nothing_may_be_written(tmp_path):
    numbers = np.random.default_rng(0).normal(size=(9, 7)).astype(np.float32)
    (tmp_path / "file").write_text("")
    mask = [True] * 6 + [False]
    result = statistics.cached_statistics(
        "x", numbers, None, 3, mask, None, str(tmp_path / "file" / "below")
    )
    assert result == statistics.statistics(numbers, None, 3)
