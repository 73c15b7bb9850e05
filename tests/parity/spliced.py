"""Golden VLMs of transformers in whose ids one id stands for the images' tokens: LLaVA, SmolVLM."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.parity import golden, names, original
from tests.parity.robo import load
from tests.parity.table import Row
from tests.parity.vision import compare_scaled
from vla_jax.convert import maps
from vla_jax.models import vla
from vla_jax.models.backbones import BACKBONES
from vla_jax.models.backbones.base import Tokens
from vla_jax.rules import flatten


def hf(folder: Path) -> Iterator[Row]:
    """Image features, hidden states and logits of a backbone that is called as its model_type."""
    io, config, reference = golden.arrays(folder), golden.config(folder), golden.weights(folder)
    name = config["model_type"]
    kind = BACKBONES[name]
    arch = kind.arch(config, strict=False)
    model = vla.build(original.model_config({}, name, arch))
    mapped = maps.hugging_face(model.config)
    params = load(mapped, model, reference, "backbone/")
    yield names.exported(mapped[0], flatten(params), reference)
    backbone = kind(arch, remat="none")

    ids = io["in/input_ids"].astype(np.int32)
    valid = io["in/attention_mask"] == 1
    place = ids == config.get("image_token_id", config.get("image_token_index"))

    @jax.jit
    def forward(images: Any) -> Any:
        def apply(m: Any) -> Any:
            features = m.encode_images(images).reshape(-1, m.width)
            embeds = m.embed_text(jnp.asarray(ids)).at[np.nonzero(place)].set(features)
            tokens = Tokens(embeds, jnp.asarray(valid), jnp.full(ids.shape, -1))
            hidden = m(tokens)
            return features, hidden, m.logits(hidden)

        return backbone.apply({"params": params["backbone"]}, method=apply)

    pixels = original.image(io["in/pixel_values"])
    features, hidden, logits = forward(pixels.reshape(-1, *pixels.shape[-3:]))
    expected = io["out/image_features"]
    yield compare_scaled("image features", features, expected.reshape(features.shape))
    for name, got in (("last hidden", hidden), ("logits", logits)):
        expected = io[f"out/{name.replace(' ', '_')}"]
        yield compare_scaled(name, np.asarray(got)[valid], expected[valid])
