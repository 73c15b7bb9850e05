"""RoboVLMs' JSON configs: all that it ships, every key, inheritance, refusals."""

import copy
import dataclasses
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from configs import base, from_robovlms
from tests.configs.robovlms import NAMES, shipped
from vla_jax.config import Config, ConfigError, resolve, to_dict
from vla_jax.convert.robovlms import config as robovlms_config
from vla_jax.convert.robovlms import keys as robovlms_keys
from vla_jax.models.heads.lstm import LSTMOptions
from vla_jax.train.epochs import with_steps

ROOT = Path(__file__).parents[2]


def translate(original: dict[str, Any]) -> Config:
    return resolve(robovlms_config.to_raw(original, base.get_config().to_dict()))


def changed(original: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    copied = copy.deepcopy(original)
    *groups, key = path.split(".")
    place = copied
    for group in groups:
        place = place[group]
    place[key] = value
    return copied


@pytest.mark.parametrize("name", NAMES)
def test_every_shipped_config_resolves(name, tmp_path, caplog):
    path = tmp_path / "theirs.json"
    path.write_text(json.dumps(shipped(name)))
    with caplog.at_level(logging.WARNING):
        config = resolve(from_robovlms.get_config(str(path)))
    model, optim, train = config.model, config.optim, config.train
    pooled = model.head.down_sample
    assert model.head == LSTMOptions(down_sample=pooled, hidden=1024, layers=4)
    assert (model.structure.kind, model.structure.chunk) == ("policy_head", 10)
    assert model.dtype == "bfloat16"
    assert (config.data.clip, config.seed, optim.gripper_weight) == (0.65, 123, 0.01)
    assert (optim.schedule, optim.min_scale) == ("constant", 0.01)
    # In ten of eleven files the trainer's own value never arrives.
    assert optim.clip_norm == (1.0 if name == "flamingo_calvin" else 0.0)
    # One warning, with each unused key once.
    (record,) = caplog.records
    for key in ("optimizer: read by nothing", "trainer.gradient_clip_val: overwritten"):
        assert record.message.count(f"  {key}") == 1
    assert "learning_rate:" not in record.message
    assert train.accumulate * (41 if name == "kosmos_calvin" else 4 // train.accumulate) == (
        train.batch_size
    )


def test_the_files_differ_where_they_should():
    of = {name: translate(shipped(name)) for name in NAMES}
    backbones = {name: of[name].model.backbone.name for name in NAMES}
    assert backbones == {
        "flamingo_calvin": "flamingo", "kosmos_hand_calvin": "kosmos2", "kosmos_calvin": "kosmos2",
        "llava_calvin": "llava_mpt", "moondream_calvin": "moondream",
        "paligemma_calvin": "paligemma",
        "qwen_calvin": "qwen_vl", "uform_calvin": "uform", "kosmos_bridge": "kosmos2",
        "kosmos_oxe": "kosmos2", "kosmos_rt": "kosmos2",
    }  # fmt: skip
    hand, rt = of["kosmos_hand_calvin"], of["kosmos_rt"]
    assert hand.model.structure.cameras == ("primary", "wrist")
    assert (hand.augment.shift, hand.augment.per_frame) == ({"primary": 10, "wrist": 4}, True)
    assert of["kosmos_calvin"].augment.shift == {"primary": 10}
    assert (hand.data.normalization, rt.data.normalization) == ("none", "q99")
    assert (hand.train.epochs, hand.train.check_epochs, hand.optim.warmup_epochs) == (5, 1, 0.25)
    # An epoch is a fifth of the steps there.
    bridge = of["kosmos_bridge"]
    assert (bridge.train.steps, bridge.train.epochs, bridge.optim.warmup_steps) == (50000, 0, 2500)
    assert (rt.optim.warmup_steps, rt.optim.warmup_epochs) == (5000, 0)
    assert (rt.train.eval_every, rt.train.save_every) == (10000, 10000)
    # Their reader of OXE has no hand camera, whatever use_hand_rgb says.
    assert rt.model.structure.cameras == ("primary",)
    assert [d.spec for d in rt.data.datasets] == ["fractal20220817_data"]
    soup = of["kosmos_oxe"].data.datasets
    assert len(soup) == 23
    assert {d.spec: d.weight for d in soup}["language_table"] == 0.1
    assert soup[2].dir == "datasets/openvla/bridge_orig"
    assert (rt.augment.crop_scale, rt.augment.hue) == (0.9, 0.05)
    parity = [config.data.parity for config in of.values()]
    assert {(p.windows, p.left_pad) for p in parity} == {("sliding", False)}
    assert of["moondream_calvin"].model.structure.resampler == 64
    uform = of["uform_calvin"].model
    assert (uform.structure.readout, uform.head.down_sample) == ("all", "pooling")
    assert of["llava_calvin"].optim.caption_weight == 1.0
    assert of["llava_calvin"].optim.frozen == ("^backbone/vision", "^backbone/text/embedding$")
    assert of["qwen_calvin"].optim.frozen == ("^backbone/vision",)
    assert hand.optim.frozen == ()
    assert "^backbone/" in of["flamingo_calvin"].optim.frozen
    assert ("^backbone/text/layers/extra/", -1) in of["flamingo_calvin"].optim.trained
    assert of["flamingo_calvin"].train.eval_batches == 100


@pytest.mark.parametrize(
    ("folder", "backbone"),
    [
        (".vlms/paligemma2-3b-pt-224", "paligemma2"),
        ("models/google/paligemma-2-10b", "paligemma2"),
        (".vlms/paligemma-224", "paligemma"),
    ],
)
def test_one_class_serves_two_generations(folder, backbone):
    original = shipped("paligemma_calvin")
    translated = translate(changed(original, "vlm.pretrained_model_name_or_path", folder))
    assert translated.model.backbone.name == backbone


def test_epochs_become_steps():
    config = with_steps(translate(shipped("kosmos_hand_calvin")), windows=4003)
    assert (config.train.steps, config.optim.warmup_steps) == (5000, 250)
    assert (config.train.eval_every, config.train.save_every) == (1000, 1000)
    both = dataclasses.replace(config.optim, warmup_steps=30, warmup_epochs=0.5)
    config = with_steps(dataclasses.replace(config, optim=both), windows=4003)
    assert config.optim.warmup_steps == 30 + 500
    fixed = translate(shipped("kosmos_rt"))
    assert with_steps(fixed, windows=4003) == fixed


# For every key that is ours: a file, another value, and what else must hold for it to matter.
OTHER: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "robovlm_name": ("kosmos_calvin", "RoboPaligemma", {}),
    "vlm.pretrained_model_name_or_path": ("kosmos_calvin", "elsewhere", {}),
    "vlm.name": ("flamingo_calvin", "mpt_7b", {}),
    "window_size": ("kosmos_calvin", 4, {}),
    "fwd_pred_next_n": ("kosmos_calvin", 5, {}),
    "use_hand_rgb": ("kosmos_calvin", True, {}),
    "use_vision_resampler": ("kosmos_calvin", True, {}),
    "act_head.type": ("kosmos_calvin", "GPTDecoder", {}),
    "act_head.hidden_size": ("kosmos_calvin", 512, {}),
    "act_head.num_layers": ("kosmos_calvin", 2, {}),
    "act_head.action_dim": ("kosmos_calvin", 8, {}),
    "act_head.down_sample": ("kosmos_calvin", "pooling", {}),
    "act_head.latent": ("kosmos_calvin", 2, {}),
    "act_head.action_space": ("kosmos_calvin", "down_sample", {}),
    "act_head.token_source": ("uform_calvin", "text", {}),
    "act_head.history_type": ("kosmos_calvin", "pre", {}),
    "act_head.n_bin": ("kosmos_calvin", 128, {"act_head.type": "DiscreteDecoder"}),
    "act_head.min_action": ("kosmos_calvin", -2, {"act_head.type": "DiscreteDecoder"}),
    "act_head.max_action": ("kosmos_calvin", 2, {"act_head.type": "DiscreteDecoder"}),
    "train_setup.freeze_backbone": ("kosmos_calvin", True, {}),
    "train_setup.train_vision": ("kosmos_calvin", False, {}),
    "train_setup.train_text_embedding": ("kosmos_calvin", False, {}),
    "train_setup.train_decoder_layers": ("kosmos_calvin", 3, {}),
    "train_setup.train_full_decoder": ("flamingo_calvin", True, {}),
    "train_setup.train_resampler": ("flamingo_calvin", False, {}),
    "train_setup.freeze_resampler": ("moondream_calvin", True, {}),
    "train_setup.lora_enable": ("kosmos_calvin", True, {}),
    "train_setup.lora_r": ("kosmos_calvin", 8, {"train_setup.lora_enable": True}),
    "train_setup.lora_alpha": ("kosmos_calvin", 8, {"train_setup.lora_enable": True}),
    "train_setup.lora_dropout": ("kosmos_calvin", 0.2, {"train_setup.lora_enable": True}),
    "learning_rate": ("kosmos_calvin", 1e-3, {}),
    "min_lr_scale": ("kosmos_calvin", 0.1, {}),
    "weight_decay": ("kosmos_calvin", 0.5, {}),
    "scheduler": ("kosmos_calvin", "half-cosine", {}),
    "warmup_epochs": ("kosmos_calvin", 1, {}),
    "warmup_steps": ("kosmos_calvin", 7, {}),
    "gradient_clip_val": ("kosmos_calvin", 2.0, {}),
    "arm_gripper_loss_ratio": ("kosmos_calvin", 0.5, {}),
    "vl_cotrain_ratio": ("kosmos_calvin", 0.5, {}),
    "seed": ("kosmos_calvin", 7, {}),
    "batch_size": ("kosmos_calvin", [2, 2], {}),
    "gpus": ("kosmos_calvin", 8, {}),
    "num_nodes": ("kosmos_calvin", 2, {}),
    "trainer.accumulate_grad_batches": ("kosmos_calvin", 2, {}),
    "trainer.max_epochs": ("kosmos_calvin", 2, {}),
    "trainer.max_steps": ("kosmos_calvin", 70, {}),
    "trainer.val_check_interval": ("kosmos_calvin", 70, {}),
    "trainer.check_val_every_n_epoch": ("kosmos_calvin", 2, {}),
    "trainer.limit_val_batches": ("kosmos_calvin", 7, {}),
    "trainer.log_every_n_steps": ("kosmos_calvin", 7, {}),
    "trainer.logger": ("kosmos_calvin", ["csv"], {}),
    "trainer.precision": ("kosmos_calvin", "32", {}),
    "norm_action": ("kosmos_calvin", False, {}),
    "train_dataset.data_dir": ("kosmos_calvin", "elsewhere", {}),
    "train_dataset.data_root_dir": ("kosmos_rt", "elsewhere", {}),
    "train_dataset.data_mix": ("kosmos_rt", "bridge", {}),
    "train_dataset.organize_type": ("kosmos_rt", "segment", {}),
    "train_dataset.rgb_pad": ("kosmos_calvin", 3, {}),
    "train_dataset.gripper_pad": ("kosmos_hand_calvin", -1, {}),
    "train_dataset.image_aug": ("kosmos_rt", False, {}),
}
# Tested by themselves below.
SEPARATE = {
    "use_clip_norm", "clip_norm_ratio", "image_size", "norm_min", "norm_max",
    "train_dataset.type", "train_dataset.data_paths",
    "train_dataset.image_folder", "train_weights",
}  # fmt: skip


def test_every_key_of_ours_has_an_effect():
    ours = {key.path for key in robovlms_keys.KEYS if key.fate == robovlms_keys.OURS}
    assert ours == set(OTHER) | SEPARATE
    for path, (name, value, also) in OTHER.items():
        original = shipped(name)
        for other, needed in also.items():
            original = changed(original, other, needed)
        assert translate(changed(original, path, value)) != translate(original), path


def test_no_other_key_has_an_effect():
    fates = (robovlms_keys.IGNORED, robovlms_keys.ELSEWHERE)
    for name in ("kosmos_hand_calvin", "flamingo_calvin", "kosmos_oxe"):
        original = shipped(name)
        plain = translate(original)
        for key in robovlms_keys.KEYS:
            group = key.path.rpartition(".")[0]
            if key.fate in fates and (not group or isinstance(original.get(group), dict)):
                assert translate(changed(original, key.path, "other")) == plain, key.path


def test_every_key_is_in_the_table_once():
    paths = [key.path for key in robovlms_keys.KEYS]
    assert len(paths) == len(set(paths))
    for name in NAMES:
        assert not [note for note in robovlms_keys.notes(shipped(name)) if "nothing" in note
                    and note.split(":")[0] not in paths]  # fmt: skip
    message = robovlms_keys.notes({**shipped("kosmos_calvin"), "learnig_rate": 3})
    assert "learnig_rate: read by nothing" in message


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        ("fwd_head", {"type": "x"}, "no code for predicting images"),
        ("use_mu_law", True, "mu-law"),
        ("tcp_rel", True, "frame of the tool"),
        ("model_load_path", "x.pt", r"launch/convert\.py"),
        ("train_setup.lora_bias", "all", "no biases"),
        ("train_setup.predict_action", False, "nothing would be learnt"),
        ("act_head.type", "Diffusion", "'Diffusion' is none of"),
        ("robovlm_name", "RoboOther", "'RoboOther' is none of"),
        ("image_size", 336, "the image tower takes 224"),
        ("norm_min", -0.5, "clipping is symmetric"),
        ("scheduler", "linear", "'linear' is none of"),
        ("train_dataset.type", "ConcatDataset", "'ConcatDataset' is none of"),
        ("train_dataset.organize_type", "episodes", "'episodes' is none of"),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_reason(path, value, reason):
    with pytest.raises(ConfigError, match=reason):
        translate(changed(shipped("kosmos_calvin"), path, value))


def test_all_refusals_come_at_once():
    original = {**shipped("kosmos_calvin"), "use_mu_law": True, "resume": "x", "image_size": 3}
    with pytest.raises(ConfigError, match=r"3 problem\(s\)"):
        translate(original)
    with pytest.raises(ConfigError, match="'act_head', 'window_size'"):
        translate({"robovlm_name": "RoboKosMos"})


def test_the_loss_against_clip_asks_for_its_folder():
    original = {**shipped("kosmos_calvin"), "use_clip_norm": True, "clip_norm_ratio": 0.2}
    with pytest.raises(ConfigError, match=r"model\.sentence\.dir: name the folder"):
        translate(original)
    raw = robovlms_config.to_raw(original, base.get_config().to_dict())
    raw["model"]["sentence"]["dir"] = "clip"
    sentence = to_dict(resolve(raw))["model"]["sentence"]
    assert sentence == {"dir": "clip", "dim": 768, "weight": 0.2}


def test_actions_are_clipped_where_they_say():
    config = translate({**shipped("kosmos_calvin"), "norm_min": -0.5, "norm_max": 0.5})
    assert config.data.clip == 0.5
    assert translate({**shipped("kosmos_calvin"), "norm_action": False}).data.clip == 1.0


def test_texts_beside_actions():
    original = shipped("kosmos_calvin")
    texts = {"type": "VideoLLaVADataset", "data_paths": ["a.json"], "image_folder": "images"}
    original["train_dataset"] = [original["train_dataset"], texts]
    original |= {"train_weights": [0.8, 0.2], "batch_size": [40, 40], "vl_cotrain_ratio": 0.1}
    config = translate(original)
    cotrain = config.data.cotrain
    assert (cotrain.path, cotrain.images, cotrain.rows) == ("a.json", "images", 10)
    assert config.optim.caption_weight == 0.1
    discrete = changed(original, "act_head.action_space", "discrete")
    assert translate(discrete).optim.caption_weight == 1.0
    with pytest.raises(ConfigError, match="2 sets of actions"):
        translate({**original, "train_dataset": [shipped("kosmos_calvin")["train_dataset"]] * 2})


def test_parents_are_merged(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "top.json").write_text(json.dumps(shipped("kosmos_calvin")))
    middle = {"parent": "../top.json", "act_head": {"hidden_size": 256}, "seed": 5}
    (tmp_path / "sub/middle.json").write_text(json.dumps(middle))
    child = {"parent": "sub/middle.json", "window_size": 4}
    (tmp_path / "child.json").write_text(json.dumps(child))
    config = resolve(from_robovlms.get_config(str(tmp_path / "child.json")))
    assert config.model.head == LSTMOptions(hidden=256)
    assert (config.model.structure.window, config.seed) == (4, 5)
    assert config.model.structure.latent == 1  # of the grandparent's act_head
    alone = {"a": {"b": 1, "c": 2}}
    assert robovlms_config.merge(alone, {"a": {"b": 3}}) == {"a": {"b": 3, "c": 2}}
    assert robovlms_config.merge(alone, {"a": {"__override__": True, "b": 3}}) == {"a": {"b": 3}}
    (tmp_path / "loop.json").write_text(json.dumps({"parent": "loop.json"}))
    with pytest.raises(ConfigError, match="its own parent"):
        robovlms_config.read(tmp_path / "loop.json")
    for text, problem in (("[]", "expected an object"), ("{", "not JSON")):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ConfigError, match=problem):
            robovlms_config.read(tmp_path / "bad.json")
    with pytest.raises(ConfigError, match="no such file"):
        robovlms_config.read(tmp_path / "absent.json")


def test_the_table_is_printed():
    command = [sys.executable, "configs/from_robovlms.py", "--table"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 2 + len(robovlms_keys.KEYS)
    assert "| `learning_rate` | ours | optim.learning_rate |" in lines


def test_to_dict_of_a_translated_config_resolves_again():
    config = translate(shipped("kosmos_oxe"))
    assert resolve(json.loads(json.dumps(to_dict(config)))) == config
