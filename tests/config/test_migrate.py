"""Configs that earlier versions stored."""

import json
import logging
import re
from pathlib import Path

import pytest

from vla_jax.config import FORMAT, Config, ConfigError, migrate, resolve, to_dict, upgrade
from vla_jax.config.config_dict import default_config

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
STORED = "checkpoint_format_1/checkpoints/4/meta/metadata"


@pytest.fixture
def stored():
    return json.loads((FIXTURES / STORED).read_text())


def test_a_step_leads_from_every_format_to_the_next():
    assert sorted(migrate.STEPS) == list(range(1, FORMAT))


def test_moved_keys_keep_their_values(stored):
    assert stored["format"] == 1
    old = stored["config"]
    old["data"]["left_pad"], old["augment"]["draws"] = False, "shared"
    old["model"]["head"] |= {"kind": "detokenizer", "vocabulary": "all"}
    config = resolve(upgrade(old, 1, "here"))
    assert not config.data.parity.left_pad
    assert config.data.parity.dct == "fast"
    assert config.augment.parity.draws == "shared"
    assert to_dict(config)["model"]["head"]["parity"] == {"vocabulary": "all"}
    assert (config.seed, config.lora.rank, config.optim.ema_decay) == (5, 2, 0.9)


@pytest.mark.parametrize(
    ("name", "was"),
    [("pi0_libero", "expert"), ("pi0fast_libero", "fast"), ("openvla_libero", "head")],
)
@pytest.mark.parametrize("gripper", ["number", "binary"])
def test_three_options_of_a_gripper_became_one(stored, name, was, gripper):
    model = json.loads((FIXTURES / "models_format_2.json").read_text())["models"][name]
    remaining = {"expert", "fast", "head"} - {was}
    model[was]["gripper"] = gripper
    for other in remaining:  # they did not count
        model[other]["gripper"] = "binary"
    config = resolve(upgrade({**stored["config"], "model": model}, 2, "here"))
    assert config.model.gripper_is_number == (gripper == "number")
    for group in (config.model.expert, config.model.fast):
        assert not hasattr(group, "gripper")


def test_keys_that_did_not_exist_yet_take_defaults_with_one_line(stored, caplog):
    config = stored["config"]
    del (
        config["model"]["structure"]["slide"],
        config["lora"],
        config["data"]["datasets"][0]["weight"],
    )
    with caplog.at_level(logging.INFO):
        complete = upgrade(config, 1, "here")
    (record,) = caplog.records
    match = re.fullmatch("here: its config lacks ([0-9]+) newer keys, .*: (.*)", record.message)
    assert match
    count, lacking = int(match[1]), match[2].split(", ")
    # And those that the schema got after format 1.
    assert {"model.structure.slide", "data.datasets[0].weight", "lora"} < set(lacking)
    assert len(lacking) == count
    assert complete["model"]["gripper"] == "last"  # which is not the default
    assert complete["model"]["structure"]["slide"] == 1
    assert complete["data"]["datasets"][0]["weight"] == 1.0
    assert complete["lora"] == to_dict(Config())["lora"]
    assert upgrade(json.loads(json.dumps(complete)), FORMAT, "") == json.loads(json.dumps(complete))
    assert len(caplog.records) == 1


def test_unknown_keys_are_refused_with_what_is_near(stored):
    stored["config"]["data"]["clipp"] = 2.0
    with pytest.raises(ConfigError, match=r"data.clipp: unknown key; did you mean 'clip'\?"):
        resolve(upgrade(stored["config"], 1, "here"))


@pytest.mark.parametrize("number", [0, FORMAT + 1, None, "1"])
def test_other_formats_are_refused(stored, number):
    with pytest.raises(ConfigError, match=rf"here: format {number!r}, .* reads 1 to {FORMAT}"):
        upgrade(stored["config"], number, "here")


def test_what_is_no_config_is_refused():
    with pytest.raises(ConfigError, match="here: expected a group of keys as the config, not 3"):
        upgrade(3, FORMAT, "here")
    broken = {"data": 4, "augment": {"draws": "shared", "parity": 5}, "model": {"structure": []}}
    with pytest.raises(ConfigError) as error:
        resolve(upgrade(broken, 1, "here"))
    for key in ("data", "augment.parity", "model.structure"):
        assert f"{key}: expected a group of keys" in str(error.value)


def test_a_renamed_key_is_read_in_every_format_and_file(stored, caplog):
    newest = to_dict(resolve(upgrade(stored["config"], 1, "here")))
    for number, config in ((1, stored["config"]), (FORMAT, newest)):
        config["data"].pop("max_skipped_share", None)
        config["data"]["max_skipped"] = 0.25
        read = resolve(upgrade(config, number, "here"))
        assert read.data.max_skipped_share == 0.25
        assert read.train.max_skipped == 10
    raw = default_config()
    raw.data.max_skipped = 0.125
    raw.train.max_skipped = 3
    assert "config key max_skipped is now max_skipped_share in the same group" in caplog.text
    assert (raw.data.max_skipped, raw.data.max_skipped_share) == (0.125, 0.125)
    assert raw.train.max_skipped == 3
