"""transformers, torch and PEFT themselves load what the exports write, with the same numbers.

Torch is no dependency. The interpreter that has it (torch, transformers, peft; CPU is enough) is
this one, or the one the environment variable VLA_JAX_TORCH_PYTHON names. A backbone is tried as
soon as its golden folder lies in tests/fixtures, or where VLA_JAX_FIXTURES says.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from launch import convert
from tests.convert import test_lora
from tests.parity import golden
from tests.parity.test_parity import MODELS
from vla_jax.config import LoraConfig
from vla_jax.convert import lora, maps, store
from vla_jax.convert.hf import files as hf_files
from vla_jax.convert.tensors import Lazy
from vla_jax.data.language.tokenizer import Tokenizer
from vla_jax.models import weights as w
from vla_jax.models.backbones import BACKBONES
from vla_jax.models.image import preprocess
from vla_jax.train.lora import factor_shapes

FIXTURES = Path(os.environ.get("VLA_JAX_FIXTURES", Path(__file__).parents[1] / "fixtures"))
KOSMOS = Path(__file__).parents[1] / "fixtures" / "hf_kosmos2"
TEXT = "<image> An image of a robot lift the block"
GENERAL = "AutoModelForImageTextToText"
# model_type -> class of transformers, inputs of the golden folder that its out/logits come from
CLASSES: dict[str, tuple[str, tuple[str, ...]]] = {
    "kosmos-2": (
        GENERAL, ("pixel_values", "input_ids", "attention_mask", "image_embeds_position_mask")
    ),
    "paligemma": (GENERAL, ("pixel_values", "input_ids", "attention_mask")),
    "llava": (GENERAL, ("pixel_values", "input_ids", "attention_mask")),
    "smolvlm": (GENERAL, ("pixel_values", "input_ids", "attention_mask")),
    "qwen2_vl": (GENERAL, ("pixel_values", "input_ids", "attention_mask", "image_grid_thw")),
    "qwen2_5_vl": (GENERAL, ("pixel_values", "input_ids", "attention_mask", "image_grid_thw")),
    "qwen3_vl": (GENERAL, ("pixel_values", "input_ids", "attention_mask", "image_grid_thw")),
}  # fmt: skip


def folders() -> list[Path]:
    """Golden VLMs that transformers has a class for and that we have a backbone for."""
    collected = []
    for path in sorted(FIXTURES.glob("hf_*/config.json")):
        kind = json.loads(path.read_text()).get("model_type")
        if kind in CLASSES and kind in MODELS and (path.parent / "model.safetensors").is_file():
            collected.append(path.parent)
    return collected


@pytest.fixture(scope="module")
def python() -> str:
    path = os.environ.get("VLA_JAX_TORCH_PYTHON", sys.executable)
    probe = subprocess.run([path, "-c", "import torch, transformers"], capture_output=True)
    if probe.returncode:
        pytest.skip(f"{path} has no torch and transformers; set VLA_JAX_TORCH_PYTHON")
    return path


def torch_side(python: str, *arguments: Any) -> Any:
    """What torch_side.py leaves in the file that is its argument OUT.npz, and its report."""
    script = Path(__file__).with_name("torch_side.py")
    done = subprocess.run([python, script, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    loaded = np.load(next(a for a in arguments if str(a).endswith("out.npz")))
    return loaded, json.loads(str(loaded["report"]))


def run(*arguments: Any) -> None:
    assert convert.main([str(a) for a in arguments]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("source_files", [True, False], ids=["copied", "written"])
@pytest.mark.parametrize("fixture", folders(), ids=lambda path: path.name)
def test_transformers_loads_the_export(python, tmp_path, fixture, source_files):
    source, workdir, hf = (tmp_path / name for name in ("source", "run", "hf"))
    shutil.copytree(fixture, source)
    (source / "tokenizer.json").write_text(Tokenizer.build([TEXT], 64).to_json())
    run("import-hf", source, workdir, "--set=model.head.hidden=8")
    if not source_files:
        shutil.rmtree(source)
    run("export-hf", workdir, hf, "--max-shard-gb=3e-4")
    kind = golden.config(fixture)["model_type"]
    io = golden.arrays(fixture)
    photo = np.random.default_rng(0).integers(0, 256, (37, 50, 3), dtype=np.uint8)
    arguments: dict[str, Any] = {k: v for k, v in io.items() if "/" in k}
    # On which the mask of a PaliGemma depends, and whether Gemma 2 caps its scores.
    message = fixture / "meta.json"
    attention = json.loads(message.read_text()).get("attn", "sdpa") if message.is_file() else "sdpa"
    np.savez(tmp_path / "in.npz", photo=photo, attention=attention, **arguments)
    name, inputs = CLASSES[kind]
    reference, report = torch_side(
        python, "folder", hf, tmp_path / "in.npz", tmp_path / "out.npz", name, TEXT, *inputs
    )
    assert {key: report[key] for key in ("missing", "unexpected", "mismatched")} == {
        "missing": [], "unexpected": [], "mismatched": [],
    }  # fmt: skip
    assert report["dtype"] == "torch.float32"
    assert report["processor"].endswith("Processor") or "torchvision" in report["processor"].lower()
    expected, _ = Tokenizer.from_dir(hf).encode(TEXT, len(reference["ids"]))
    np.testing.assert_array_equal(reference["ids"], expected)
    model = store.Stored(workdir).meta["config"]["model"]["backbone"]
    if reference["pixels"].ndim == 4:  # else cut into patches
        spec = BACKBONES[model["name"]](model["arch"]).image_spec
        ours = preprocess(jax.numpy.asarray(photo[None]), spec)
        np.testing.assert_allclose(reference["pixels"].transpose(0, 2, 3, 1), ours, atol=1e-5)
    # The parity runner, on the exported weights, with transformers' logits as the golden ones.
    again = tmp_path / "again"
    again.mkdir()
    shutil.copy(hf / "config.json", again)
    if message.is_file():
        shutil.copy(message, again)
    shards = [load_file(path) for path in sorted(hf.glob("model*.safetensors"))]
    assert len(shards) > 1
    save_file({k: v for shard in shards for k, v in shard.items()}, again / "model.safetensors")
    changed: dict[str, Any] = {**io, "out/logits": reference["logits"]}
    np.savez(again / "io.npz", **changed)
    rows = list(MODELS[kind](again))
    assert any(row.quantity.startswith("logits") for row in rows)
    for row in rows:
        print(f"{fixture.name}: ours against transformers: {row}")
    assert not [row for row in rows if not row.passed]


@pytest.fixture(scope="module")
def kosmos(tmp_path_factory) -> Path:
    """An imported Kosmos-2."""
    where = tmp_path_factory.mktemp("kosmos") / "run"
    run("import-hf", KOSMOS, where, "--set=model.head.hidden=8")
    return where


@pytest.mark.slow
def test_torch_loads_the_export(python, kosmos, tmp_path):
    run("export-hf", kosmos, tmp_path / "hf")
    run("export-robovlms", kosmos, tmp_path / "x.pt")
    paths = tmp_path / "hf", tmp_path / "x.pt", tmp_path / "out.npz"
    _, report = torch_side(python, "pt", *paths)
    assert report["differing"] == []
    assert report["tied"]
    assert report["others"] == ["model.act_head.actions.mlp.0.bias"]


@pytest.mark.slow
def test_peft_loads_the_adapter(python, kosmos, tmp_path):
    """PEFT, given the plain VLM and the adapter, makes the weights that --lora=merge writes."""
    if subprocess.run([python, "-c", "import peft"], capture_output=True).returncode:
        pytest.skip(f"{python} has no peft")
    stored, rng = store.Stored(kosmos), np.random.default_rng(0)
    targets = (r"backbone/text/layers/.*(q|v|o|fc1)/kernel$", r"vision/.*k/kernel$")
    settings = LoraConfig(rank=2, alpha=6.0, dropout=0.1, targets=targets)
    shapes = {path: leaf.shape for path, leaf in stored.leaves.items()}
    leaves = dict(stored.leaves)
    for path, shape in factor_shapes(shapes, settings).items():
        x = rng.normal(size=shape).astype(np.float32)
        leaves[path] = Lazy(x.shape, x.dtype, lambda x=x: x)
    meta = {key: value for key, value in stored.meta.items() if key != "format"}
    meta["config"] = {**meta["config"], "lora": dataclasses.asdict(settings)}
    (tmp_path / "run").mkdir()
    store.write(tmp_path / "run", leaves, meta)
    run("export-hf", tmp_path / "run", tmp_path / "merged")
    run("export-hf", tmp_path / "run", tmp_path / "apart", "--lora=adapter")
    run("import-hf", tmp_path / "apart", tmp_path / "again")
    again = store.Stored(tmp_path / "again").leaves
    assert set(again) == set(leaves)
    assert all(np.array_equal(leaf.read(), leaves[path].read()) for path, leaf in again.items())
    paths = [tmp_path / name for name in ("apart", "apart/adapter", "merged", "out.npz")]
    _, report = torch_side(python, "adapter", *paths)
    print(f"weights, PEFT's merge against ours: {report}")
    assert report["change"] > 1
    assert report["error"] < 1e-5


# A module of several kernels of ours, as no transformers model of CLASSES has one.
JOINT = """
import json, sys, torch
from peft import PeftModel
from safetensors.torch import load_file

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        layers = [{"qkv": torch.nn.Linear(5, 36, False)} for _ in range(2)]
        self.layers = torch.nn.ModuleList(map(torch.nn.ModuleDict, layers))

model = Model()
model.load_state_dict(load_file(sys.argv[1] + "/plain.safetensors"))
merged = PeftModel.from_pretrained(model, sys.argv[1]).merge_and_unload().state_dict()
ours = load_file(sys.argv[1] + "/merged.safetensors")
print(json.dumps(max(float((ours[name] - x).abs().max()) for name, x in merged.items())))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["linear", "interleaved_linear"])
def test_peft_loads_stacked_factors(python, tmp_path, kind):
    if subprocess.run([python, "-c", "import peft"], capture_output=True).returncode:
        pytest.skip(f"{python} has no peft")
    arrays = test_lora.joint_arrays("qv")
    rows = [w.Weight("layers.{}.qkv.weight", test_lora.JOINT, kind)]
    leaves = {path: test_lora.lazy(x) for path, x in arrays.items()}
    plain = {path: leaf for path, leaf in leaves.items() if not lora.is_factor(path)}
    merged = lora.merged(leaves, test_lora.ALPHA / test_lora.RANK)
    factors = test_lora.outgoing(rows, leaves)
    for name, case in (
        ("plain.safetensors", maps.outgoing(rows, plain)),
        ("merged.safetensors", maps.outgoing(rows, merged)),
        (lora.WEIGHTS, factors),
    ):
        save_file(dict(case.tensors()), tmp_path / name)
    settings = {"rank": test_lora.RANK, "alpha": test_lora.ALPHA, "dropout": 0.0}
    hf_files.write_json(
        tmp_path / lora.SETTINGS, lora.adapter_config(settings, factors.shapes, "x")
    )
    done = subprocess.run([python, "-c", JOINT, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) < 1e-4
