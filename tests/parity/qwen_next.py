"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: their golden models, images of any grid."""

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.parity import golden, names, original
from tests.parity.robo import load
from tests.parity.table import Row, compare
from tests.parity.vision import Filled, compare_scaled, prefix
from tests.parity.vision import tower as tower_of
from vla_jax.convert import maps
from vla_jax.convert.tensors import renamed
from vla_jax.models import vla, weights
from vla_jax.models.backbones import BACKBONES, qwen_family
from vla_jax.models.backbones.base import Tokens
from vla_jax.models.towers import vision_families
from vla_jax.rules import flatten


def hf(folder: Path) -> Iterator[Row]:
    """The whole model on ids with images, at once and from the cache, and on text alone."""
    yield from tower(folder)
    io, config = golden.arrays(folder), golden.config(folder)
    name = config["model_type"]
    kind = BACKBONES[name]
    arch = kind.arch(config, strict=False)
    model = vla.build(original.model_config({}, name, arch))
    mapped = maps.hugging_face(model.config)
    reference = {renamed(key, kind.RENAMES): value for key, value in golden.weights(folder).items()}
    params = load(mapped, model, reference, "backbone/")
    yield names.exported(mapped[0], flatten(params), reference)
    backbone = kind(arch, remat="none")

    @jax.jit
    def encode(images: Any) -> Any:
        return backbone.apply({"params": params["backbone"]}, images, method="encode_images")

    ids = jnp.asarray(io["in/input_ids"], jnp.int32)
    images = [encode(x) for x in pictures(io, config["vision_config"])]
    merge = config["vision_config"]["spatial_merge_size"]
    grids = io["in/image_grid_thw"][:, 1:] // merge
    expected = [io["out/vision_pooler_output"]]
    expected += [io[k] for k in sorted(io) if k.startswith("out/vision_deepstack")]
    got = np.concatenate([x[0, 1:-1] for x in images])
    yield compare_scaled("image tokens", got, np.concatenate(expected, axis=-1))

    columns, place, grid = lay_out(np.asarray(ids), grids, config["image_token_id"])
    valid = io["in/attention_mask"] == 1
    grid = jnp.asarray(grid[0]), jnp.asarray(grid[1])
    rows, following = qwen_family.positions(jnp.asarray(valid), jnp.asarray(place), grid)
    rows = np.asarray(rows)[:, valid]
    yield compare("positions", rows, io["out/position_ids"][:, valid], 0.0)
    yield compare("what comes next", following - valid.sum(1), io["out/rope_deltas"][:, 0], 0.0)

    @jax.jit
    def forward(ids: Any, images: Any) -> Any:
        def apply(m: qwen_family.QwenFamily) -> Any:
            embeds = m.embed_text(ids)
            for at, tokens in zip(columns, images, strict=True):
                embeds = embeds.at[at].set(tokens[0])
            tokens = Tokens(embeds, jnp.asarray(valid), jnp.asarray(place))
            hidden = m(tokens, grid=grid)
            cache, parts = m.empty_cache(*ids.shape), []
            for part in cuts:
                fewer = Tokens(*(x[:, part] for x in tokens[:3]))
                out, cache = m.extend(fewer, cache, tuple(side[:, part] for side in grid))
                parts.append(out)
            return hidden, m.logits(hidden), m.logits(jnp.concatenate(parts, axis=1))

        return backbone.apply({"params": params["backbone"]}, method=apply)

    # In the middle of an image, and a single token.
    inside, count = columns[0][1].start + 2, ids.shape[1]
    ends = sorted({0, inside, count // 2, count // 2 + 1, count})
    cuts = [slice(a, b) for a, b in itertools.pairwise(ends)]
    hidden, logits, streamed = forward(ids, images)
    for case, value, key in (
        ("last hidden", hidden, "out/last_hidden"),
        ("logits", logits, "out/logits"),
        ("logits, part by part from the cache", streamed, "out/logits"),
    ):
        yield compare_scaled(case, np.asarray(value)[valid], io[key][valid])

    @jax.jit
    def read(ids: Any) -> Any:
        def apply(m: qwen_family.QwenFamily) -> Any:
            tokens = Tokens(m.embed_text(ids), ids >= 0, jnp.full(ids.shape, -1))
            return m.logits(m(tokens))

        return backbone.apply({"params": params["backbone"]}, method=apply)

    text = jnp.asarray(io["in/text_only_ids"], jnp.int32)
    yield compare_scaled("logits of text alone", read(text), io["out/logits_text_only"])


def pictures(io: Mapping[str, np.ndarray], vision: Mapping[str, Any]) -> Iterator[Any]:
    """The images of a folder, each [1, frames, h, x, 3]."""
    start = 0
    for _, height, width in io["in/image_grid_thw"].tolist():
        end = start + height * width
        yield jnp.asarray(frames(io["in/pixel_values"][start:end], (height, width), vision))
        start = end


def lay_out(
    ids: np.ndarray, grids: np.ndarray, image: int
) -> tuple[list[tuple[int, slice]], np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Where the images are, marks included.

    Args:
        ids: [b, n], with a run of `image` for each.
        grids: merged rows and columns of the images, in order.
        image: the id.

    Returns:
        Row and columns of each, `Tokens.place`, rows and columns of the grid at each token.
    """
    collected, place = [], np.full(ids.shape, -1)
    rows, columns = (np.ones_like(ids) for _ in range(2))
    free = [(row, column) for row, column in np.argwhere(ids == image).tolist()]
    for height, width in grids.tolist():
        row, first = free[0]
        at = row, slice(first - 1, first + height * width + 1)
        place[at] = np.arange(height * width + 2)
        rows[at], columns[at] = height, width
        collected.append(at)
        free = free[height * width :]
    return collected, place, (rows, columns)


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


def tower(folder: Path) -> Iterator[Row]:
    """Tower, merger and deepstack by themselves, an image at a time."""
    io, config, reference = golden.arrays(folder), golden.config(folder), golden.weights(folder)
    build = {
        "qwen2_vl": vision_families.qwen2_vl,
        "qwen2_5_vl": vision_families.qwen2_5_vl,
        "qwen3_vl": vision_families.qwen3_vl,
    }[config["model_type"]]
    vision, source, start = config["vision_config"], prefix(reference, "patch_embed"), 0
    merge, model = vision["spatial_merge_size"], None
    for i, (_, height, width) in enumerate(io["in/image_grid_thw"].tolist()):
        grid, end = (height, width), start + height * width
        x = jnp.asarray(frames(io["in/pixel_values"][start:end], grid, vision))
        spec = build(vision, grid)
        model = tower_of(spec, vision_families.qwen2_weights(spec, source, ""), reference, x)
        tokens, taps = model(x)
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
            module = vision_families.qwen2_merger(spec, vision, deepstack="deepstack" in name)
            rows = vision_families.qwen2_merger_weights(spec)
            merger = Filled(module, weights.prefixed(rows, source + name, ""), reference, before)
            expected = io[golden_name][merged]
            yield compare_scaled(f"image {i} {name[:-1]}", merger(before)[0], expected)
            if i == 0:
                yield merger.exported(name[:-1])
        start = end
    assert model is not None, "the folder has no image"
    yield model.exported("tower")
