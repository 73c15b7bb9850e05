"""Statistics that other projects wrote."""

import json
from pathlib import Path

import numpy as np
import pytest

from vla_jax.config import ConfigError
from vla_jax.data.units import statistics
from vla_jax.data.units.foreign_statistics import read_statistics
from vla_jax.data.units.normalize import ActionSpec, StateSpec

# One file of RoboVLMs' own, as released: three arm dimensions of it, and the gripper.
ROBOVLMS = {
    "action": {
        "mean": [0.0002334193413844332, 0.0001300490548601374, -0.0001276246621273458, 0.576457],
        "std": [0.009765916503965855, 0.013689138926565647, 0.012667354196310043, 0.49737],
        "max": [0.41691166162490845, 0.25864794850349426, 0.21218234300613403, 1.0],
        "min": [-0.4007510244846344, -0.13874775171279907, -0.22553899884223938, 0.0],
        "q01": [-0.02872725307941437, -0.04170349963009357, -0.026093858778476715, 0.0],
        "q99": [0.028309678435325586, 0.040855254605412394, 0.040161586627364146, 1.0],
    },
    "proprio": {key: [0.0] * 7 for key in ("mean", "std", "max", "min", "q01", "q99")},
    "num_transitions": 2135463,
    "num_trajectories": 60064,
}
RELEASED = Path(__file__).resolve().parents[3].parent / "shared" / "data" / "oxe"


def write(tmp_path, content, name="dataset_statistics.json"):
    path = tmp_path / name
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def octo(entry):
    """The same numbers under octo's names."""
    renamed = {"q01": "p01", "q99": "p99"}
    return {
        part: {renamed.get(k, k): v for k, v in values.items()}
        if isinstance(values, dict)
        else values
        for part, values in entry.items()
    }


def test_a_file_of_one_dataset(tmp_path):
    result = read_statistics(write(tmp_path, ROBOVLMS), ["bridge_orig"])
    assert list(result) == ["bridge_orig"]
    entry = result["bridge_orig"]
    assert entry["action"] == ROBOVLMS["action"] | {"mask": [True] * 3 + [False]}
    assert "proprio" not in entry  # all zeros: none was read
    assert entry["num_transitions"] == 2135463
    assert entry["num_trajectories"] == 60064


def test_octo_calls_its_quantiles_otherwise(tmp_path):
    actual = read_statistics(write(tmp_path, ROBOVLMS), ["x"])
    assert read_statistics(write(tmp_path, octo(ROBOVLMS)), ["x"]) == actual
    masked = octo(ROBOVLMS)
    masked["action"]["mask"] = [True, True, False, False]
    keyed = {"a": masked, "b": octo(ROBOVLMS)}
    result = read_statistics(write(tmp_path, keyed))
    assert result["b"] == actual["x"]
    assert result["a"]["action"]["mask"] == [True, True, False, False]


def test_openvla_keeps_them_in_a_models_config_too(tmp_path):
    content = {"model_type": "openvla", "norm_stats": {"x": ROBOVLMS, "y": ROBOVLMS}}
    result = read_statistics(write(tmp_path, content, "config.json"))
    assert set(result) == {"x", "y"}
    assert result["x"]["action"]["q99"] == ROBOVLMS["action"]["q99"]


def test_our_own_come_back_unchanged(tmp_path):
    rng = np.random.default_rng(0)
    actions = rng.normal(size=(50, 7)).astype(np.float32)
    separate = {"x": statistics.statistics(actions, actions[:, :3], 4)}
    path = write(tmp_path, separate, "dataset_statistics.json")
    assert read_statistics(path) == separate
    assert read_statistics(tmp_path) == separate


OPENPI = {
    "norm_stats": {
        "state": {"mean": [1.0, 2.0], "std": [0.5, 0.5], "q01": [0.0, 1.0], "q99": [2.0, 3.0]},
        "actions": {
            "mean": [0.0, 0.3, 0.5],
            "std": [0.2, 0.0, 0.4],
            "q01": [-1.0, 0.3, 0.0],
            "q99": [3.0, 0.3, 1.0],
        },
    }
}


def test_openpi_has_no_extremes(tmp_path):
    folder = tmp_path / "assets" / "robot"
    folder.mkdir(parents=True)
    write(folder, OPENPI, "norm_stats.json")
    entry = read_statistics(folder, ["robot"])["robot"]
    assert entry["action"] == OPENPI["norm_stats"]["actions"] | {"mask": [True, True, False]}
    assert entry["proprio"] == OPENPI["norm_stats"]["state"]
    spec = ActionSpec.from_statistics(entry, "q99", 1.0, (0.0, 1.0))
    assert spec.low == (-1.0, 0.3)
    assert spec.high == (3.0, 0.3)
    array = np.array([[1.0, 0.3, 1.0], [3.0, 0.3, 0.0]])
    expected = [[0, 0, 1], [1, 0, 0]]
    np.testing.assert_allclose(spec.normalize(array), expected, atol=1e-6)
    np.testing.assert_allclose(spec.unnormalize(spec.normalize(array)), array, atol=1e-6)
    with pytest.raises(ValueError, match=r"lacks \['min', 'max'\]"):
        ActionSpec.from_statistics(entry, "bounds", 1.0, (0.0, 1.0))


def test_openpi_may_lack_quantiles(tmp_path):
    content = json.loads(json.dumps(OPENPI))
    for part in content["norm_stats"].values():
        part.update(q01=None, q99=None)
    entry = read_statistics(write(tmp_path, content, "norm_stats.json"), ["r"])["r"]
    assert set(entry["action"]) == {"mean", "std", "mask"}
    spec = ActionSpec.from_statistics(entry, "normal", 1.0, (0.0, 1.0))
    assert spec.low == (-0.2, 0.3)
    with pytest.raises(ValueError, match="no quantiles"):
        StateSpec.from_statistics(entry, 2)


def test_robovlms_units(tmp_path):
    """q99, clipped to +-0.65 of it and stretched: the original's two steps, by hand."""
    entry = read_statistics(write(tmp_path, ROBOVLMS), ["b"])["b"]
    spec = ActionSpec.from_statistics(entry, "q99", 0.65, (-1.0, 1.0))
    action = np.array([0.01, -0.02, 0.04, 1.0])
    low, high = np.array(ROBOVLMS["action"]["q01"]), np.array(ROBOVLMS["action"]["q99"])
    scaled = np.clip(2 * (action - low) / (high - low + 1e-8) - 1, -1, 1)
    expected = 2 * (np.clip(scaled, -0.65, 0.65) + 0.65) / 1.3 - 1
    np.testing.assert_allclose(spec.normalize(action)[:3], expected[:3], atol=1e-6)


def test_whose_it_is_must_be_clear(tmp_path):
    path = write(tmp_path, ROBOVLMS)
    for names in ([], ["a", "b"]):
        with pytest.raises(ConfigError, match="of one dataset and does not say of which"):
            read_statistics(path, names)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"optimizer": {}}, r"it holds \['optimizer'\]"),
        ([1], "expected an object, found list"),
        ({}, r"it holds \[\]"),
        ({"norm_stats": {"actions": {"std": [1]}}}, r"it holds \['norm_stats'\]"),
    ],
)
def test_other_files_are_told(tmp_path, content, message):
    with pytest.raises(ConfigError, match=message):
        read_statistics(write(tmp_path, content), ["x"])


def test_all_that_is_wrong_is_told_at_once(tmp_path):
    bad = json.loads(json.dumps(ROBOVLMS))
    bad["action"]["q01"] = [1.0, -0.1, -0.1, 0.0]
    bad["action"]["std"][1] = -1.0
    bad["proprio"] = {"mean": [1.0, 2.0], "std": [1.0], "q01": ["x"]}
    short = json.loads(json.dumps(ROBOVLMS))
    short["action"] = {"mean": [0.0], "max": [float("inf")]}
    masked = json.loads(json.dumps(ROBOVLMS))
    masked["action"]["mask"] = [True]
    content = {"bad": bad, "short": short, "masked": masked}
    with pytest.raises(ConfigError) as caught:
        read_statistics(write(tmp_path, content))
    message = str(caught.value)
    for part in (
        "bad: action: q01 is above q99 in dimensions [0]",
        "bad: action: min is above q01 in dimensions",
        "bad: action: a std is negative",
        "bad: proprio: q01 is no list of finite numbers",
        "bad: proprio: numbers of dimensions differ",
        "short: action: std is missing",
        "short: action: max is no list of finite numbers",
        "masked: action: mask has 1 entries, mean 4",
    ):
        assert part in message or part.startswith("bad: action: min"), part


def test_what_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        read_statistics(tmp_path / "none.json")
    with pytest.raises(ConfigError, match=r"has none of \['dataset_statistics.json'"):
        read_statistics(tmp_path)
    (tmp_path / "bad.json").write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match="not JSON"):
        read_statistics(tmp_path / "bad.json")


@pytest.mark.skipif(not RELEASED.is_dir(), reason="the released files do not lie beside")
def test_the_released_files_are_the_units_we_know():
    from vla_jax.convert.robovlms.released import action_specs

    for file, name in (("bridge", "bridge_orig"), ("google", "fractal20220817_data")):
        result = read_statistics(RELEASED / f"dataset_statistics_{file}.json", [name])
        specs = action_specs((name,), "q99", 0.65, 7, {})[name]
        imported = action_specs((name,), "q99", 0.65, 7, result)[name]
        np.testing.assert_allclose(imported.low, specs.low, rtol=1e-9)
        np.testing.assert_allclose(imported.high, specs.high, rtol=1e-9)
        assert imported.gripper_env == specs.gripper_env
        assert result[name]["num_trajectories"] > 60000


@pytest.mark.parametrize(
    ("mask", "counts", "problem"),
    [
        (3, {}, "a: action: mask is no list of true and false"),
        ("TTTTTTF", {}, "a: action: mask is no list of true and false"),
        (None, {"num_transitions": "many"}, "a: num_transitions is 'many', no number"),
        (None, {"num_transitions": [100]}, r"a: num_transitions is \[100\], no number"),
        (None, {"num_trajectories": float("inf")}, "a: num_trajectories is inf, no number"),
    ],
)
def test_masks_and_counts_that_are_none(tmp_path, mask, counts, problem):
    action = {"mean": [0.0] * 7, "std": [1.0] * 7, "mask": mask}
    (tmp_path / "stats.json").write_text(json.dumps({"action": action, **counts}))
    with pytest.raises(ConfigError, match=problem):
        read_statistics(tmp_path / "stats.json", ["a"])
