"""RoboVLMs' names and config keys in our terms."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from configs import base
from vla_jax.config import ConfigError, resolve
from vla_jax.convert import importing, maps
from vla_jax.convert.robovlms import released
from vla_jax.convert.robovlms import source as robovlms
from vla_jax.data.units.gripper import GripperState
from vla_jax.models.heads.lstm import LSTMOptions
from vla_jax.models.weights import Weight, WeightError

FIXTURES = Path(__file__).parents[1] / "fixtures"


def source(tmp_path, tensors, **kwargs):
    save_file(
        {k: np.asarray(v, np.float32) for k, v in tensors.items()}, tmp_path / "x.safetensors"
    )
    return robovlms.open_source(tmp_path / "x.safetensors", **kwargs)


@pytest.mark.parametrize("prefix", ["", "model.", "module.model.", "_forward_module.model."])
def test_wrappers_come_off(tmp_path, prefix):
    names = ("backbone.text_model.a", "act_head.rnn.b", "action_token")
    result = source(tmp_path, {prefix + n: [i] for i, n in enumerate(names)})
    assert set(result.shapes) == set(names)
    assert result.prefix == ("model." if "model." in prefix else "")
    assert [result.read(n)[0] for n in names] == [0, 1, 2]


def test_models_registered_twice(tmp_path):
    w = np.arange(4)
    names = {
        "model.model.transformer.w": w,
        "model.backbone.transformer.w": w,
        "model.action_token": w,
    }
    result = source(tmp_path, names)
    assert set(result.shapes) == {"backbone.transformer.w", "action_token"}
    assert result.unequal() == ()
    result = source(tmp_path, {**names, "model.model.transformer.w": w + 1})
    assert result.unequal() == ("model.model.transformer.w (of model.backbone.transformer.w)",)
    rows = [Weight("backbone.transformer.w", "w"), Weight("action_token", "a")]
    with pytest.raises(WeightError, match="differ from their original"):
        maps.incoming(rows, {"w": (4,), "a": (4,)}, result, unequal=result.unequal())


def test_lora_is_merged_and_twice_registered(tmp_path):
    rng = np.random.default_rng(0)
    w, a, b = rng.normal(size=(6, 4)), rng.normal(size=(2, 4)), rng.normal(size=(6, 2))
    tensors: dict[str, Any] = {"model.action_token": [0.0]}
    for top in ("model.model.base_model.model.", "model.backbone."):
        tensors[top + "q.base_layer.weight"] = w
        tensors[top + "q.lora_A.default.weight"] = a
        tensors[top + "q.lora_B.default.weight"] = b
        tensors[top + "k.weight"] = w
    result = source(tmp_path, tensors, lora_alpha=16)
    assert set(result.shapes) == {"backbone.q.weight", "backbone.k.weight", "action_token"}
    np.testing.assert_allclose(result.read("backbone.q.weight"), w + 8 * b @ a, atol=1e-5)
    np.testing.assert_array_equal(result.read("backbone.k.weight"), w.astype(np.float32))
    assert result.unequal() == ()
    tensors["model.backbone.q.lora_B.default.weight"] = b + 1
    assert len(source(tmp_path, tensors, lora_alpha=16).unequal()) == 1
    with pytest.raises(WeightError, match="lora_alpha"):
        source(tmp_path, tensors)
    del tensors["model.backbone.q.lora_B.default.weight"]
    del tensors["model.model.base_model.model.q.lora_B.default.weight"]
    with pytest.raises(
        WeightError, match=r"backbone\.q\.weight: of its LoRA matrices only \['A'\]"
    ):
        source(tmp_path, tensors, lora_alpha=16)


def test_deepspeed_folders_are_explained(tmp_path):
    (tmp_path / "latest").write_text("checkpoint")
    with pytest.raises(WeightError, match="zero_to_fp32"):
        robovlms.open_source(tmp_path)


def original(**changes):
    path = FIXTURES / "robokosmos_lstm_post_hand" / "config.json"
    return {**json.loads(path.read_text()), **changes}


def convert(theirs):
    return resolve(robovlms.to_config(theirs, base.get_config().to_dict()))


def test_config():
    config = convert(original())
    assert config.model.backbone.name == "kosmos2"
    s, head = config.model.structure, config.model.head
    assert (s.kind, s.window, s.chunk, s.latent) == ("policy_head", 4, 3, 1)
    assert s.cameras == ("primary", "wrist")
    assert head == LSTMOptions(hidden=64, layers=4)
    assert (config.data.clip, config.data.normalization) == (0.65, "none")
    assert config.data.datasets[0].spec == "calvin"
    assert convert(original(use_hand_rgb=False)).model.structure.cameras == ("primary",)
    assert convert(original(norm_action=False)).data.clip == 1.0


def test_mixtures(tmp_path):
    config = convert(original(train_dataset={"type": "OpenVLADataset", "data_mix": "bridge"}))
    assert config.data.normalization == "q99"
    assert [d.spec for d in config.data.datasets] == ["bridge_orig"]
    for mix, count in (("rtx", 10), ("rtx_franka", 23), ("taco_play", 1)):
        config = convert(original(train_dataset={"type": "OpenVLADataset", "data_mix": mix}))
        assert len(config.data.datasets) == count
    version = tmp_path / "taco_play" / "0.1.0"
    version.mkdir(parents=True)
    (version / "dataset_info.json").write_text("{}")
    results = {"type": "OpenVLADataset", "data_mix": "taco_play", "data_root_dir": str(tmp_path)}
    assert convert(original(train_dataset=results)).data.datasets[0].dir == str(version)


def test_statistics_may_be_a_file(tmp_path):
    reference = original(train_dataset={"type": "OpenVLADataset", "data_mix": "taco_play"})
    inputs = (tmp_path / "none.pt", reference, base.get_config().to_dict(), None)
    with pytest.raises(ConfigError, match=r"statistics of \['taco_play'\] are not known"):
        importing.from_robovlms(*inputs)
    file = tmp_path / "dataset_statistics.json"
    file.write_text(json.dumps({"action": {"mean": [0.0] * 7}}))
    with pytest.raises(ConfigError, match="taco_play: action: std is missing"):
        importing.from_robovlms(*inputs, statistics=file)
    columns = {"mean": 0.0, "std": 1.0, "q01": -2.0, "q99": 2.0}
    file.write_text(json.dumps({"action": {k: [v] * 7 for k, v in columns.items()}}))
    with pytest.raises(WeightError, match=r"none\.pt"):  # the next thing that is missing
        importing.from_robovlms(*inputs, statistics=file)


def test_config_problems_come_all_at_once():
    reference = original(robovlm_name="RoboGPT", norm_min=-1, train_dataset={"type": "Other"})
    with pytest.raises(ConfigError) as caught:
        convert(reference)
    for text in ("'RoboGPT' is none of", "norm_min, norm_max: -1", "train_dataset"):
        assert text in str(caught.value)
    with pytest.raises(ConfigError, match="act_head"):
        convert({"window_size": 4})


def test_units_of_the_released_checkpoints():
    specs = released.action_specs(("fractal20220817_data", "bridge_orig"), "q99", 0.65, 7, {})
    # q99 maps to 1, which the clip at 0.65 stretches: 0.65 of the way is the model's 1.
    spec = specs["bridge_orig"]
    half = (0.028309678435325586 + 0.02872725307941437) / 2
    middle = (0.028309678435325586 - 0.02872725307941437) / 2
    arm, _ = spec.to_env(np.array([[1.0, 0, 0, 0, 0, 0, 1]]), GripperState())
    np.testing.assert_allclose(arm[0, 0], middle + 0.65 * half, rtol=1e-6)
    assert specs["bridge_orig"].gripper_env == (-1.0, 1.0)
    with pytest.raises(ConfigError, match=r"statistics of \['mine'\] are not known"):
        released.action_specs(("mine",), "q99", 1.0, 7, {})
    numbers = {k: [v] * 7 for k, v in (("min", -2), ("max", 2), ("q01", -1), ("q99", 1))}
    inputs = released.action_specs(("mine",), "q99", 1.0, 7, {"mine": {"action": numbers}})
    assert inputs["mine"].low == (-1.0,) * 6
