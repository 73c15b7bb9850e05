"""SmolVLA in and out, to the bit."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from configs import smolvla
from configs.tiny import ARCHS
from tests import arrays
from vla_jax.config import ConfigError, resolve
from vla_jax.convert.importing import shapes_of
from vla_jax.convert.lerobot import names
from vla_jax.convert.lerobot.exporting import to_lerobot
from vla_jax.convert.lerobot.importing import from_lerobot
from vla_jax.convert.store import Stored
from vla_jax.data.units.policy_units import PolicyUnits
from vla_jax.models import vla
from vla_jax.models.weights import WeightError


def raw_config() -> dict[str, Any]:
    c = smolvla.get_config("tiny:none")
    arch = dict(ARCHS["smolvlm"])
    arch["text_config"] = {**arch["text_config"], "num_hidden_layers": 2, "rope_theta": 10000.0}
    c.model.backbone.arch = arch
    c.model.expert.update({"width": 24, "hidden": 256})
    return c.to_dict()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    model: Any = vla.build(resolve(raw_config()).model)
    rng = np.random.default_rng(0)
    ours = {k: rng.normal(size=s).astype(np.float32) for k, s in shapes_of(model).items()}
    reference: dict[str, np.ndarray] = {}
    for row in names.rows(model):
        reference |= arrays.to_theirs(row, ours)
    out = tmp_path_factory.mktemp("smolvla")
    save_file(reference, out / "model.safetensors")
    return out


def test_round_trip(folder, tmp_path):
    statistics = {
        key: {"mean": [0.5] * 6, "std": [2.0] * 6} for key in ("observation.state", "action")
    }
    (tmp_path / "stats.json").write_text(json.dumps(statistics))
    imported = from_lerobot(folder, raw_config(), statistics=tmp_path / "stats.json")
    imported.save(tmp_path / "run", overwrite=False)
    to_lerobot(Stored(tmp_path / "run"), tmp_path / "out")
    assert "import-lerobot" in (tmp_path / "out/README.md").read_text()
    single, two = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "out"))
    assert single.keys() == two.keys()
    for name in single:
        np.testing.assert_array_equal(single[name], two[name], err_msg=name)
    units = PolicyUnits.from_json(imported.meta["units"]["tiny"])
    np.testing.assert_allclose(units.actions.normalize(np.full(6, 2.5)), 1.0)


def test_layers_alternate(folder):
    """The cross layers' keys are made of the VLM's keys, not of the expert's tokens."""
    imported = from_lerobot(folder, raw_config())
    kinds = [imported.leaves[f"expert/layers/block{i}/attn/k/kernel"].shape for i in (0, 1)]
    assert kinds[0][1] == 24
    assert kinds[1][1] != 24


def test_mistakes_are_named(folder, tmp_path):
    with pytest.raises(WeightError, match=r"no model\.safetensors"):
        from_lerobot(tmp_path, raw_config())
    save_file({"x": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightError, match="not SmolVLA's"):
        from_lerobot(tmp_path, raw_config())
    (tmp_path / "stats.json").write_text("{}")
    with pytest.raises(ConfigError, match="needs"):
        from_lerobot(folder, raw_config(), statistics=tmp_path / "stats.json")


def exported(folder: Path, tmp_path: Path, statistics: dict[str, Any] | None, **units: Any) -> Path:
    """Imported with statistics and, if given, other units, and exported again."""
    raw = raw_config()
    raw["data"] |= units
    path = tmp_path / "stats.json"
    path.write_text(json.dumps(statistics))
    imported = from_lerobot(folder, raw, statistics=path if statistics else None)
    imported.save(tmp_path / "run", overwrite=False)
    to_lerobot(Stored(tmp_path / "run"), tmp_path / "out")
    return tmp_path / "out"


def test_lerobot_finds_what_it_asks_for(folder, tmp_path):
    """Its config and processors; the statistics come back without being named."""
    statistics = {
        key: {"mean": [0.5, 1, 2, 3, 4, 5], "std": [2.0] * 6}
        for key in ("observation.state", "action")
    }
    out = exported(folder, tmp_path, statistics)
    config = json.loads((out / "config.json").read_text())
    assert config["type"] == "smolvla"
    assert config["normalization_mapping"]["ACTION"] == "MEAN_STD"
    assert config["expert_width_multiplier"] == 24 / ARCHS["smolvlm"]["text_config"]["hidden_size"]
    cameras = [k for k, v in config["input_features"].items() if v["type"] == "VISUAL"]
    assert cameras == ["observation.images.primary", "observation.images.wrist"]
    steps = json.loads((out / "policy_preprocessor.json").read_text())["steps"]
    assert steps[-1]["registry_name"] == "normalizer_processor"
    again = from_lerobot(out, raw_config())
    units = PolicyUnits.from_json(again.meta["units"]["tiny"])
    assert units.actions.first == (0.5, 1, 2, 3, 4, 5)
    assert again.meta["origin"]["config"] == config


def test_units_that_lerobot_lacks_are_said(folder, tmp_path, caplog):
    ends = {key: {"q01": [0.0] * 6, "q99": [1.0] * 6} for key in ("observation.state", "action")}
    out = exported(folder, tmp_path, ends, units="openvla_quantile")
    assert "does not scale as openvla_quantile" in caplog.text
    assert not (out / "policy_preprocessor.json").exists()


def test_an_expert_that_lerobot_cannot_make_is_refused(tmp_path):
    raw = raw_config()
    raw["model"]["expert"]["hidden"] = 16
    model: Any = vla.build(resolve(raw).model)
    ours = {k: np.ones(s, np.float32) for k, s in shapes_of(model).items()}
    reference: dict[str, np.ndarray] = {}
    for row in names.rows(model):
        reference |= arrays.to_theirs(row, ours)
    save_file(reference, tmp_path / "model.safetensors")
    from_lerobot(tmp_path, raw).save(tmp_path / "run", overwrite=False)
    with pytest.raises(ConfigError, match="width 24 with 256, this one has 16"):
        to_lerobot(Stored(tmp_path / "run"), tmp_path / "out")
