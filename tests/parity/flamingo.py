"""OpenFlamingo: its golden models, and the architecture of RoboFlamingo folders."""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.parity import golden, names, original
from tests.parity.robo import load
from tests.parity.table import Row
from tests.parity.vision import HEADS, compare_scaled, prefix
from vla_jax.convert import maps
from vla_jax.models import vla
from vla_jax.models.backbones import flamingo
from vla_jax.models.backbones.base import count_layers
from vla_jax.models.towers.gated import Media
from vla_jax.models.towers.vit import VisionTransformer
from vla_jax.rules import flatten

Arrays = Mapping[str, np.ndarray]

# A tensor only one of the wrapped language models has -> its model_type.
KINDS = {
    "transformer.blocks.0.decoder_layer.ln_1.weight": "mosaic_gpt",
    "transformer.blocks.0.decoder_layer.norm_1.weight": "mpt",
    "gpt_neox.embed_in.weight": "gpt_neox",
    "model.decoder.embed_tokens.weight": "opt",
    "model.embed_tokens.weight": "llama",
}


def hf(folder: Path) -> Iterator[Row]:
    """open_flamingo's Flamingo on interleaved texts and images."""
    io, reference = golden.arrays(folder), golden.weights(folder)
    ids, shape = io["in/input_ids"].astype(np.int32), io["in/vision_x"].shape
    # <|endofchunk|>, <image>, <PAD> are the last of the vocabulary.
    arch = read(reference, "vision_encoder.", "lang_encoder.", below=2)
    model = vla.build(original.model_config({}, "flamingo", arch))
    rows, ignore = maps.hugging_face(model.config)
    params = load((rows, ignore), model, reference, "backbone/")
    yield names.exported(rows, flatten(params), reference, ignore)
    params = params["backbone"]

    media = ids == arch["media_token_id"]
    # Each text sees the image before it alone.
    which = np.cumsum(media, axis=1)[..., None] == 1 + np.arange(shape[1])
    latents = flamingo.Flamingo(arch).image_tokens
    observed = jnp.asarray(np.repeat(which, latents, axis=-1))
    valid = jnp.asarray(io["in/attention_mask"].astype(bool))

    def forward(m: flamingo.Flamingo) -> Any:
        images = jnp.asarray(original.image(io["in/vision_x"]))
        images = images.reshape(-1, *images.shape[-3:])
        tokens = m.encode_images(images)
        context = Media(tokens.reshape(shape[0], -1, tokens.shape[-1]), observed)
        embeds = m.embed_text(jnp.asarray(ids))[..., :-1]
        result = m.text.run(embeds, valid, context=context, collect=True)
        return (
            m.vision(images).tokens,
            tokens,
            result.states,
            result.hidden,
            m.logits(result.hidden),
        )

    backbone = flamingo.Flamingo(arch, remat="none")
    run = jax.jit(lambda tree: backbone.apply({"params": tree}, method=forward))
    outcome: Any = run(params)
    patches, tokens, states, hidden, logits = outcome
    yield compare_scaled("CLIP tokens", patches, io["out/clip_tokens"])
    yield compare_scaled("CLIP vector", pooled(arch, params, io), io["out/clip_pooled"])
    expected = io["out/vis_x"]
    yield compare_scaled("latents", tokens.reshape(expected.shape), expected)
    real = np.asarray(valid)
    outputs = dict(enumerate(states)) | {len(states): hidden}
    for i in sorted(int(name[11:]) for name in io if name.startswith("out/hidden_")):
        expected = io[f"out/hidden_{i}"]
        yield compare_scaled(f"hidden {i}", np.asarray(outputs[i])[real], expected[real])
    yield compare_scaled("logits", np.asarray(logits)[real], io["out/logits"][real])


def pooled(arch: Mapping[str, Any], params: Any, io: Arrays) -> Any:
    """CLIP's image vector, of the parameters that the VLM carries along."""
    images = jnp.asarray(original.image(io["in/vision_x"]))
    spec = dataclasses.replace(flamingo.Flamingo(arch).vision_spec, keep_class=True)
    tower = VisionTransformer(spec, "none")
    images = images.reshape(-1, *images.shape[-3:])
    first: Any = jax.jit(tower.apply)({"params": params["vision"]}, images)
    remainder, x = params["vision_unused"], first.tokens[:, 0]
    x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
    x = x * remainder["norm"]["scale"] + remainder["norm"]["bias"]
    return x @ remainder["projection"]["kernel"]


def describe(_: Any, params: Arrays) -> tuple[str, dict[str, Any]]:
    """Architecture of a tiny RoboFlamingo, whose tokenizer has <image> as its last token."""
    return "flamingo", read(params, "vision_encoder.visual.", "backbone.", below=1)


def read(theirs: Arrays, vision: str, language: str, below: int) -> dict[str, Any]:
    """The architecture, off the tensors.

    Args:
        theirs: name -> tensor.
        vision: prefix of CLIP's vision tower.
        language: of the language model.
        below: of the vocabulary's end, where <image> is.
    """
    patch, blocks = theirs[vision + "conv1.weight"], vision + "transformer.resblocks."
    wide, _, side, _ = patch.shape
    grid = round((len(theirs[vision + "positional_embedding"]) - 1) ** 0.5)
    kind = next(kind for name, kind in KINDS.items() if language + name in theirs)
    text, everything = language_of(kind, theirs, language)
    results: dict[str, Any] = {
        "text_config": text,
        "cross_attn_every_n_layers": everything,
        "media_token_id": text["vocab_size"] - below,
        "perceiver_config": {
            "num_latents": len(theirs["perceiver.latents"]),
            "depth": count_layers(theirs, "perceiver.layers."),
        },
        "vision_config": {
            "width": wide,
            "layers": count_layers(theirs, blocks),
            "heads": HEADS,
            "mlp_ratio": len(theirs[blocks + "0.mlp.c_fc.bias"]) / wide,
            "patch_size": side,
            "image_size": grid * side,
            "embed_dim": theirs[vision + "proj"].shape[1],
        },
    }
    if "vision_encoder.text_projection" in theirs:
        vocab, size = theirs["vision_encoder.token_embedding.weight"].shape
        results["clip_text_config"] = {
            "width": size,
            "layers": count_layers(theirs, "vision_encoder.transformer.resblocks."),
            "heads": HEADS,
            "vocab_size": vocab,
            "context_length": len(theirs["vision_encoder.positional_embedding"]),
        }
    return flamingo.Flamingo.arch(results)


def language_of(kind: str, theirs: Arrays, root: str) -> tuple[dict[str, Any], int]:
    """The language model's config, and layers from one cross-attention to the next."""
    layers = {int(m[1]) for k in theirs if (m := re.search(r"old_decoder_blocks\.(\d+)\.", k))}
    gates = {int(m[1]) for k in theirs if (m := re.search(r"gated_cross_attn_layers\.(\d+)\.", k))}
    sizes: dict[str, tuple[str, ...]] = {
        # token table, MLP
        "mosaic_gpt": ("transformer.wte.weight", "mlp.mlp_up.weight"),
        "mpt": ("transformer.wte.weight", "ffn.up_proj.weight"),
        "gpt_neox": ("gpt_neox.embed_in.weight", "mlp.dense_h_to_4h.weight"),
        "opt": ("model.decoder.embed_tokens.weight", "fc1.weight"),
        "llama": ("model.embed_tokens.weight", "mlp.gate_proj.weight"),
    }
    table, mlp = sizes[kind]
    vocab, width = theirs[root + table].shape
    hidden = len(theirs[f"{root}old_decoder_blocks.0.{mlp}"])
    config: dict[str, Any] = {"model_type": kind, "vocab_size": vocab}
    if kind in ("mosaic_gpt", "mpt"):
        config |= {"d_model": width, "n_layers": len(layers), "n_heads": HEADS}
        if kind == "mosaic_gpt":
            norm = prefix(theirs, "old_decoder_blocks.0.ln_1") + "old_decoder_blocks.0."
            config |= {
                "mlp_ratio": hidden // width,
                "attn_qk_ln": norm + "attn.q_ln.weight" in theirs,
                "no_bias": norm + "ln_1.bias" not in theirs,
            }
    else:
        config |= {
            "hidden_size": width,
            "num_hidden_layers": len(layers),
            "num_attention_heads": HEADS,
        }
        config["ffn_dim" if kind == "opt" else "intermediate_size"] = hidden
    if kind == "opt":
        positions = theirs[root + "model.decoder.embed_positions.weight"]
        config["max_position_embeddings"] = len(positions) - 2
    return config, min(gates) + 1
