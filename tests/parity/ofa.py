"""OFA: its golden model."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from tests.parity import golden, names, original
from tests.parity.robo import load
from tests.parity.table import Row
from tests.parity.vision import channels_last, compare_scaled
from vla_jax.convert import maps
from vla_jax.models import vla
from vla_jax.models.backbones import ofa
from vla_jax.models.backbones.base import Tokens
from vla_jax.rules import flatten


def hf(folder: Path) -> Iterator[Row]:
    """OFAModel: ResNet, every state of both towers, scores; the way back; token by token."""
    io, weights = golden.arrays(folder), golden.weights(folder)
    images = channels_last(io["in/patch_images"])
    config = {**golden.config(folder, "meta.json")["config"], "image_size": images.shape[1]}
    model = vla.build(original.model_config({}, "ofa", ofa.OFA.arch(config, strict=False)))
    mapped = maps.hugging_face(model.config)
    params = load(mapped, model, weights, "backbone/")
    backbone = ofa.OFA(model.arch, remat="none")
    ids, written = (
        jnp.asarray(io[f"in/{n}"], jnp.int32) for n in ("input_ids", "decoder_input_ids")
    )

    def look(m: Any) -> dict[str, Any]:
        image_tokens = m.encode_images(images)
        observed, valid = jnp.ones(image_tokens.shape[:2], bool), jnp.ones(written.shape, bool)
        image_place, no_place = jnp.arange(image_tokens.shape[1]), jnp.full(written.shape, -1)
        prompt, pads = m.embed_text(ids), ids != config["pad_token_id"]
        tokens = Tokens(
            m.embed_text(written),
            valid,
            no_place,
            image_tokens,
            observed,
            prompt,
            pads,
            image_place,
        )
        encoded = m.encode(tokens, collect=True)
        decoded = m.text.decoder(tokens.embeds, valid, encoded, collect=True)
        hidden = m(tokens)
        # The same, cut after two tokens and then one by one.
        cache, parts = m.empty_cache(*written.shape), []
        for start, end in ((0, 2), *((i, i + 1) for i in range(2, written.shape[1]))):
            changed = tokens if start == 0 else Tokens(tokens.embeds, valid, no_place)
            changed = changed._replace(
                embeds=tokens.embeds[:, start:end], valid=valid[:, start:end]
            )
            part, cache = m.extend(changed, cache)
            parts.append(part)
        return {
            "resnet": jnp.moveaxis(m.vision(images), -1, 1),
            "encoder_last_hidden_state": encoded.hidden,
            "logits": m.logits(hidden),
            "cached": m.logits(jnp.concatenate(parts, axis=1)),
            **{f"enc_h{i}": x for i, x in enumerate(encoded.states)},
            **{f"dec_h{i}": x for i, x in enumerate(decoded.states)},
        }

    got = jax.jit(lambda p: backbone.apply({"params": p}, method=look))(params["backbone"])
    for key in io:
        if key.startswith("out/"):
            yield compare_scaled(key[4:], got[key[4:]], io[key])
    yield compare_scaled("logits, token by token", got["cached"], io["out/logits"])
    yield names.exported(mapped[0], flatten(params), weights)
