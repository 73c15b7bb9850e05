import shutil

import numpy as np

from vla_jax.data.units.normalize import ActionSpec
from vla_jax.inference import provenance
from vla_jax.inference.execution import Execution

SPEC = ActionSpec(3, "q99", 0.65, (-1.0, 0.0), (1.0, 0.5), (-1.0, 1.0), gripper_patience=2)


def test_a_hash_is_of_names_and_contents_wherever_they_lie(tmp_path):
    for name in ("params", "meta"):
        (tmp_path / "7" / name / "d").mkdir(parents=True)
        (tmp_path / "7" / name / "d" / "array").write_bytes(name.encode() * 1000)

    def digest(step):
        return provenance.hash_folders(tmp_path / step / "params", tmp_path / step / "meta")

    first = digest("7")
    assert len(first) == 16
    shutil.copytree(tmp_path / "7", tmp_path / "8")
    assert digest("8") == first
    array = tmp_path / "8" / "params" / "d" / "array"
    array.write_bytes(array.read_bytes()[:-1] + b"x")
    assert digest("8") != first
    array.unlink()
    shutil.copy(tmp_path / "7" / "params" / "d" / "array", tmp_path / "8" / "params" / "array")
    assert digest("8") != first  # the same bytes under another name


def test_statistics_hash_whatever_the_order_of_their_keys():
    single = provenance.hash_json({"a": [1.0, 2.0], "b": {"c": 1}})
    assert single == provenance.hash_json({"b": {"c": 1}, "a": [1.0, 2.0]})
    assert single != provenance.hash_json({"a": [1.0, 2.5], "b": {"c": 1}})


def test_what_a_server_says():
    statistics = {"action": {"mean": [0.1, 0.2, 0.7]}}
    message = provenance.describe("ab", SPEC, statistics, False, Execution("receding", 3))
    assert message["checkpoint"] == "ab"
    assert message["action"] == {
        "normalization": "q99",
        "clip": 0.65,
        "low": [-1.0, 0.0],
        "high": [1.0, 0.5],
        "gripper_repeat": 0,
        "gripper_patience": 2,
        "gripper_open": 0.7,
    }
    assert (message["horizon"], message["untrained"]) == (3, False)
    unknown = provenance.describe("ab", SPEC, {}, True, Execution())
    assert unknown["action"]["gripper_open"] is None
    assert np.isfinite(unknown["decay"])
