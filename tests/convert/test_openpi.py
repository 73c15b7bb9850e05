"""openpi's checkpoints in and out: both forms of Orbax leaves, the torch file, statistics."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import pytest

from configs import base
from tests.parity import golden
from vla_jax.config import ConfigError
from vla_jax.convert.openpi.exporting import to_openpi
from vla_jax.convert.openpi.importing import from_openpi
from vla_jax.convert.openpi.source import OrbaxParams
from vla_jax.convert.store import Stored
from vla_jax.data.language.prompts import Writer
from vla_jax.data.language.tokenizer import Tokenizer
from vla_jax.data.units.policy_units import PolicyUnits
from vla_jax.models.weights import WeightError
from vla_jax.rules import unflatten

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "tests/fixtures/openpi_orbax_pi05"
TRAINED, PURE = FOLDER / "checkpoint/3", FOLDER / "checkpoint_pure_bf16"


def raw_config(**expert: Any) -> dict[str, Any]:
    sizes = golden.config(FOLDER)
    raw = base.get_config().to_dict()
    raw["data"] |= {"datasets": ({"spec": "tiny", "dir": "none"},), "units": "openpi_quantile"}
    model = raw["model"]
    model["backbone"] = {"name": "paligemma", "hf_dir": "", "arch": {}}
    model["structure"] |= {
        "kind": "expert", "window": 1, "chunk": sizes["action_horizon"], "cameras": ("primary",),
        "text_len": sizes["max_token_len"], "proprio": 7,
    }  # fmt: skip
    model["head"] |= {"kind": "expert_flow", "gripper": "number"}
    model["expert"] |= expert
    return raw


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    out = tmp_path_factory.mktemp("openpi") / "run"
    result = from_openpi(TRAINED, raw_config())
    result.save(out, overwrite=False)
    return result, out


def same(one: Path, two: Path) -> bool:
    result, expected = OrbaxParams(one), OrbaxParams(two)
    return (result.shapes, result.dtypes) == (expected.shapes, expected.dtypes) and all(
        result.read(name).tobytes() == expected.read(name).tobytes() for name in result.shapes
    )


def test_every_tensor_is_read_once(imported):
    result, _ = imported
    reference = golden.weights(FOLDER)
    assert sum(leaf.size for leaf in result.leaves.values()) == sum(
        x.size for x in reference.values()
    )
    kernel = reference["PaliGemma/llm/layers/attn/q_einsum_1/w"].transpose(0, 2, 1, 3)
    np.testing.assert_array_equal(result.leaves["expert/layers/block/attn/q/kernel"].read(), kernel)


def test_out_again_to_the_bit(imported, tmp_path):
    _, run = imported
    to_openpi(Stored(run), tmp_path / "out")
    assert same(tmp_path / "out/params", TRAINED / "params")
    assert "import-openpi" in (tmp_path / "out/README.md").read_text()
    paths = [f / "assets/tiny_asset/norm_stats.json" for f in (TRAINED,)]
    written = next((tmp_path / "out/assets").glob("*/norm_stats.json"))
    assert json.loads(written.read_text()) == json.loads(paths[0].read_text())


def test_leaves_without_value_and_bfloat16(tmp_path):
    from_openpi(PURE, raw_config()).save(tmp_path / "run", overwrite=False)
    to_openpi(Stored(tmp_path / "run"), tmp_path / "out")
    assert same(tmp_path / "out/params", PURE / "params")


def test_the_torch_file_has_the_same_parameters(imported, tmp_path):
    result, run = imported
    to_openpi(Stored(run), tmp_path / "out", "torch")
    raw = raw_config(width=16, hidden=24, padded=8)
    raw["model"]["backbone"]["arch"] = dict(result.config.model.backbone.arch)
    again = from_openpi(tmp_path / "out", raw)
    for path, leaf in result.leaves.items():
        np.testing.assert_array_equal(again.leaves[path].read(), leaf.read(), err_msg=path)


def test_the_statistics_become_units(imported):
    result, _ = imported
    units = PolicyUnits.from_json(result.meta["units"]["tiny"])
    stored = json.loads((TRAINED / "assets/tiny_asset/norm_stats.json").read_text())
    assert list(units.actions.first) == stored["norm_stats"]["actions"]["q01"]
    assert units.dim == 7


def test_the_statistics_are_those_of_the_training_here(tmp_path):
    """A model that was trained further acts by its data's, not by those it came with."""
    imported = from_openpi(TRAINED, raw_config())
    columns = {name: [float(i)] * 7 for i, name in enumerate(("mean", "std", "min", "q01", "q99"))}
    imported.meta["statistics"] = {
        "tiny": {"action": {}, "chunks": {"state": columns, "actions": columns}}
    }
    imported.save(tmp_path / "run", overwrite=False)
    to_openpi(Stored(tmp_path / "run"), tmp_path / "out")
    (written,) = (tmp_path / "out/assets").glob("*/norm_stats.json")
    assert written.parent.name == "tiny"
    actions = json.loads(written.read_text())["norm_stats"]["actions"]
    assert {name: values[0] for name, values in actions.items()} == {
        "mean": 0, "std": 1, "q01": 3, "q99": 4
    }  # fmt: skip


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ConfigError, match="adaptive"):
        from_openpi(TRAINED, raw_config(adaptive=False))
    with pytest.raises(ConfigError, match=r"no statistics of 'other'; there are \['tiny_asset'\]"):
        from_openpi(TRAINED, raw_config(), asset="other")
    with pytest.raises(WeightError, match="neither params/ nor model"):
        from_openpi(tmp_path, raw_config())
    shutil.copytree(TRAINED, tmp_path / "broken")
    (tmp_path / "broken/params/_METADATA").write_text("{}")
    with pytest.raises(WeightError):
        from_openpi(tmp_path / "broken", raw_config())


def test_openpis_own_tokenizer_travels_along(tmp_path):
    """Its sentencepiece file alone; a prompt begins once."""
    (tmp_path / "words").mkdir()
    model = ROOT / "tests/fixtures/openpi_tokenizer/tiny_tokenizer.model"
    shutil.copy(model, tmp_path / "words/paligemma_tokenizer.model")
    result = from_openpi(TRAINED, raw_config(), tmp_path / "words")
    write = Writer(Tokenizer.from_json(result.meta["tokenizer"]), 90, "", "pi05")
    ids, mask = write("open the drawer", np.zeros(7))
    assert ids[mask].tolist().count(2) == 1
    assert ids[0] == 2


# ---- pi0-FAST, the VLM alone.

FAST, WORDS = ROOT / "tests/fixtures/openpi_pi0fast", ROOT / "tests/fixtures/openpi_tokenizer"


def fast_config(**fast: Any) -> dict[str, Any]:
    raw = raw_config()
    raw["model"]["structure"] |= {"kind": "discrete", "chunk": 4, "text_len": 14}
    raw["model"]["head"]["kind"] = "fast"
    raw["model"]["fast"] |= {"length": 10, **fast}
    return raw


@pytest.fixture(scope="module")
def fast_folder(tmp_path_factory):
    """Openpi's folder, of the procedural parameters."""
    folder = tmp_path_factory.mktemp("pi0fast")
    flat = {f"params/{name}": value for name, value in golden.weights(FAST).items()}
    with ocp.PyTreeCheckpointer() as writer:
        writer.save((folder / "params").absolute(), unflatten(flat))
    shutil.copytree(TRAINED / "assets", folder / "assets")
    return folder


def test_pi0_fast_in_and_out_to_the_bit(fast_folder, tmp_path):
    words = tmp_path / "words"
    words.mkdir()
    shutil.copy(WORDS / "tiny_tokenizer.model", words)
    (words / "fast").mkdir()
    shutil.copy(WORDS / "fast_tokenizer.json", words / "fast/tokenizer.json")
    settings = golden.config(WORDS)["fast"]
    (words / "fast/processor_config.json").write_text(json.dumps(settings))
    # The folder's 512 words leave the 300 FAST tokens their room.
    raw = fast_config(dir=str(words / "fast"))
    result = from_openpi(fast_folder, raw, words)
    assert result.fresh == ()
    code = result.meta["config"]["model"]["fast"]["code"]
    assert code["stop"] == 1
    assert code["fast"]["vocab_size"] == 300
    result.save(tmp_path / "run", overwrite=False)
    to_openpi(Stored(tmp_path / "run"), tmp_path / "out")
    assert same(tmp_path / "out/params", fast_folder / "params")
    assert next((tmp_path / "out/assets").glob("*/norm_stats.json")).is_file()
    with pytest.raises(ConfigError, match="torch port has no pi0-FAST"):
        to_openpi(Stored(tmp_path / "run"), tmp_path / "torch", kind="torch")


def test_pi0_fast_is_not_taken_for_pi0(fast_folder):
    with pytest.raises(ConfigError, match="pi0-FAST, without an expert"):
        from_openpi(fast_folder, raw_config())
    with pytest.raises(ConfigError, match=r"pi0 or pi0\.5, with an expert"):
        from_openpi(TRAINED, fast_config())
    result = from_openpi(fast_folder, fast_config())
    assert result.meta["config"]["model"]["fast"]["code"] == {}
