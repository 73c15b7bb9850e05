"""Parity of the vision side: towers, resamplers, image preprocessing.

`KINDS` runs what a folder holds of it; a backbone's own cases can use the functions here for their
image features: each yields rows for one kind of folder.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests import arrays
from tests.parity import golden
from tests.parity.table import Row, compare
from vla_jax.models import image, weights
from vla_jax.models.towers import resampler, vision_families
from vla_jax.models.towers.vit import VisionSpec, VisionTransformer
from vla_jax.rules import flatten, unflatten

# Relative to the size of what is compared, like all tolerances here.
TOLERANCE = 1e-4
# Every tiny model of the golden set has four heads where its files do not say.
HEADS = 4
Arrays = Mapping[str, np.ndarray]


def channels_last(x: np.ndarray) -> jax.Array:
    return jnp.asarray(np.moveaxis(x, -3, -1))


def compare_scaled(quantity: str, got: Any, expected: np.ndarray) -> Row:
    scale = float(np.abs(expected).max())
    return compare(quantity, got, expected, TOLERANCE * scale)


class Filled:
    """A module with the weights of a folder, and its rows' way back."""

    def __init__(self, module: Any, rows: Sequence[weights.Weight], theirs: Arrays, *args: Any):
        self.module = module
        abstract = jax.eval_shape(lambda: module.init(jax.random.key(0), *args))["params"]
        shapes = {path: leaf.shape for path, leaf in flatten(abstract).items()}
        flat = arrays.to_ours(rows, shapes, theirs, ignore=(".",))
        self.params = unflatten(flat)
        back: dict[str, np.ndarray] = {}
        for row in rows:
            back |= arrays.to_theirs(row, flat)
        self.changed = [k for k in back if not np.array_equal(back[k], theirs[k])]

    def __call__(self, *args: Any, method: str | None = None) -> Any:
        tree = jax.tree.map(jnp.asarray, self.params)
        return self.module.apply({"params": tree}, *args, method=method)

    def exported(self, quantity: str) -> Row:
        """Zero error when every tensor came back to the bit."""
        changed = f" ({', '.join(self.changed)} changed)" if self.changed else ""
        return compare(f"{quantity}, exported again{changed}", len(self.changed), 0, 0.0)


def tower(spec: VisionSpec, rows: Sequence[weights.Weight], theirs: Arrays, x: Any) -> Filled:
    return Filled(VisionTransformer(spec, "none"), rows, theirs, x)


def prefix(theirs: Arrays, part: str) -> str:
    """What stands before `part` in the first name that has it."""
    return next(name.split(part)[0] for name in theirs if part in name)


def dense(theirs: Arrays, name: str, x: Any) -> jax.Array:
    return x @ theirs[name + ".weight"].T + theirs[name + ".bias"]


def clip_model(folder: Path) -> Iterator[Row]:
    """CLIPVisionModel: every hidden state, and the class token's norm."""
    io, config, reference = golden.arrays(folder), golden.config(folder), golden.weights(folder)
    x, source = channels_last(io["in/pixel_values"]), prefix(reference, "embeddings.")
    for take in range(-1, -config["num_hidden_layers"] - 1, -1):
        spec = vision_families.clip(config, take=take)
        model = tower(spec, vision_families.hugging_face_weights(spec, source, ""), reference, x)
        number = config["num_hidden_layers"] + 1 + take
        yield compare_scaled(f"hidden {number}", model(x).tokens, io[f"out/hidden_{number}"])
    spec = vision_families.clip(config, post_norm=True)
    model = tower(spec, vision_families.hugging_face_weights(spec, source, ""), reference, x)
    yield compare_scaled("pooler", model(x).tokens[:, 0], io["out/pooler"])
    yield model.exported("tower")


def siglip_model(folder: Path) -> Iterator[Row]:
    """SiglipVisionModel with its pooling head."""
    io, config, reference = golden.arrays(folder), golden.config(folder), golden.weights(folder)
    x, source = channels_last(io["in/pixel_values"]), prefix(reference, "embeddings.")
    spec = vision_families.siglip(config)
    rows = vision_families.hugging_face_weights(spec, source, "")
    model = tower(spec, rows, reference, x)
    last = model(x).tokens
    yield compare_scaled("last hidden", last, io["out/last_hidden"])
    yield model.exported("tower")
    if "out/pooler" in io:
        head = resampler.AttentionPool(
            spec.block.heads, spec.block.hidden, spec.block.activation, spec.block.eps
        )
        rows = weights.prefixed(resampler.attention_pool_weights(), source + "head.", "")
        pool = Filled(head, rows, reference, last)
        yield compare_scaled("pooler", pool(last), io["out/pooler"])
        yield pool.exported("pooling head")


def uform_pooler(folder: Path) -> Iterator[Row]:
    """UForm-Gen2's pooler, projecting last."""
    io, reference = golden.arrays(folder), golden.weights(folder)
    x = jnp.asarray(io["in/features"])
    queries = reference["image_latents"].shape[1]
    width, hidden = len(reference["projection.weight"]), len(reference["pooler.linear1.bias"])
    module = resampler.LatentDecoder(queries, width, HEADS, hidden, project_first=False)
    pooler = Filled(module, resampler.latent_decoder_weights(), reference, x)
    yield compare_scaled("latents", pooler(x), io["out/latents"])
    yield pooler.exported("pooler")


def open_flamingo(folder: Path) -> Iterator[Row]:
    """OpenAI's CLIP as open_clip keeps it, and the perceiver."""
    io, reference = golden.arrays(folder), golden.weights(folder)
    lead = io["in/vision_x"].shape[:-3]
    x = channels_last(io["in/vision_x"])
    x, source = x.reshape(-1, *x.shape[-3:]), "vision_encoder."
    patch, blocks = reference[source + "conv1.weight"], source + "transformer.resblocks."
    depth = 1 + max(int(k[len(blocks) :].split(".")[0]) for k in reference if blocks in k)
    hidden = len(reference[blocks + "0.mlp.c_fc.bias"])
    spec = vision_families.open_clip(
        len(patch), depth, HEADS, hidden, patch.shape[-1], x.shape[1], class_token=True,
        keep_class=False,
    )  # fmt: skip
    model = tower(spec, vision_families.open_clip_weights(spec, source, ""), reference, x)
    tokens = model(x).tokens
    yield compare_scaled("CLIP tokens", tokens, io["out/clip_tokens"])
    yield model.exported("tower")
    # One frame a media: its tokens alone are resampled.
    depth = 1 + max(int(k.split(".")[2]) for k in reference if k.startswith("perceiver.layers."))
    module = resampler.Perceiver(len(reference["perceiver.latents"]), depth, remat="none")
    rows = weights.prefixed(resampler.perceiver_weights(), "perceiver.", "")
    perceiver = Filled(module, rows, reference, tokens)
    latents = perceiver(tokens).reshape(*lead[:-1], -1, spec.width)
    yield compare_scaled("latents", latents, io["out/vis_x"])
    yield perceiver.exported("perceiver")


def preprocess(folder: Path) -> Iterator[Row]:
    """Squashed, bicubic, CLIP's mean; cases are named by their sizes, `84x84to28`."""
    io = golden.arrays(folder)
    clip = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    for case in sorted({k.split("/")[0] for k in io}):
        source, size = case.split("to")
        height, width = (int(side) for side in source.split("x"))
        pixels = io[f"{case}/in"]
        if pixels.shape[:2] != (height, width):
            continue  # a part of the image was kept, which says nothing about any output row
        spec = image.ImageSpec(int(size), *clip)
        got = np.moveaxis(np.asarray(image.preprocess(jnp.asarray(pixels), spec)), -1, 0)
        expected = io[f"{case}/out"]
        yield compare(case, got[:, : expected.shape[1]], expected, 2e-6)
        total = got.astype(np.float64).sum()
        yield compare(f"{case} mean", total / got.size, io[f"{case}/sum"] / got.size, 1e-7)


Runner = Callable[[Path], Iterator[Row]]

# `model_type` of config.json, or `cls` of meta.json -> what runs the folder
KINDS: dict[str, Runner] = {
    "clip_vision_model": clip_model,
    "siglip_vision_model": siglip_model,
    "PoolerGen2": uform_pooler,
    "Flamingo": open_flamingo,
}


def find(folder: Path) -> Runner | None:
    """What runs the vision side of a folder, by what the folder says it is."""
    collected = {}
    for name in ("meta.json", "config.json"):
        if (folder / name).is_file():
            collected |= json.loads((folder / name).read_text())
    if not (folder / "io.npz").is_file() or "robovlm_name" in collected:
        return None
    names = np.load(folder / "io.npz").files
    if any(n.split("/")[0].partition("to")[2].isdigit() for n in names):
        return preprocess
    kind = collected.get("model_type", collected.get("cls"))
    return KINDS.get(kind) if kind else None
