import json

import numpy as np
import pytest

from vla_jax.data import records, stats
from vla_jax.data.loader import open_datasets


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
    found = mixture.statistics["bridge_dataset"]
    assert found["num_trajectories"] == 4
    assert found["num_transitions"] == len(actions) == 36
    for key, values in (("action", actions), ("proprio", proprio)):
        values = np.array(values, np.float32)
        assert found[key]["q01"] == np.quantile(values, 0.01, axis=0).tolist()
        assert found[key]["q99"] == np.quantile(values, 0.99, axis=0).tolist()
        assert found[key]["min"] == values.min(axis=0).tolist()
        assert found[key]["max"] == values.max(axis=0).tolist()
        assert found[key]["mean"] == values.mean(axis=0, dtype=np.float64).tolist()
        assert found[key]["std"] == values.std(axis=0, dtype=np.float64).tolist()
    assert found["action"]["mask"] == [True] * 6 + [False]


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
    found = stats.statistics(many, None, 1)["action"]
    assert found["mean"][0] == 1.0
    assert found["mean"][1] == pytest.approx(np.float32(0.1), abs=1e-12)


def test_save_and_load(tmp_path):
    found = {"x": stats.statistics(np.eye(7, dtype=np.float32), None, 2)}
    stats.save(tmp_path / "dataset_statistics.json", found)
    assert stats.load(tmp_path / "dataset_statistics.json") == found
    assert [p.name for p in tmp_path.iterdir()] == ["dataset_statistics.json"]
    json.dumps(found)
