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

from tests.parity import golden
from tests.parity.table import Row, compare
from vla_jax.convert import maps
from vla_jax.models import image, layers, resampler, resnet, tiles, towers, weights
from vla_jax.models.vit import VisionSpec, VisionTransformer
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
        found = {k: v.shape for k, v in theirs.items()}
        flat = maps.load(rows, shapes, found, theirs.__getitem__, ignore=(".",))
        self.params = unflatten(flat)
        back: dict[str, np.ndarray] = {}
        for row in rows:
            back |= weights.to_theirs(row, flat)
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
    io, config, theirs = golden.arrays(folder), golden.config(folder), golden.weights(folder)
    x, source = channels_last(io["in/pixel_values"]), prefix(theirs, "embeddings.")
    for take in range(-1, -config["num_hidden_layers"] - 1, -1):
        spec = towers.clip(config, take=take)
        model = tower(spec, towers.hugging_face_weights(spec, source, ""), theirs, x)
        number = config["num_hidden_layers"] + 1 + take
        yield compare_scaled(f"hidden {number}", model(x), io[f"out/hidden_{number}"])
    spec = towers.clip(config, post_norm=True)
    model = tower(spec, towers.hugging_face_weights(spec, source, ""), theirs, x)
    yield compare_scaled("pooler", model(x)[:, 0], io["out/pooler"])
    yield model.exported("tower")


def siglip_model(folder: Path) -> Iterator[Row]:
    """SiglipVisionModel with its pooling head."""
    io, config, theirs = golden.arrays(folder), golden.config(folder), golden.weights(folder)
    x, source = channels_last(io["in/pixel_values"]), prefix(theirs, "embeddings.")
    spec = towers.siglip(config)
    rows = towers.hugging_face_weights(spec, source, "")
    model = tower(spec, rows, theirs, x)
    last = model(x)
    yield compare_scaled("last hidden", last, io["out/last_hidden"])
    yield model.exported("tower")
    if "out/pooler" in io:
        head = resampler.AttentionPool(
            spec.block.heads, spec.block.hidden, spec.block.activation, spec.block.eps
        )
        rows = weights.prefixed(resampler.attention_pool_weights(), source + "head.", "")
        pool = Filled(head, rows, theirs, last)
        yield compare_scaled("pooler", pool(last), io["out/pooler"])
        yield pool.exported("pooling head")


def paligemma(folder: Path) -> Iterator[Row]:
    """SigLIP, then the projector (transformers 5 does not divide by the root of the width)."""
    io, config, theirs = golden.arrays(folder), golden.config(folder), golden.weights(folder)
    x, spec = channels_last(io["in/pixel_values"]), towers.siglip(config["vision_config"])
    source = prefix(theirs, "embeddings.position")
    model = tower(spec, towers.hugging_face_weights(spec, source, ""), theirs, x)
    y = dense(theirs, prefix(theirs, "linear.weight") + "linear", model(x))
    yield compare_scaled("image features", y, io["out/image_features"])
    yield model.exported("tower")


def qwen_vl(folder: Path) -> Iterator[Row]:
    """Qwen-VL's tower and resampler, alone or inside the whole model."""
    io, theirs = golden.arrays(folder), golden.weights(folder)
    source = prefix(theirs, "positional_embedding")
    x = channels_last(io["in/pixel_values"])
    patch, blocks = theirs[source + "conv1.weight"], source + "transformer.resblocks."
    hidden = len(theirs[blocks + "0.mlp.c_fc.bias"])
    config = {
        "width": len(patch),
        "layers": 1 + max(int(k[len(blocks) :].split(".")[0]) for k in theirs if blocks in k),
        "heads": HEADS,
        "mlp_ratio": hidden / len(patch),
        "patch_size": patch.shape[-1],
        "image_size": x.shape[1],
    }
    spec = towers.qwen_vl(config)
    rows = towers.open_clip_weights(spec, source, "", by_head=True)
    model = tower(spec, rows, theirs, x)
    tokens = model(x)
    queries, width = theirs[source + "attn_pool.query"].shape
    module = towers.qwen_vl_resampler(spec, queries, width)
    rows = weights.prefixed(resampler.positioned_queries_weights(), source, "")
    pool = Filled(module, rows, theirs, tokens)
    yield compare_scaled("image features", pool(tokens), io["out/image_features"])
    yield model.exported("tower")
    yield pool.exported("resampler")


def frames(patches: np.ndarray, grid: tuple[int, int], config: Mapping[str, Any]) -> np.ndarray:
    """Qwen2-VL's flattened patches of one image -> [1, frames, h, x, 3].

    They come square of merged patches by square; channels, frames, rows, columns in each.
    """
    (rows, columns), p, m = grid, config["patch_size"], config["spatial_merge_size"]
    x = patches.reshape(rows // m, columns // m, m, m, 3, config["temporal_patch_size"], p, p)
    return x.transpose(5, 0, 2, 6, 1, 3, 7, 4).reshape(1, -1, rows * p, columns * p, 3)


def square_by_square(tokens: Any, grid: tuple[int, int], side: int, window: int = 0) -> np.ndarray:
    """Tokens [1, n, d] row by row -> in the order of Qwen2-VL's, [n, d].

    With windows (in patches) as Qwen2.5-VL keeps them inside: window by window.
    """
    rows, columns = grid[0] // side, grid[1] // side
    x = np.asarray(tokens).reshape(rows, side, columns, side, -1).swapaxes(1, 2)
    x = x.reshape(rows * columns, side * side, -1)
    if window:
        each = window // side
        y, z = np.divmod(np.arange(rows * columns), columns)
        x = x[np.lexsort((z, y, z // each, y // each))]
    return x.reshape(grid[0] * grid[1], -1)


def qwen2_vl(folder: Path) -> Iterator[Row]:
    """Qwen2-VL, Qwen2.5-VL and Qwen3-VL: tower, merger, deepstack, an image at a time."""
    io, config, theirs = golden.arrays(folder), golden.config(folder), golden.weights(folder)
    build = {
        "qwen2_vl": towers.qwen2_vl,
        "qwen2_5_vl": towers.qwen2_5_vl,
        "qwen3_vl": towers.qwen3_vl,
    }[config["model_type"]]
    vision, source, start = config["vision_config"], prefix(theirs, "patch_embed"), 0
    merge = vision["spatial_merge_size"]
    for i, (_, height, width) in enumerate(io["in/image_grid_thw"].tolist()):
        grid, end = (height, width), start + height * width
        x = jnp.asarray(frames(io["in/pixel_values"][start:end], grid, vision))
        spec = build(vision, grid)
        model = tower(spec, towers.qwen2_weights(spec, source, ""), theirs, x)
        tokens, taps = model(x, method="with_taps")
        last = square_by_square(tokens, grid, merge, spec.window)
        expected = io["out/vision_last_hidden_state"][start:end]
        yield compare_scaled(f"image {i} last hidden", last, expected)
        merged = slice(start // merge**2, end // merge**2)
        # (parameter group, tokens, where the original's output is)
        outputs = [("merger.", tokens, "out/vision_pooler_output")] + [
            (f"deepstack_merger_list.{j}.", tap, f"out/vision_deepstack_features_{j}")
            for j, tap in enumerate(taps)
        ]
        for name, before, golden_name in outputs:
            module, rows = towers.qwen2_merger(spec, vision, deepstack="deepstack" in name)
            merger = Filled(module, weights.prefixed(rows, source + name, ""), theirs, before)
            expected = io[golden_name][merged]
            yield compare_scaled(f"image {i} {name[:-1]}", merger(before)[0], expected)
            if i == 0:
                yield merger.exported(name[:-1])
        start = end
    yield model.exported("tower")  # pyright: ignore[reportPossiblyUnboundVariable]


def moondream(folder: Path) -> Iterator[Row]:
    """Moondream's SigLIP and its projection; one stream or two, tiles where the folder has them."""
    io, theirs = golden.arrays(folder), golden.weights(folder)
    source = "vision_encoder.encoder.model.visual."
    x = channels_last(io["in/pixel_values"])
    spec = _moondream_spec(theirs, source, x.shape[1])
    model = tower(spec, towers.moondream_weights(source, ""), theirs, x)
    first = theirs["vision_encoder.projection.mlp.fc1.weight"]

    def features(images: jax.Array) -> jax.Array:
        two = first.shape[1] == 2 * spec.width
        tokens = tiles.two_streams(model, images, spec) if two else model(images)
        y = dense(theirs, "vision_encoder.projection.mlp.fc1", tokens)
        y = layers.ACTIVATIONS["gelu_pytorch_tanh"](y)
        return dense(theirs, "vision_encoder.projection.mlp.fc2", y)

    yield compare_scaled("image features", features(x), io["out/image_features"])
    if "in/pixel_values_2crop" in io:
        y = features(channels_last(io["in/pixel_values_2crop"]))
        yield compare_scaled("image features of two tiles", y, io["out/image_features_2crop"])
    yield model.exported("tower")


def moondream_new(folder: Path) -> Iterator[Row]:
    """The tower under the names of 2025."""
    io, theirs = golden.arrays(folder), golden.weights(folder)
    x, names = channels_last(io["in/pixel_values"]), towers.MOONDREAM_2025
    spec = _moondream_spec(theirs, "vision.", x.shape[1], "patch_emb")
    model = tower(spec, towers.moondream_weights("vision.", "", names), theirs, x)
    yield compare_scaled("vision features", model(x), io["out/vision_features"])
    yield model.exported("tower")


def _moondream_spec(
    theirs: Arrays, source: str, side: int, patch: str = "patch_embed.linear"
) -> VisionSpec:
    blocks = source + "blocks."
    width, size = theirs[f"{source}{patch}.weight"].shape
    depth = 1 + max(int(k[len(blocks) :].split(".")[0]) for k in theirs if blocks in k)
    hidden = len(theirs[blocks + "0.mlp.fc1.bias"])
    return towers.timm_siglip(width, depth, HEADS, hidden, round((size // 3) ** 0.5), side)


def uform(folder: Path) -> Iterator[Row]:
    """UForm-Gen: encoder and pooler, projecting first."""
    io, theirs = golden.arrays(folder), golden.weights(folder)
    config = golden.config(folder, "meta.json")["config"]
    x, spec = channels_last(io["in/images"]), towers.uform(config)
    model = tower(spec, towers.uform_weights("image_encoder.", ""), theirs, x)
    tokens = model(x)
    yield compare_scaled("encoder features", tokens, io["out/encoder_features"])
    yield model.exported("tower")
    heads = config["image_pooler_num_attn_heads"]
    yield from _pooler(theirs, "image_pooler.", heads, tokens, io["out/image_latents"])


def uform_pooler(folder: Path) -> Iterator[Row]:
    """UForm-Gen2's pooler, projecting last."""
    io = golden.arrays(folder)
    x = jnp.asarray(io["in/features"])
    yield from _pooler(golden.weights(folder), "", HEADS, x, io["out/latents"])


def _pooler(theirs: Arrays, source: str, heads: int, x: Any, expected: np.ndarray) -> Iterator[Row]:
    _, queries, inner = theirs[source + "image_latents"].shape
    width, before = theirs[source + "projection.weight"].shape
    # The two generations keep the same names; which it is, is in the shapes. Where all widths are
    # the same nothing tells; no released model is so.
    first = inner == width and before == x.shape[-1] and width != before
    hidden = len(theirs[source + "pooler.linear1.bias"])
    module = resampler.LatentDecoder(queries, width, heads, hidden, project_first=first)
    rows = weights.prefixed(resampler.latent_decoder_weights(), source, "")
    pooler = Filled(module, rows, theirs, x)
    yield compare_scaled("latents", pooler(x), expected)
    yield pooler.exported("pooler")


def open_flamingo(folder: Path) -> Iterator[Row]:
    """OpenAI's CLIP as open_clip keeps it, and the perceiver."""
    io, theirs = golden.arrays(folder), golden.weights(folder)
    lead = io["in/vision_x"].shape[:-3]
    x = channels_last(io["in/vision_x"])
    x, source = x.reshape(-1, *x.shape[-3:]), "vision_encoder."
    patch, blocks = theirs[source + "conv1.weight"], source + "transformer.resblocks."
    depth = 1 + max(int(k[len(blocks) :].split(".")[0]) for k in theirs if blocks in k)
    hidden = len(theirs[blocks + "0.mlp.c_fc.bias"])
    spec = towers.open_clip(
        len(patch), depth, HEADS, hidden, patch.shape[-1], x.shape[1], class_token=True,
        keep_class=False,
    )  # fmt: skip
    model = tower(spec, towers.open_clip_weights(spec, source, ""), theirs, x)
    tokens = model(x)
    yield compare_scaled("CLIP tokens", tokens, io["out/clip_tokens"])
    yield model.exported("tower")
    # One frame a media: its tokens alone are resampled.
    depth = 1 + max(int(k.split(".")[2]) for k in theirs if k.startswith("perceiver.layers."))
    module = resampler.Perceiver(len(theirs["perceiver.latents"]), depth, remat="none")
    rows = weights.prefixed(resampler.perceiver_weights(), "perceiver.", "")
    perceiver = Filled(module, rows, theirs, tokens)
    latents = perceiver(tokens).reshape(*lead[:-1], -1, spec.width)
    yield compare_scaled("latents", latents, io["out/vis_x"])
    yield perceiver.exported("perceiver")


def ofa(folder: Path) -> Iterator[Row]:
    """OFA's ResNet."""
    io, theirs = golden.arrays(folder), golden.weights(folder)
    config = golden.config(folder, "meta.json")["config"]
    spec = resnet.ResNetSpec(resnet.DEPTHS[config["resnet_type"]])
    rows = resnet.weight_map(spec, "encoder.embed_images.", "")
    x = channels_last(io["in/patch_images"])
    model = Filled(resnet.ResNet(spec, "none"), rows, theirs, x)
    yield compare_scaled("ResNet", model(x), np.moveaxis(io["out/resnet"], 1, -1))
    yield model.exported("ResNet")


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
    "paligemma": paligemma,
    "QWenLMHeadModel": qwen_vl,
    "VisionTransformer": qwen_vl,
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_vl,
    "qwen3_vl": qwen2_vl,
    "Moondream": moondream,
    "VLMForCausalLM": uform,
    "PoolerGen2": uform_pooler,
    "Flamingo": open_flamingo,
    "OFAModel": ofa,
}


def find(folder: Path) -> Runner | None:
    """What runs the vision side of a folder, by what the folder says it is."""
    said = {}
    for name in ("meta.json", "config.json"):
        if (folder / name).is_file():
            said |= json.loads((folder / name).read_text())
    if not (folder / "io.npz").is_file() or "robovlm_name" in said:
        return None
    names = np.load(folder / "io.npz").files
    if any(n.split("/")[0].partition("to")[2].isdigit() for n in names):
        return preprocess
    if "in/reconstructed" in names:
        return moondream_new
    kind = said.get("model_type", said.get("cls"))
    return KINDS.get(kind) if kind else None
