"""UForm-Gen: its golden models, and the architecture of RoboUform folders."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.parity import golden, names, original
from tests.parity.robo import load
from tests.parity.table import Row
from tests.parity.vision import channels_last, compare_scaled
from vla_jax.convert import maps
from vla_jax.models import vla
from vla_jax.models.backbones import uform
from vla_jax.rules import flatten

# Every tiny model of the golden set has four heads; shapes do not tell.
HEADS = 4


def hf(folder: Path) -> Iterator[Row]:
    """VLMForCausalLM: the image's tokens stand where its one token stood."""
    io, weights = golden.arrays(folder), golden.weights(folder)
    config = golden.config(folder, "meta.json")["config"]
    name, arch = describe({}, weights)
    arch |= {key: config[key] for key in config.keys() & arch.keys()}
    model = vla.build(original.model_config({}, name, arch))
    mapped = maps.hugging_face(model.config)
    params = load(mapped, model, weights, "backbone/")
    yield names.exported(mapped[0], flatten(params), weights)
    ids = io["in/input_ids"]
    (at,) = np.unique(np.argmax(ids == config["image_token_id"], axis=1))
    real = io["in/attention_mask"] == 1

    def forward(m: uform.UForm) -> dict[str, Any]:
        features = m.vision(channels_last(io["in/images"])).tokens
        image = m.image_pooler(features)
        text = m.embed_text(jnp.asarray(ids, jnp.int32))
        embeds = jnp.concatenate([text[:, :at], image, text[:, at + 1 :]], axis=1)
        hidden = m.text(embeds, jnp.asarray(real))
        return {
            "encoder_features": features,
            "image_latents": image,
            "last_hidden": hidden,
            "logits": m.logits(hidden),
        }

    backbone = uform.UForm(arch, remat="none")
    run: Any = jax.jit(lambda tree: backbone.apply({"params": tree}, method=forward))
    outputs = run(params["backbone"])
    for name in sorted(name for name in io if name.startswith("out/")):
        got, expected = np.asarray(outputs[name[4:]]), io[name]
        if expected.shape[:2] == real.shape:
            got, expected = got[real], expected[real]
        yield compare_scaled(name[4:], got, expected)


def describe(_: Any, params: Mapping[str, np.ndarray]) -> tuple[str, dict[str, Any]]:
    """Architecture of a tiny UForm-Gen, read off its tensors; the rest is transformers' default."""
    results = {name.removeprefix("backbone."): value for name, value in params.items()}
    sizes = uform.UForm.from_shapes({name: value.shape for name, value in results.items()})
    text, decoder = sizes["text_config"], "text_decoder."
    table, head = (
        results[decoder + "model.embed_tokens.weight"],
        results[decoder + "lm_head.weight"],
    )
    keys = len(results[decoder + "model.layers.0.self_attn.k_proj.weight"])
    text |= {
        "num_attention_heads": HEADS,
        "num_key_value_heads": keys * HEADS // text["hidden_size"],
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": bool(np.array_equal(table, head)),
    }
    heads = {"image_encoder_num_heads": HEADS, "image_pooler_num_attn_heads": HEADS}
    return "uform", uform.UForm.arch({**sizes, **heads})
