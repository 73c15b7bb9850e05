"""A VLM is imported with the config that its backbone names."""

import json

import pytest

from vla_jax.config import ConfigError, load_config_file
from vla_jax.convert.default_config import default_config
from vla_jax.models.backbones import BACKBONES


@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_names_a_config_of_its_own(name, tmp_path):
    backbone = BACKBONES[name]
    (tmp_path / "config.json").write_text(json.dumps(backbone.arch({})))
    config = default_config(tmp_path)
    assert config == backbone.DEFAULT_CONFIG
    raw = load_config_file(config)
    assert raw["model"]["backbone"]["name"] == name


def test_a_stranger_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "blip-2"}')
    with pytest.raises(ConfigError, match=r"type 'blip-2'; they are \[.*'kosmos-2'"):
        default_config(tmp_path)
