"""Kosmos-2: its golden model, and the architecture of RoboKosMos folders."""

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.parity import golden, names, original
from tests.parity.robo import TOLERANCE, load
from tests.parity.table import Row, compare
from vla_jax.convert import maps
from vla_jax.models import vla
from vla_jax.models.backbones import kosmos2
from vla_jax.models.backbones.base import Tokens, count_layers
from vla_jax.rules import flatten

# Every tiny model of the golden set has four heads in both towers; shapes do not tell.
HEADS = 4


def hf(folder: Path) -> Iterator[Row]:
    """Kosmos2ForConditionalGeneration on ids with images, and on embeddings."""
    io, arch = golden.arrays(folder), kosmos2.Kosmos2.arch(golden.config(folder), strict=False)
    model = vla.build(original.model_config({}, "kosmos2", arch))
    reference, mapped = golden.weights(folder), maps.hugging_face(model.config)
    params = load(mapped, model, reference, "backbone/")
    yield names.exported(mapped[0], flatten(params), reference)
    backbone = kosmos2.Kosmos2(arch, remat="none")
    tree = {"params": params["backbone"]}

    def run(method: Any, *args: Any) -> Any:
        return jax.jit(functools.partial(backbone.apply, method=method))(tree, *args)

    images = jnp.asarray(original.image(io["in/pixel_values"]))
    vision = run(lambda m, x: m.vision(x).tokens, images)
    tokens = run("encode_images", images)
    yield compare("vision tower", vision, io["out/vision_last_hidden"], TOLERANCE)
    yield compare("image tokens", tokens, io["out/image_embeds"], TOLERANCE)

    ids = io["in/input_ids"].astype(np.int32)
    valid = jnp.asarray(io["in/attention_mask"].astype(bool))
    embeds = np.array(run("embed_text", jnp.asarray(ids)))
    embeds[io["in/image_embeds_position_mask"].astype(bool)] = np.asarray(tokens).reshape(
        -1, embeds.shape[-1]
    )
    # Given ids, the original numbers only the tokens that are not padding.
    pad = arch["text_config"]["pad_token_id"]
    real = ids != pad
    positions = np.cumsum(real, axis=1) * real + pad
    positions = jnp.asarray(positions, jnp.int32)
    hidden = run(lambda m, *args: m.text(*args), jnp.asarray(embeds), valid, positions)
    yield compare("last hidden", hidden, io["out/last_hidden"], TOLERANCE)
    yield compare("logits", run("logits", hidden), io["out/logits"], TOLERANCE)

    embeds, valid = jnp.asarray(io["in/inputs_embeds"]), jnp.asarray(io["in/embeds_mask"] == 1)
    tokens = Tokens(embeds, valid, jnp.full(valid.shape, -1))
    logits = run("logits", run("__call__", tokens))
    yield compare("logits from embeds", logits, io["out/logits_from_embeds"], TOLERANCE)


def describe(_: Any, params: Mapping[str, np.ndarray]) -> tuple[str, dict[str, Any]]:
    """Architecture of a tiny RoboKosMos, read off its tensors."""
    text, vision = "backbone.text_model.model.", "backbone.vision_model.model."
    patch = params[vision + "embeddings.patch_embedding.weight"]
    side = round((len(params[vision + "embeddings.position_embedding.weight"]) - 1) ** 0.5)
    vocab, width = params[text + "embed_tokens.weight"].shape

    arch = kosmos2.Kosmos2.arch(
        {
            "latent_query_num": len(params["backbone.image_to_text_projection.latent_query"]),
            "vision_config": {
                "hidden_size": patch.shape[0],
                "num_hidden_layers": count_layers(params, vision + "encoder.layers."),
                "num_attention_heads": HEADS,
                "intermediate_size": len(params[vision + "encoder.layers.0.mlp.fc1.bias"]),
                "patch_size": patch.shape[2],
                "image_size": side * patch.shape[2],
            },
            "text_config": {
                "vocab_size": vocab,
                "embed_dim": width,
                "layers": count_layers(params, text + "layers."),
                "attention_heads": HEADS,
                "ffn_dim": len(params[text + "layers.0.ffn.fc1.bias"]),
            },
        }
    )
    return "kosmos2", arch
