"""What opening the datasets of a run finds, and what it refuses."""

from typing import Any

import numpy as np
import pytest

from tests.data.conftest import write_calvin
from tests.data.test_loader import take
from vla_jax.config import ConfigError
from vla_jax.data import errors
from vla_jax.data.loader import open_datasets


def test_trajectories_without_text_are_dropped(tmp_path, data_config, structure, caplog):
    folder = write_calvin(tmp_path / "c" / "1.0.0", [4, 5, 6], texts=["a", "", "b"])
    config = data_config(("calvin", folder, 1.0), val_fraction=0.0)
    with caplog.at_level("INFO"):
        mixture = open_datasets(config, structure(), 7, "train")
    assert mixture.num_windows == 10
    assert mixture.instructions == ["a", "b"]
    assert "calvin: 1 of 3 trajectories have no text" in caplog.text
    silent = write_calvin(tmp_path / "silent" / "1.0.0", [4], texts=[""])
    with pytest.raises(errors.DataError, match="no trajectory is left: 1 have no text"):
        open_datasets(
            data_config(("calvin", silent, 1.0), val_fraction=0.0), structure(), 7, "train"
        )


def test_mixture_of_two(calvin, bridge, tmp_path, data_config, structure):
    small = write_calvin(tmp_path / "small" / "1.0.0", [9, 4], seed=1, size=20)
    entries = [("calvin", calvin, 1.0), ("bridge_dataset", bridge, 0.5), ("calvin", small, 2.0)]
    config = data_config(*entries, val_fraction=0.0, block=512)
    with pytest.raises(errors.DataError, match=r"'calvin-2': \(20, 20\)}; pass image_size"):
        open_datasets(config, structure(), 7, "train")
    mixture = open_datasets(config, structure(), 7, "train", image_size=(32, 32))
    assert mixture.names == ["calvin", "bridge_dataset", "calvin-2"]
    assert mixture.sizes == [26, 36, 13]
    assert list(mixture.action_specs) == mixture.names
    assert mixture.action_specs["bridge_dataset"].hz == 5
    batches = take(mixture, 64)
    counts = np.bincount(np.concatenate([b.dataset for b in batches]), minlength=3)
    shares = np.array([26, 18, 26]) / 70
    assert np.abs(counts - 512 * shares).max() < 2
    assert batches[0].observation.images["primary"].shape[2:] == (32, 32, 3)


def test_validation_split_of_the_builder_and_train_statistics(tmp_path, data_config, structure):
    folder = write_calvin(tmp_path / "c" / "1.0.0", [4, 6], splits=("train", "val"))
    config = data_config(("calvin", folder, 1.0))
    train = open_datasets(config, structure(), 7, "train")
    val = open_datasets(config, structure(), 7, "val", statistics=train.statistics)
    assert train.num_windows == val.num_windows == 10
    for split, mixture in (("train", train), ("val", val)):
        source: Any = mixture.datasets[0].source
        assert source.split == split
    assert val.action_specs == train.action_specs
    assert open_datasets(config, structure(), 7, "val").statistics == train.statistics
    with pytest.raises(ConfigError, match=r"lack \['calvin'\]; they have \['bridge'\]"):
        open_datasets(config, structure(), 7, "val", statistics={"bridge": {}})


def test_held_out_trajectories_are_not_trained_on(calvin, data_config, structure):
    config = data_config(("calvin", calvin, 1.0), val_fraction=0.05)
    train = open_datasets(config, structure(), 7, "train")
    val = open_datasets(config, structure(), 7, "val")
    assert train.datasets[0].lengths.tolist() == [7, 3, 11]
    assert val.datasets[0].lengths.tolist() == [5]


def test_errors_of_the_config_are_all_listed(calvin, data_config, structure):
    config = data_config(
        ("calvn", calvin, 1.0), ("bridge_dataset", calvin, 1.0), ("x", calvin, 1.0)
    )
    with pytest.raises(ConfigError, match=r"datasets\[0\].*'calvin'(.|\n)*datasets\[2\]"):
        open_datasets(config, structure(), 7, "train")
    config = data_config(("bridge_dataset", calvin, 1.0))
    with pytest.raises(
        errors.FeatureError, match=r"no camera 'primary'.*no feature 'observation/st"
    ):
        open_datasets(config, structure(), 7, "train")


def test_missing_camera_lists_the_cameras(bridge, data_config, structure):
    config = data_config(("bridge_dataset", bridge, 1.0))
    with pytest.raises(
        errors.MissingCameraError, match=r"no camera 'wrist'; its cameras are .*image_0"
    ):
        open_datasets(config, structure(cameras=("primary", "wrist")), 7, "train")


def test_wrong_action_dimension(bridge, data_config, structure):
    with pytest.raises(errors.FeatureError, match="7 dimensions, the model 8"):
        open_datasets(data_config(("bridge_dataset", bridge, 1.0)), structure(), 8, "train")


def test_images_of_unknown_size_are_measured(calvin, data_config, structure):
    path = calvin / "features.json"
    path.write_text(path.read_text().replace('"24"', '"-1"'))
    config = data_config(("calvin", calvin, 1.0), val_fraction=0.0)
    mixture = open_datasets(config, structure(), 7, "train")
    assert mixture.image_sizes == {"primary": (24, 24)}


def test_states_that_do_not_fit_the_model(calvin, data_config, structure):
    config = data_config(("calvin", calvin, 1.0), normalization="none", val_fraction=0.0)
    with pytest.raises(ConfigError, match="recorded state has 15 numbers, the model takes 4"):
        open_datasets(config, structure(proprio=4), 7, "train")
