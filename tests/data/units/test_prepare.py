"""What was recorded stays as it is; model units are made of it once."""

import dataclasses

import numpy as np
import pytest

from tests.data.conftest import write_calvin
from vla_jax.data import oxe
from vla_jax.data.dataset import Dataset, Prepared
from vla_jax.data.open_dataset import open_dataset
from vla_jax.data.units.measure import fitted, measure, measure_chunks
from vla_jax.data.units.prepare import choose_units, prepare

LENGTHS = [7, 3, 11]


@pytest.fixture
def recorded(tmp_path):
    folder = write_calvin(tmp_path / "c" / "1.0.0", LENGTHS, idle=[(2, 2, 9)])
    cache = str(tmp_path / "cache")
    return open_dataset(
        "calvin", oxe.SPECS["calvin"], folder, "train", ["primary"], 7, cache_dir=cache
    )


def units_of(recorded, config, structure):
    statistics = fitted("calvin", measure([recorded], 7, None, config), 7, structure.proprio)
    return choose_units("calvin", statistics, recorded.spec, structure, config)


def test_preparing_leaves_the_recording_alone(recorded, data_config, structure):
    actions, states = recorded.actions.copy(), recorded.proprio.copy()
    config = data_config(("calvin", "unused", 1.0), cache_dir="", gripper="exact")
    units = units_of(recorded, config, structure(proprio=15))
    prepared = prepare(recorded, units)
    assert isinstance(prepared, Prepared)
    np.testing.assert_array_equal(recorded.actions, actions)
    np.testing.assert_array_equal(recorded.proprio, states)
    np.testing.assert_array_equal(prepared.actions[:, :6], units.action.normalize(actions)[:, :6])
    assert units.state is not None
    np.testing.assert_array_equal(prepared.proprio, units.state.normalize(states))
    assert prepared.digest == recorded.digest
    # Twice gives the same, because it begins with what was recorded.
    np.testing.assert_array_equal(prepare(recorded, units).actions, prepared.actions)


def test_arrays_refuse_to_be_written(recorded, data_config, structure):
    config = data_config(("calvin", "unused", 1.0), cache_dir="")
    prepared = prepare(recorded, units_of(recorded, config, structure()))
    for array in (recorded.actions, recorded.proprio, recorded.starts, prepared.actions):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        recorded.actions = prepared.actions
    assert prepared.proprio is None  # the model takes no states


def test_units_that_take_the_state_wait_for_the_window(recorded, data_config, structure):
    config = data_config(
        ("calvin", "unused", 1.0), cache_dir="", units="openpi_zscore", relative=(1, -6)
    )
    statistics = measure_chunks(measure([recorded], 7, None, config), recorded, 2, config)
    units = choose_units("calvin", statistics, recorded.spec, structure(chunk=2), config)
    prepared = prepare(recorded, units)
    np.testing.assert_array_equal(prepared.actions, recorded.actions)
    trajectory, frames, observed = np.array([1]), np.array([[[0, 1]]]), np.array([[0]])
    chunks, states = prepared.numbers(trajectory, frames, observed)
    rows = slice(LENGTHS[0], LENGTHS[0] + 2)
    relative = recorded.actions[rows].copy()
    relative[:, 0] -= recorded.proprio[rows.start, 0]
    of = statistics["chunks"]["actions"]
    expected = (relative - of["mean"]) / (np.array(of["std"]) + 1e-6)
    np.testing.assert_allclose(chunks[0, 0], expected, atol=1e-5)
    of = statistics["chunks"]["state"]
    expected = (recorded.proprio[rows.start] - of["mean"]) / (np.array(of["std"]) + 1e-6)
    assert states is not None
    np.testing.assert_allclose(states[0, 0], expected, atol=1e-5)


def test_the_mean_action_is_in_model_units(recorded, data_config, structure):
    config = data_config(("calvin", "unused", 1.0), cache_dir="")
    prepared = prepare(recorded, units_of(recorded, config, structure()))
    np.testing.assert_allclose(prepared.mean_action(2), prepared.actions.mean(0), rtol=1e-5)
    assert prepared.gripper_middle == 0.5


def test_the_mean_action_of_chunks_is_that_of_their_windows(recorded, data_config, structure):
    config = data_config(
        ("calvin", "unused", 1.0), cache_dir="", units="openpi_quantile", relative=(1, -6)
    )
    statistics = measure_chunks(measure([recorded], 7, None, config), recorded, 2, config)
    units = choose_units("calvin", statistics, recorded.spec, structure(chunk=2), config)
    prepared = prepare(recorded, units)
    rows = []
    for trajectory, length in enumerate(LENGTHS):
        for first in range(length):
            frames = np.array([[[first, min(first + 1, length - 1)]]])
            chunks, _ = prepared.numbers(np.array([trajectory]), frames, frames[:, :, 0])
            rows += list(chunks[0, 0, : length - first])
    np.testing.assert_allclose(prepared.mean_action(2), np.mean(rows, 0), atol=1e-5)
    assert abs(prepared.mean_action(2) - recorded.actions.mean(0)).max() > 0.1
    # A gripper of 0 and 1 becomes one of about -1 and 1.
    assert prepared.gripper_middle == pytest.approx(0, abs=1e-3)


def test_leaving_out_idle_frames_gives_another_dataset(recorded):
    moving = recorded.without_idle(1e-4, 2)
    assert isinstance(moving, Dataset)
    assert recorded.may_end is None
    assert moving.may_end is not None
    assert moving.may_end.sum() < len(recorded)
    assert moving.actions is recorded.actions
    assert moving.digest != recorded.digest
    assert len(moving.windows(3, True, False)) == moving.may_end.sum()
