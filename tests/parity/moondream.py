"""Moondream2: its golden models of 2024 and 2025, and the architecture of RoboMoonDream folders."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.parity import golden, names, original
from tests.parity.robo import load
from tests.parity.table import Row
from tests.parity.vision import Filled, channels_last, compare_scaled
from vla_jax.convert import maps
from vla_jax.convert.tensors import Renamed
from vla_jax.models import vla
from vla_jax.models.backbones.moondream import Moondream
from vla_jax.models.towers.decoder import Decoder, causal_mask
from vla_jax.models.towers.layers import MLP
from vla_jax.models.towers.vit import VisionTransformer
from vla_jax.rules import flatten

# Every tiny model of the golden set has four heads in both towers; shapes do not tell.
HEADS = {name: {"num_attention_heads": 4} for name in ("vision_config", "text_config")}

# Columns that see one another in the folder of 2025; its files do not say. 730 in the full model.
PREFIX = 6


def hf(folder: Path) -> Iterator[Row]:
    """The models of 2024: an image before the text, and one of two tiles if the folder has it."""
    io, weights = golden.arrays(folder), golden.weights(folder)
    name, arch = describe({}, weights)
    model = vla.build(original.model_config({}, name, arch))
    mapped = maps.hugging_face(model.config)
    params = load(mapped, model, weights, "backbone/")
    backbone = Moondream(arch, remat="none")

    def forward(m: Moondream) -> dict[str, Any]:
        image = m.encode_images(channels_last(io["in/pixel_values"]))
        text = m.embed_text(jnp.asarray(io["in/input_ids"], jnp.int32))
        embeds = jnp.concatenate([text[:, :1], image, text[:, 1:]], axis=1)
        result = m.text.run(embeds, jnp.asarray(io["in/attention_mask"] == 1), collect=True)
        outputs = {
            "image_features": image,
            "inputs_embeds": embeds,
            "last_hidden_prenorm": result.hidden,
            "logits": m.logits(result.hidden),
        }
        if "in/pixel_values_2crop" in io:
            tiled = channels_last(io["in/pixel_values_2crop"])
            outputs["image_features_2crop"] = m.encode_images(tiled)
        return outputs | {f"hidden_{i}": state for i, state in enumerate(result.states)}

    run: Any = jax.jit(lambda tree: backbone.apply({"params": tree}, method=forward))
    outputs = run(params["backbone"])
    real = io["in/attention_mask"] == 1
    for name in sorted(name for name in io if name.startswith("out/")):
        got, expected = np.asarray(outputs[name[4:]]), io[name]
        if expected.shape[:2] == real.shape:
            got, expected = got[real], expected[real]
        yield compare_scaled(name[4:], got, expected)
    yield names.exported(mapped[0], flatten(params), weights)


def hf_2025(folder: Path) -> Iterator[Row]:
    """The parts of the model of 2025, which its folder does not join, under the names of 2024."""
    io, stored = golden.arrays(folder), golden.weights(folder)
    shapes = {name: value.shape for name, value in stored.items()}
    dtypes = {name: value.dtype for name, value in stored.items()}
    source: Any = SimpleNamespace(
        shapes=shapes, dtypes=dtypes, read=stored.__getitem__, place=lambda name: name
    )
    renamed = Renamed(source, Moondream.RENAMES)
    reference = {name: renamed.read(name) for name in renamed.shapes}
    sizes = Moondream.from_shapes(renamed.shapes)
    sizes["vision_config"] |= HEADS["vision_config"]
    arch = Moondream.arch(sizes)
    vision, backbone = arch["vision_config"], Moondream(arch)
    rows = backbone.weight_map()

    def part(module: Any, target: str, *args: Any) -> Filled:
        actual = [row for row in rows if row.target.startswith(target)]
        cut = [dataclasses.replace(row, target=row.target.removeprefix(target)) for row in actual]
        return Filled(module, cut, reference, *args)

    x = channels_last(io["in/pixel_values"])
    tower = part(VisionTransformer(backbone.vision_spec, "none"), "vision/", x)
    yield compare_scaled("vision features", tower(x).tokens, io["out/vision_features"])
    # The folder's projection is as wide as another text decoder.
    streams = jnp.concatenate([tower(x).tokens[0], io["out/rec_pooled"]], axis=-1)
    module = MLP(vision["projection_dim"], "gelu_pytorch_tanh", width=io["out/projected"].shape[-1])
    projection = part(module, "vision_projection/", streams)
    yield compare_scaled("projected", projection(streams), io["out/projected"])

    decoder = Decoder(backbone.text_spec, "none")
    ids = jnp.asarray(io["in/input_ids"], jnp.int32)
    valid = jnp.ones(ids.shape, bool)
    embeds = jnp.asarray(reference["text_model.transformer.embd.wte.weight"])[ids]
    text = part(decoder, "text/", embeds, valid)
    prefix = jnp.broadcast_to(jnp.arange(ids.shape[1]) < PREFIX, ids.shape)
    recorded = {"causal": None, "prefix": causal_mask(valid) | prefix[:, None]}
    for name, mask in recorded.items():
        hidden = text(embeds, valid, None, mask)
        yield compare_scaled(f"{name} hidden", hidden, io[f"out/hidden_{name}"])
        yield compare_scaled(
            f"{name} logits", text(hidden, method="logits"), io[f"out/logits_{name}"]
        )
    for name, module in (("tower", tower), ("projection", projection), ("text", text)):
        yield module.exported(name)


def describe(_: Any, params: Mapping[str, np.ndarray]) -> tuple[str, dict[str, Any]]:
    """Architecture of a tiny Moondream, read off its tensors."""
    shapes = {name.removeprefix("backbone."): value.shape for name, value in params.items()}
    sizes = Moondream.from_shapes(shapes)
    return "moondream", Moondream.arch({name: sizes[name] | HEADS[name] for name in sizes})
