"""A new run from nothing, from a Hugging Face folder, from a checkpoint."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launch import convert
from tests.parity.original import head_config
from vla_jax.config import ConfigError, resolve
from vla_jax.convert import importing, store
from vla_jax.convert.hf import source as hf
from vla_jax.convert.start import Start
from vla_jax.data.language.tokenizer import Tokenizer
from vla_jax.models import vla
from vla_jax.models.heads import HEADS
from vla_jax.models.weights import WeightError
from vla_jax.train import checkpoint

TINY = Path(__file__).parents[1] / "fixtures" / "hf_kosmos2"


@pytest.fixture(scope="module")
def imported(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    shutil.copytree(TINY, folder / "hf")
    (folder / "hf" / "tokenizer.json").write_text(Tokenizer.build(["a b"], 64).to_json())
    small = ("--set=model.head.hidden=8", "--set=model.head.layers=1")
    assert convert.main(["import-hf", str(folder / "hf"), str(folder / "run"), *small]) == 0
    return folder / "run"


@pytest.fixture
def config(imported):
    return resolve(store.Stored(imported).meta["config"]).model


def test_from_a_checkpoint(imported, config, caplog):
    plain = dataclasses.replace(config.backbone, arch={}, hf_dir="")
    start = Start(dataclasses.replace(config, backbone=plain), imported)
    arch = start.arch()
    assert arch == hf.read_arch(TINY, config)
    tokenizer = start.tokenizer()
    assert tokenizer is not None
    assert tokenizer.token_id("a") == 5
    leaves = store.Stored(imported).leaves
    shapes = {path: leaf.shape for path, leaf in leaves.items()}
    loaded = start.load(shapes, lambda _, x: x)
    assert set(loaded) == set(shapes)
    np.testing.assert_array_equal(loaded["action_token"], leaves["action_token"].read())
    kernel = "head/layer0/state_kernel"
    np.testing.assert_array_equal(loaded[kernel], leaves[kernel].read())

    # Of another head what fits is taken, and the rest is listed; of another VLM nothing.
    shapes["head/more"] = shapes.pop("action_token")
    shapes[kernel] = (9, 9)
    loaded = start.load(shapes, lambda _, x: x)
    assert set(loaded) == set(shapes) - {"head/more", kernel}
    for line in ("missing:\n  head/more", "unexpected:\n  action_token", f"{kernel}: [8, 32]"):
        assert line in caplog.text
    shapes["backbone/more"] = (2,)
    with pytest.raises(WeightError, match="missing:\n  backbone/more") as caught:
        start.load(shapes, lambda _, x: x)
    assert "head/more" not in str(caught.value)


# Two are not for Kosmos-2, and FAST tokens need a tokenizer of their own.
@pytest.mark.parametrize("head", sorted(set(HEADS) - {"expert_flow", "l1", "fast"}))
def test_any_head_of_any_robot_starts_from_an_imported_vlm(imported, config, head):
    """26 joints, no gripper, one camera, another head: the VLM is taken whole."""
    structure = dataclasses.replace(
        config.structure,
        kind="discrete" if head == "detokenizer" else "policy_head",
        cameras=("primary",),
        window=1 if head == "detokenizer" else 2,
        chunk=3,
    )
    options: dict[str, Any] = {**vars(config.head), "kind": head, "bins": 20}
    changed = dataclasses.replace(
        config,
        head=head_config(**options),
        structure=structure,
        action_dim=26,
        gripper="none",
    )
    start = Start(changed, imported)
    shapes = importing.shapes_of(vla.build(changed, start.arch()))
    loaded = start.load(shapes, lambda _, x: x.shape)
    assert {p for p in loaded if p.startswith("backbone/")} == {
        path for path in shapes if path.startswith("backbone/")
    }
    assert "head/output/arm/fc3/kernel" not in loaded
    assert all(shapes[path] == shape for path, shape in loaded.items())


def test_a_folder_and_nothing(imported, config):
    start = Start(config)
    assert start.arch() == config.backbone.arch
    assert start.tokenizer() is not None
    shapes = {path: leaf.shape for path, leaf in store.Stored(imported).leaves.items()}
    loaded = start.load(shapes, lambda _, x: x.shape)
    assert loaded == {path: s for path, s in shapes.items() if path.startswith("backbone/")}
    nothing = Start(
        dataclasses.replace(config, backbone=dataclasses.replace(config.backbone, hf_dir=""))
    )
    assert (nothing.arch(), nothing.tokenizer()) == (None, None)
    assert nothing.load(shapes, lambda _, x: x) == {}


def test_a_resumed_run_opens_neither_folder_nor_checkpoint(imported, config, tmp_path):
    meta = store.Stored(imported).meta
    gone = dataclasses.replace(config.backbone, arch={}, hf_dir=str(tmp_path / "gone"))
    lost = dataclasses.replace(config, backbone=gone)
    assert Start(lost, None, meta).arch() == config.backbone.arch
    plain = dataclasses.replace(config, backbone=dataclasses.replace(gone, hf_dir=""))
    assert Start(plain, tmp_path / "none", meta).arch() == config.backbone.arch
    # Overrides count as ever, for `train.resume` to compare.
    wider = dataclasses.replace(gone, arch={"latent_query_num": 9})
    arch = Start(dataclasses.replace(config, backbone=wider), None, meta).arch()
    assert arch == {**config.backbone.arch, "latent_query_num": 9}


def test_a_resumed_run_from_random_weights_has_its_config_alone(imported, config):
    meta = store.Stored(imported).meta
    meta["origin"], meta["config"]["model"]["backbone"]["hf_dir"] = {}, ""
    plain = dataclasses.replace(config.backbone, hf_dir="")
    assert Start(dataclasses.replace(config, backbone=plain), None, meta).arch() is None


def test_what_cannot_be(imported, config, tmp_path):
    other = dataclasses.replace(config.backbone, name="other")
    with pytest.raises(ConfigError, match=r"backbone.name: 'other', and .* holds a 'kosmos2'"):
        Start(dataclasses.replace(config, backbone=other), imported)
    with pytest.raises(checkpoint.CheckpointError, match="no such folder"):
        Start(config, tmp_path / "none")
    with pytest.raises(checkpoint.CheckpointError, match="start one from them with --init"):
        checkpoint.Checkpoints(imported)
    stored = store.Stored(imported)
    (tmp_path / "run").mkdir()
    meta = {k: v for k, v in stored.meta.items() if k != "format"} | {"tokenizer": ""}
    store.write(tmp_path / "run", stored.leaves, json.loads(json.dumps(meta)))
    with pytest.raises(ConfigError, match="has no tokenizer"):
        Start(config, tmp_path / "run").tokenizer()
