"""transformers and torch themselves load what the exports write, with the same logits.

Torch is no dependency. The interpreter that has it (torch, transformers, CPU is enough) is this
one, or the one the environment variable VLA_JAX_TORCH_PYTHON names.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch import convert
from tests.parity import golden
from vla_jax.convert import store
from vla_jax.data.text import Tokenizer
from vla_jax.models.backbones import kosmos2
from vla_jax.rules import unflatten

TINY = Path(__file__).parents[1] / "fixtures" / "hf_kosmos2"
TEXT = "<grounding>An image of a robot lift the block"


@pytest.fixture(scope="module")
def python() -> str:
    path = os.environ.get("VLA_JAX_TORCH_PYTHON", sys.executable)
    probe = subprocess.run([path, "-c", "import torch, transformers"], capture_output=True)
    if probe.returncode:
        pytest.skip(f"{path} has no torch and transformers; set VLA_JAX_TORCH_PYTHON")
    return path


def logits_of(run: Path) -> np.ndarray:
    """The golden inputs through our model, with the weights of a checkpoint."""
    stored, io = store.Stored(run), golden.arrays(TINY)
    arch = stored.meta["config"]["model"]["backbone"]["arch"]
    params = unflatten({p: jnp.asarray(leaf.read()) for p, leaf in stored.leaves.items()})
    model, tree = kosmos2.Kosmos2(arch, remat="none"), {"params": params["backbone"]}
    images = jnp.asarray(io["in/pixel_values"].transpose(0, 2, 3, 1))
    tokens = model.apply(tree, images, method="encode_images")
    ids = io["in/input_ids"].astype(np.int32)
    embeds = np.array(model.apply(tree, jnp.asarray(ids), method="embed_text"))
    embeds[io["in/image_embeds_position_mask"].astype(bool)] = np.asarray(tokens).reshape(
        -1, embeds.shape[-1]
    )
    pad = arch["text_config"]["pad_token_id"]
    positions = jnp.asarray(np.cumsum(ids != pad, axis=1) * (ids != pad) + pad, jnp.int32)
    valid = jnp.asarray(io["in/attention_mask"].astype(bool))
    hidden: Any = model.apply(
        tree, jnp.asarray(embeds), valid, positions, method=lambda m, *args: m.text(*args)
    )
    return np.asarray(jax.jit(lambda h: model.apply(tree, h, method="logits"))(hidden))


@pytest.mark.slow
@pytest.mark.parametrize("source_files", [True, False], ids=["copied", "written"])
def test_transformers_loads_the_export(python, tmp_path, source_files):
    source, run = tmp_path / "source", tmp_path / "run"
    shutil.copytree(TINY, source)
    (source / "tokenizer.json").write_text(Tokenizer.build([TEXT], 64).to_json())
    assert convert.main(["import-hf", str(source), str(run), "--set=model.head.hidden=8"]) == 0
    if not source_files:
        shutil.rmtree(source)
    assert convert.main(["export-hf", str(run), str(tmp_path / "hf"), "--max-shard-gb=3e-4"]) == 0
    assert convert.main(["export-robovlms", str(run), str(tmp_path / "x.pt")]) == 0
    script = Path(__file__).with_name("torch_side.py")
    files = [tmp_path / "hf", TINY / "io.npz", tmp_path / "out.npz", tmp_path / "x.pt"]
    done = subprocess.run([python, script, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = np.load(tmp_path / "out.npz")
    report = json.loads(str(theirs["report"]))
    mean = report.pop("image_mean") if not source_files else None
    assert {key: report[key] for key in ("missing", "unexpected", "mismatched", "differing")} == {
        "missing": [], "unexpected": [], "mismatched": [], "differing": [],
    }  # fmt: skip
    assert report["dtype"] == "torch.float32"
    assert report["tied"]
    assert report["others"] == ["model.act_head.actions.mlp.0.bias"]
    if mean:
        np.testing.assert_allclose(mean, (0.48145466, 0.4578275, 0.40821073))
    expected, _ = Tokenizer.from_dir(tmp_path / "hf").encode(TEXT, len(theirs["ids"]))
    np.testing.assert_array_equal(theirs["ids"], expected)
    error = np.abs(logits_of(run) - theirs["logits"]).max()
    print(f"logits, ours against transformers: {error:.1e}")
    assert error < 1e-4
    np.testing.assert_allclose(theirs["logits"], golden.arrays(TINY)["out/logits"], atol=1e-4)
