"""The schema is the one list of options: defaults, documentation, and what config files change."""

import dataclasses
import runpy
import typing
from pathlib import Path

import jaxtyping
import pytest

from configs import base
from vla_jax.config import Config, DataConfig, describe, to_dict
from vla_jax.config.option import kinds

ROOT = Path(__file__).resolve().parents[2]


def leaves(cls: type, prefix: str = ""):
    """(dotted key, field) of every option."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from leaves(hints[field.name], f"{prefix}{field.name}.")
            for separate in kinds(field.metadata).values():
                yield from leaves(separate, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, field


def test_every_option_has_a_default_and_a_line_of_documentation():
    options = dict(leaves(Config))
    assert len(options) >= 120
    for key, field in options.items():
        assert field.metadata["doc"].endswith((".", ":")), key
        default = field.default
        if choices := field.metadata["choices"]:
            assert default in choices, key
    assert Config() == Config()


def test_config_files_start_from_the_schema():
    config = base.get_config()
    shown, default = config.to_dict(), to_dict(Config())
    # And the options of heads that are not the default's.
    remaining = set(shown["model"]["head"]) - set(default["model"]["head"])
    assert {"bins", "heads", "noise_levels", "parity", "sampling_steps"} <= remaining
    for name in remaining:
        del shown["model"]["head"][name]
    assert shown == default
    config.model.backbone.arch["anything"] = 1
    config.augment.shift = {"primary": 3}
    for group in (config, config.data, config.data.parity, config.model.structure):
        with pytest.raises(AttributeError, match="does not exist"):
            group.anything = 1
    assert "anything" not in base.get_config().model.backbone.arch


def test_moved_options_go_by_their_old_names_in_config_files(caplog):
    config = base.get_config()
    config.data.left_pad = False
    config.data.update({"dct": "accurate", "threads": 3})
    config.update_from_flattened_dict({"model.structure.act_insert": "padded_column"})
    assert (config.data.parity.left_pad, config.data.parity.dct) == (False, "accurate")
    assert (config.data.left_pad, config.data.threads) == (False, 3)
    assert config.model.structure.parity.act_insert == "padded_column"
    assert set(config.to_dict()["data"]) == set(to_dict(Config())["data"])
    assert "config key left_pad is now parity.left_pad" in caplog.text


def test_all_options_are_listed(capsys):
    text = describe()
    for key, _ in leaves(Config):
        assert f"\n{key} = " in f"\n{text}"
    assert "data.parity.dct = 'fast'  (fast | accurate)\n    How JPEGs are decoded" in text
    runpy.run_path(str(ROOT / "configs/base.py"), run_name="__main__")
    assert capsys.readouterr().out.strip() == text.strip()


def test_a_program_may_give_groups_as_dicts(monkeypatch):
    # The hook of the tests asks for what the fields say, before they are made so.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    raw = base.get_config().to_dict()["data"] | {"val_fraction": 0.25}
    config = DataConfig(**raw)
    assert config == dataclasses.replace(Config().data, val_fraction=0.25)
    with pytest.raises(TypeError, match="no_such_option"):
        DataConfig(**raw | {"parity": {"no_such_option": 1}})
