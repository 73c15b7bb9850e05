"""Hugging Face folders and RoboVLMs names: every tensor consumed exactly once, errors complete."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from configs import kosmos_ph
from tests import arrays
from vla_jax.config import resolve
from vla_jax.convert import maps
from vla_jax.convert.formats.safetensors import INDEX
from vla_jax.convert.hf import source as hf
from vla_jax.models import vla, weights
from vla_jax.models.weights import Weight, WeightError
from vla_jax.rules import flatten

FIXTURES = Path(__file__).parents[1] / "fixtures"
TINY = FIXTURES / "hf_kosmos2"


@pytest.fixture(scope="module")
def full():
    return resolve(kosmos_ph.get_config()).model


def shapes_of(config, arch=None):
    model = vla.build(config, arch)
    tree = jax.eval_shape(lambda k: vla.initial_params(model, k), jax.random.key(0))
    return {path: leaf.shape for path, leaf in flatten(tree).items()}


def names_in(path: Path) -> dict[str, tuple[int, ...]]:
    lines = [line.split("\t") for line in path.read_text().splitlines()]
    return {name: tuple(json.loads(shape)) for name, shape, *_ in lines}


def test_full_size_hugging_face_names(full):
    reference = names_in(TINY / "full_param_names.txt")
    rows, ignore = maps.hugging_face(full)
    ours = {k: v for k, v in shapes_of(full).items() if k.startswith("backbone/")}
    assert len(reference) == 886
    assert str(weights.check(rows, ours, reference, ignore)) == ""
    exported = [n for row in rows for n in row.expand(ours[row.target][0])]
    assert sorted(exported) == sorted(reference)


def test_full_size_checkpoint_names(full):
    reference = names_in(FIXTURES / "robokosmos_full_hand_ws16" / "full_param_names.txt")
    rows, ignore = maps.robovlms(full)
    ours = shapes_of(full)
    assert str(weights.check(rows, ours, reference, ignore)) == ""
    count = sum(int(np.prod(shape)) for shape in ours.values())
    assert count == 1_705_698_374  # the released files' number, tied head counted once


def test_report_lists_everything(full):
    reference = names_in(TINY / "full_param_names.txt")
    del reference["text_model.model.layer_norm.bias"]
    reference["text_model.model.layers.3.ffn.fc1.bias"] = (7,)
    reference["text_model.surprise"] = (1,)
    rows, ignore = maps.hugging_face(full)
    ours = {k: v for k, v in shapes_of(full).items() if k.startswith("backbone/")}
    report = weights.check(rows, ours, reference, ignore)
    assert report.missing == ("text_model.model.layer_norm.bias [2048]",)
    assert report.unexpected == ("text_model.surprise",)
    assert report.misshaped == ("text_model.model.layers.3.ffn.fc1.bias: [7], expected [8192]",)


def load_tiny(folder, full):
    arch = hf.read_arch(folder, full)
    shapes = shapes_of(full, arch)
    return hf.load(folder, full, shapes, lambda _, x: jnp.asarray(x))


def test_round_trip_is_bit_exact(full):
    params = load_tiny(TINY, full)
    rows, _ = maps.hugging_face(full)
    exported = {}
    for row in rows:
        exported.update(arrays.to_theirs(row, params))
    original = load_file(TINY / "model.safetensors")
    for name, value in original.items():
        np.testing.assert_array_equal(exported[name], value)
    assert set(exported) - set(original) <= {"text_model.lm_head.weight"}


def copy_of(tmp_path: Path) -> Path:
    shutil.copytree(TINY, tmp_path / "hf")
    return tmp_path / "hf"


def test_sharded_files(tmp_path, full):
    folder = copy_of(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({n: tensors[n] for n in part}, folder / file)
    index = {"weight_map": {n: file for file, part in parts.items() for n in part}}
    (folder / f"model{INDEX}").write_text(json.dumps(index))
    expected = load_tiny(TINY, full)
    got = load_tiny(folder, full)
    assert all(np.array_equal(got[k], v) for k, v in expected.items())
    (folder / "b.safetensors").unlink()
    with pytest.raises(WeightError, match=r"b\.safetensors"):
        load_tiny(folder, full)


def test_truncated_file(tmp_path, full):
    folder = copy_of(tmp_path)
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(WeightError, match=r"model\.safetensors"):
        load_tiny(folder, full)


def test_no_weights(tmp_path, full):
    shutil.copy(TINY / "config.json", tmp_path)
    with pytest.raises(WeightError, match="holds neither"):
        load_tiny(tmp_path, full)


def test_foreign_architecture(tmp_path, full):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava"}))
    with pytest.raises(ValueError, match="'llava', expected 'kosmos-2'"):
        hf.read_arch(tmp_path, full)


def test_overrides_apply_over_the_files(full):
    backbone = dataclasses.replace(full.backbone, arch={"text_config": {"dropout": 0.25}})
    arch = hf.read_arch(TINY, dataclasses.replace(full, backbone=backbone))
    assert arch["text_config"]["dropout"] == 0.25
    assert arch["text_config"]["embed_dim"] == 64


def test_unequal_alias_is_refused():
    rows = [Weight("embed", "e"), Weight("head", "e", alias=True)]
    tensors = {"embed": np.ones((3, 2)), "head": np.zeros((3, 2))}
    with pytest.raises(WeightError, match="aliases that differ"):
        arrays.to_ours(rows, {"e": (3, 2)}, tensors)


def test_a_fused_tensor_is_read_once():
    """Three layers of q, k and v in one tensor each: three reads, whichever part comes first."""
    rng = np.random.default_rng(0)
    reference = {f"h.{i}.qkv": rng.normal(size=(12, 4)).astype(np.float32) for i in range(3)}
    row = Weight("h.{}.qkv", "h/{q,k,v}/kernel", "linear")
    source = arrays.Arrays(reference)
    shapes = dict.fromkeys(row.targets, (3, 4, 2, 2))
    leaves = maps.incoming([row], shapes, source).leaves
    for path in reversed(row.targets):
        expected = arrays.to_ours([row], shapes, reference)[path]
        np.testing.assert_array_equal(leaves[path].read(), expected)
    assert source.reads == list(reference)
    leaves["h/q/kernel"].read()  # once more: a new pass
    assert len(source.reads) == 2 * len(reference)


@pytest.mark.parametrize(
    ("kind", "theirs", "ours"),
    [
        ("linear", (6, 4), (4, 3, 2)),
        ("linear_from_heads", (4, 6), (3, 2, 4)),
        ("patch", (5, 3, 2, 2), (12, 5)),
        ("flat", (6,), (3, 2)),
    ],
)
def test_transforms_invert(kind, theirs, ours):
    x = np.random.default_rng(0).normal(size=theirs)
    forward, back = weights.TRANSFORMS[kind]
    y = forward(x, ours)
    assert y.shape == ours
    np.testing.assert_array_equal(back(y), x)
