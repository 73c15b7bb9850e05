"""Config files, read as the launchers' --config reads them."""

from pathlib import Path

import pytest

from vla_jax.config import ConfigError, load_config_file, resolve

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def test_an_argument_and_changes():
    changes = ["data.clip=0.5", "model.structure.cameras=('primary',)", "data.index=verify"]
    changes += [
        "model.backbone.arch.latent_query_num=3",
        "model.dropout=False",
        "data.left_pad=False",
    ]
    config = resolve(load_config_file(f"{CONFIGS}/quickstart.py:some/folder", changes))
    assert config.data.datasets[0].dir == "some/folder"
    assert (config.data.clip, config.data.index) == (0.5, "verify")
    assert config.model.structure.cameras == ("primary",)
    assert config.model.backbone.arch["latent_query_num"] == 3
    assert not config.model.dropout
    assert not config.data.parity.left_pad


@pytest.mark.parametrize(
    ("where", "changes", "problem"),
    [
        ("none.py", [], "none.py: no such file"),
        ("base.py", ["data.clipp=1"], "clipp"),
        ("base.py", ["data.threads=many"], "many"),
        ("base.py", ["data.threads"], "data.threads"),
        ("oxe.py:bridge:data/oxe:okto", [], "openvla or octo, not 'okto'"),
    ],
)
def test_mistakes(where, changes, problem):
    with pytest.raises(ConfigError, match=problem):
        load_config_file(CONFIGS / where, changes)


def test_a_changed_key_that_is_none_is_named_with_those_that_are():
    with pytest.raises(
        ConfigError, match=r"model\.foo: unknown key; legal keys of model: \['action"
    ):
        load_config_file("quickstart", ["model.foo=1"])
