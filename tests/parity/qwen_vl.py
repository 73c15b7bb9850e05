"""Qwen-VL: its golden model, and the architecture of RoboQwen folders."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.parity import golden, names, original, vision
from tests.parity.robo import load
from tests.parity.table import Row
from tests.parity.vision import compare_scaled
from vla_jax.convert import maps
from vla_jax.models import vla
from vla_jax.models.backbones import qwen_vl
from vla_jax.models.backbones.base import Tokens
from vla_jax.models.towers import positions, resampler, vision_families
from vla_jax.rules import flatten

# Of every tiny model of the golden set, where its files do not say.
HEADS, START, SEQ_LENGTH = 4, 590, 64


def hf(folder: Path) -> Iterator[Row]:
    """QWenLMHeadModel on ids with images, and on embeddings; tokens that are no padding."""
    io, arch = golden.arrays(folder), qwen_vl.QwenVL.arch(golden.config(folder), strict=False)
    model = vla.build(original.model_config({}, "qwen_vl", arch))
    reference, mapped = golden.weights(folder), maps.hugging_face(model.config)
    params = load(mapped, model, reference, "backbone/")
    yield names.exported(mapped[0], flatten(params), reference)
    ids = io["in/input_ids"].astype(np.int32)
    mask = io.get("in/attention_mask", np.ones(ids.shape)) == 1
    starts = np.argwhere(ids == arch["visual"]["image_start_id"])

    @jax.jit
    def forward(images: Any, ids: Any, mask: Any) -> Any:
        def apply(backbone: qwen_vl.QwenVL) -> Any:
            image, embeds = backbone.encode_images(images), backbone.embed_text(ids)
            for tokens, (row, column) in zip(image, starts, strict=True):
                embeds = embeds.at[row, column : column + len(tokens)].set(tokens)
            result = backbone.run(_tokens(embeds, mask), collect=True)
            return image, result.states, result.hidden, backbone.logits(result.hidden)

        backbone = qwen_vl.QwenVL(arch, remat="none")
        return backbone.apply({"params": params["backbone"]}, method=apply)

    images = jnp.asarray(original.image(io["in/pixel_values"]))
    image, states, hidden, logits = map(np.asarray, forward(images, ids, jnp.asarray(mask)))
    inner = image[:, qwen_vl.QwenVL.MARKS : -qwen_vl.QwenVL.MARKS]
    yield compare_scaled("image features", inner, io["out/image_features"])
    outputs = {f"out/hidden_{i}": state for i, state in enumerate(states)}
    outputs |= {"out/last_hidden": hidden, "out/logits": logits}
    for name in sorted(outputs.keys() & io.keys()):
        yield compare_scaled(name[4:], outputs[name][mask], io[name][mask])

    embeds = jnp.asarray(io["in/inputs_embeds"])
    tokens = _tokens(embeds, jnp.ones(embeds.shape[:2], bool))
    backbone, tree = qwen_vl.QwenVL(arch, remat="none"), {"params": params["backbone"]}
    hidden = jax.jit(backbone.apply)(tree, tokens)
    yield compare_scaled("last hidden from embeds", hidden, io["out/last_hidden_from_embeds"])
    logits = backbone.apply(tree, hidden, method="logits")
    yield compare_scaled("logits from embeds", logits, io["out/logits_from_embeds"])


def _tokens(embeds: Any, mask: Any) -> Tokens:
    return Tokens(embeds, mask, jnp.full(mask.shape, -1))


def tower(folder: Path) -> Iterator[Row]:
    """Tower and resampler by themselves, and both tables of positions resampled."""
    io, reference = golden.arrays(folder), golden.weights(folder)
    x = vision.channels_last(io["in/pixel_values"])
    spec = vision_families.qwen_vl(_visual(reference, "", x.shape[1]))
    model = vision.tower(
        spec, vision_families.open_clip_weights(spec, "", "", by_head=True), reference, x
    )
    queries, width = reference["attn_pool.query"].shape
    module, tokens = vision_families.qwen_vl_resampler(spec, queries, width), model(x).tokens
    pool = vision.Filled(module, resampler.positioned_queries_weights(), reference, tokens)
    yield compare_scaled("image features", pool(tokens), io["out/image_features"])
    yield model.exported("tower")
    yield pool.exported("resampler")
    for name, key, grid, everything in (
        ("pos_up", "positional_embedding", spec.grid, 1),
        ("pos_down_2x2", "positional_embedding", (2, 2), 1),
        ("sincos_up", "attn_pool.pos_embed", spec.grid, 16),
    ):
        table, expected = jnp.asarray(reference[key]), io[f"out/{name}"]
        side = round(len(table) ** 0.5)
        got = positions.resample(table, (side, side), grid, "bicubic")[:, ::everything]
        yield compare_scaled(name, got[:, : expected.shape[1]], expected)


def describe(
    config: Mapping[str, Any], params: Mapping[str, np.ndarray]
) -> tuple[str, dict[str, Any]]:
    """Architecture of a tiny RoboQwen, read off its tensors."""
    text = "backbone.transformer."
    vocab, width = params[text + "wte.weight"].shape
    results = {
        "vocab_size": vocab,
        "hidden_size": width,
        "num_hidden_layers": _depth(params, text + "h."),
        "num_attention_heads": HEADS,
        "intermediate_size": 2 * len(params[text + "h.0.mlp.w1.weight"]),
        "seq_length": SEQ_LENGTH,
        "visual": _visual(params, text + "visual.", config["image_size"]),
    }
    return "qwen_vl", qwen_vl.QwenVL.arch(results)


def _visual(params: Mapping[str, np.ndarray], prefix: str, size: int) -> dict[str, Any]:
    patch, blocks = params[prefix + "conv1.weight"], prefix + "transformer.resblocks."
    return {
        "image_size": size,
        "patch_size": patch.shape[-1],
        "width": len(patch),
        "layers": _depth(params, blocks),
        "heads": HEADS,
        "mlp_ratio": len(params[blocks + "0.mlp.c_fc.bias"]) / len(patch),
        "n_queries": len(params[prefix + "attn_pool.query"]),
        "image_start_id": START,
    }


def _depth(params: Mapping[str, np.ndarray], prefix: str) -> int:
    return 1 + max(int(k[len(prefix) :].split(".")[0]) for k in params if k.startswith(prefix))
