"""pi0 and pi0.5 as LeRobot keeps them: names, config, processors and statistics."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from configs import base
from tests import arrays
from vla_jax.config import ConfigError, resolve
from vla_jax.convert.importing import shapes_of
from vla_jax.convert.lerobot import pi
from vla_jax.convert.lerobot.exporting import to_lerobot
from vla_jax.convert.openpi.exporting import to_openpi
from vla_jax.convert.openpi.importing import from_openpi
from vla_jax.convert.store import Stored
from vla_jax.data.units.policy_units import PolicyUnits
from vla_jax.models import vla

TABLE = "model.paligemma_with_expert.paligemma.lm_head.weight"
WORDS = "model.paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
TOWER, VOCAB = (12, 1, 2, 16, 14), 32


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(
        pi, "GEMMAS", {(16, 24, 2, 2, 1, 8): "gemma_2b", (8, 12, 2, 2, 1, 8): "gemma_300m"}
    )
    monkeypatch.setattr(pi, "FIXED", (TOWER, VOCAB))


def raw_config(kind: str, rule: str = "openpi_quantile", **expert: Any) -> dict[str, Any]:
    raw = base.get_config().to_dict()
    raw["data"] |= {"datasets": ({"spec": "tiny", "dir": "none"},), "units": rule}
    raw["data"]["relative"] = (2, -1)
    width, layers, heads, hidden, patch = TOWER
    arch = {
        "hidden_size": 16,
        "projection_dim": 16,
        "vision_config": {
            "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads,
            "intermediate_size": hidden, "patch_size": patch, "image_size": 28,
        },
        "text_config": {
            "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "head_dim": 8,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        },
    }  # fmt: skip
    model = raw["model"]
    model["backbone"] = {"name": "paligemma", "hf_dir": "", "arch": arch}
    model["structure"] |= {"kind": "expert", "window": 1, "chunk": 4, "text_len": 40, "proprio": 3}
    model["head"] |= {"kind": "expert_flow", "gripper": "number"}
    model["expert"] |= {"width": 8, "hidden": 12, "padded": 4, "adaptive": kind == "pi05"}
    model["expert"] |= {"state": "none" if kind == "pi05" else "expert", "prompt": kind, **expert}
    model["action_dim"] = 3
    return raw


def statistics() -> dict[str, Any]:
    of = {"mean": [0.5, 1, 2], "std": [1.0, 2, 3], "q01": [-1.0, 0, 1], "q99": [1.0, 2, 4]}
    return {"state": of, "actions": {**of, "mean": [7.0, 8, 9]}}


def run(raw: dict[str, Any], folder: Path) -> Path:
    """A checkpoint that came from openpi, with statistics."""
    config = resolve(raw)
    model: Any = vla.build(config.model)
    rng = np.random.default_rng(0)
    ours = {k: rng.normal(size=s).astype(np.float32) for k, s in shapes_of(model).items()}
    original: dict[str, np.ndarray] = {}
    for row in pi.torch_rows(config.model, model.arch):
        original |= arrays.to_theirs(row, ours)
    folder.mkdir()
    save_file(original, folder / "model.safetensors")
    (folder / "assets/tiny").mkdir(parents=True)
    text = json.dumps({"norm_stats": statistics()})
    (folder / "assets/tiny/norm_stats.json").write_text(text)
    from_openpi(folder, raw).save(folder / "run", overwrite=False)
    return folder / "run"


def steps_of(path: Path) -> dict[str, Any]:
    return {s["registry_name"]: s["config"] for s in json.loads(path.read_text())["steps"]}


@pytest.mark.parametrize(
    ("kind", "text"),
    [("pi0", "pi0_new_line_processor"), ("pi05", "pi05_prepare_state_tokenizer_processor_step")],
)
def test_lerobot_finds_what_it_asks_for(kind, text, tmp_path):
    to_lerobot(Stored(run(raw_config(kind), tmp_path / "from")), tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    expected = {
        "type": kind, "paligemma_variant": "gemma_2b", "action_expert_variant": "gemma_300m",
        "chunk_size": 4, "max_action_dim": 4, "max_state_dim": 4, "image_resolution": [28, 28],
        "tokenizer_max_length": 40, "num_inference_steps": 10, "use_relative_actions": True,
        "relative_exclude_joints": ["gripper"],
        "action_feature_names": ["joint_0", "joint_1", "gripper_2"],
    }  # fmt: skip
    assert {k: config[k] for k in expected} == expected
    assert config["normalization_mapping"]["ACTION"] == "QUANTILES"
    assert "pad_language_to" not in config  # SmolVLA's alone, which LeRobot would refuse
    shapes = {
        k: v["shape"] for k, v in {**config["input_features"], **config["output_features"]}.items()
    }
    assert shapes == {
        "observation.images.primary": [3, 28, 28], "observation.images.wrist": [3, 28, 28],
        "observation.state": [3], "action": [3],
    }  # fmt: skip
    steps = steps_of(tmp_path / "out/policy_preprocessor.json")
    assert text in steps
    assert steps["tokenizer_processor"]["tokenizer_name"] == "google/paligemma-3b-pt-224"
    # The scaled state is part of the prompt, and actions are scaled as they count from the state.
    order = list(steps)
    assert order.index("relative_actions_processor") < order.index("normalizer_processor")
    if kind == "pi05":
        assert order.index("normalizer_processor") < order.index(text)
    behind = steps_of(tmp_path / "out/policy_postprocessor.json")
    assert list(behind) == [
        "unnormalizer_processor", "absolute_actions_processor", "device_processor"
    ]  # fmt: skip
    assert "import-openpi" in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize("rule", ["openpi_quantile", "openpi_zscore", "lerobot_quantile"])
def test_statistics_scale_as_ours_do(rule, tmp_path):
    """LeRobot adds no epsilon to a width, so that openpi's is in what is written."""
    folder = run(raw_config("pi05", rule), tmp_path / "from")
    to_lerobot(Stored(folder), tmp_path / "out")
    file = next((tmp_path / "out").glob("policy_postprocessor_step_*.safetensors"))
    exported = load_file(file)
    units = PolicyUnits.from_json(Stored(folder).meta["units"]["tiny"])
    values = np.array([[0.3, -0.7, 2.5]])
    if rule == "openpi_zscore":
        restored = values * exported["action.std"] + exported["action.mean"]
    else:
        low, high = exported["action.q01"], exported["action.q99"]
        restored = (values + 1) * (high - low) / 2 + low
    np.testing.assert_allclose(restored, units.actions.unnormalize(values), rtol=3e-7)
    exact = restored == units.actions.unnormalize(values)
    assert exact.all() == (rule == "lerobot_quantile")


def test_in_again_to_the_bit(tmp_path):
    """Tensors, statistics, and what LeRobot's config has that ours has not."""
    raw = raw_config("pi05", "lerobot_quantile")
    to_lerobot(Stored(run(raw, tmp_path / "from")), tmp_path / "out")
    path = tmp_path / "out/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "optimizer_lr": 0.5}))
    again = from_openpi(tmp_path / "out", raw)
    again.save(tmp_path / "again", overwrite=False)
    units = PolicyUnits.from_json(again.meta["units"]["tiny"])
    assert (units.state.first, units.actions.second) == ((-1, 0, 1), (1, 2, 4))
    to_lerobot(Stored(tmp_path / "again"), tmp_path / "two")
    assert json.loads((tmp_path / "two/config.json").read_text())["optimizer_lr"] == 0.5
    to_openpi(Stored(tmp_path / "again"), tmp_path / "back", "torch")
    original = load_file(tmp_path / "from/model.safetensors")
    for folder, prefix in (("two", "model."), ("back", "")):
        exported = load_file(tmp_path / folder / "model.safetensors")
        assert len(exported) == len(original) + 1  # the expert's head
        for name, value in original.items():
            np.testing.assert_array_equal(exported[prefix + name], value, err_msg=name)


def test_of_two_tables_the_one_that_is_read(tmp_path):
    """LeRobot keeps the words' table beside a head that is neither tied nor used."""
    raw = raw_config("pi0")
    to_lerobot(Stored(run(raw, tmp_path / "from")), tmp_path / "out")
    path = tmp_path / "out/model.safetensors"
    tensors = load_file(path)
    tensors[WORDS] = tensors[TABLE] + 1
    save_file(tensors, path)
    table = from_openpi(tmp_path / "out", raw).leaves["backbone/text/embedding"].read()
    np.testing.assert_array_equal(table, tensors[WORDS])


def test_a_prompt_without_the_state(tmp_path):
    """pi0.5 as openpi fine-tunes it on LIBERO; LeRobot's own pi0.5 always writes the state."""
    raw = raw_config("pi05", prompt="pi0")
    to_lerobot(Stored(run(raw, tmp_path / "from")), tmp_path / "out")
    steps = steps_of(tmp_path / "out/policy_preprocessor.json")
    assert "smolvla_new_line_processor" in steps
    assert not [name for name in steps if name.startswith("pi0")]


def test_what_lerobot_cannot_build_is_refused(tmp_path, monkeypatch):
    folder = run(raw_config("pi0"), tmp_path / "from")
    monkeypatch.setattr(pi, "FIXED", (TOWER, 7))
    with pytest.raises(ConfigError, match=r"LeRobot builds pi0 and pi0\.5 of"):
        to_lerobot(Stored(folder), tmp_path / "out")
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=r"gemma_2b.* alone"):
        to_lerobot(Stored(folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()
