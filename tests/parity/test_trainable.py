"""What trains under a `train_setup`, against the original's gradients."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from configs import base
from vla_jax import rules
from vla_jax.config import ConfigError, ModelConfig, resolve
from vla_jax.convert import maps
from vla_jax.convert.robovlms import config as robovlms_config
from vla_jax.convert.robovlms import source as robovlms
from vla_jax.models.backbones import BACKBONES
from vla_jax.models.heads import HEADS
from vla_jax.train import split


def _open(folder: Path) -> tuple[dict[str, Any], ModelConfig] | None:
    """The original's config of a folder with gradients, and ours; None where we lack a part."""
    if not (folder / "grads.json").is_file() or not (folder / "config.json").is_file():
        return None
    original = json.loads((folder / "config.json").read_text())
    try:
        raw = robovlms.to_config(original, base.get_config().to_dict())
    except ConfigError:
        return None
    model = resolve(raw).model
    expected = model.backbone.name in BACKBONES and model.head.kind in HEADS
    return (original, model) if expected else None


def pytest_generate_tests(metafunc: pytest.Metafunc):
    folders: list[Path] = metafunc.config.stash[metafunc.config.parity_folders]  # type: ignore[attr-defined]
    metafunc.parametrize("folder", [pytest.param(x, id=x.name) for x in folders if _open(x)])


def test_what_has_no_gradient_there_is_frozen_here(folder: Path):
    opened = _open(folder)
    assert opened
    original, model = opened
    rows, _ = maps.robovlms(model, prefix="")
    name, setup = original["robovlm_name"], original["train_setup"]
    frozen, trained = robovlms_config.what_trains(name, setup)
    table = [*trained, *((pattern, split.NONE) for pattern in frozen), ("", split.ALL)]
    grads = json.loads((folder / "grads.json").read_text())
    sources = [(re.escape(row.source).replace(r"\{\}", r"\d+"), row) for row in rows]
    observed, wrong = 0, []
    for name, norm in grads["grad_norms"].items():
        for row in (row for pattern, row in sources if re.fullmatch(pattern, name)):
            for path in row.targets:
                trains = rules.match(table, path) != split.NONE
                observed += 1
                # What may train there and is never used has no gradient: either will do.
                unused = norm is None and name in grads["trainable"]
                if trains != (norm is not None) and not unused:
                    wrong.append(f"{name} -> {path}: trains {trains}, gradient there {norm}")
    assert observed >= len(grads["trainable"])
    assert not wrong, "\n".join(wrong)
