"""PaliGemma and PaliGemma 2: their golden models, and the architecture of RoboPaligemma folders."""

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
from vla_jax.models.backbones import BACKBONES
from vla_jax.models.backbones.base import Tokens, count_layers
from vla_jax.rules import flatten

# What shapes do not tell of the tiny models of the golden set.
HEADS, PAD = 4, 1
# `hidden_size` beside text_config: the second generation's is not the text's. No file says so; it
# follows from the image tokens, which are 1.1547 times those divided by the root of 64.
HIDDEN = {"paligemma": 64, "paligemma2": 48}
TINY_GEMMA2 = {"query_pre_attn_scalar": 16}
GENERATIONS = {"gemma": "paligemma", "gemma2": "paligemma2"}
# transformers version -> the mask it gives RoboVLMs (and so without token types).
MASKS = {"4.44": "causal", "4.48": "full"}


def scaled(quantity: str, got: Any, expected: np.ndarray) -> Row:
    """`compare`, relative to the largest value."""
    return compare(quantity, got, expected, TOLERANCE * float(np.abs(expected).max()))


def hf(folder: Path) -> Iterator[Row]:
    """PaliGemmaForConditionalGeneration of transformers 5, with and without token types."""
    io, config = golden.arrays(folder), golden.config(folder)
    name = GENERATIONS[config["text_config"]["model_type"]]
    kind = BACKBONES[name]
    arch = kind.arch(config, strict=False)
    # It neither divides image tokens nor scales them.
    arch["hidden_size"] = kind(arch).width
    attention = golden.config(folder, "meta.json")["attn"]
    if "attention_cap" in arch:
        arch["attention_cap"] = attention == "eager"
    reference = golden.weights(folder)
    model = vla.build(original.model_config({}, name, arch))
    mapped = maps.hugging_face(model.config)
    params = load(mapped, model, reference, "backbone/")
    yield names.exported(mapped[0], flatten(params), reference)

    ids, valid = jnp.asarray(io["in/input_ids"], jnp.int32), io["in/attention_mask"] == 1
    images = jnp.asarray(original.image(io["in/pixel_values"]))
    place = ids == config["image_token_index"]
    array = jnp.asarray(io["in/token_type_ids"] == 0)
    # Without token types sdpa's shortcut is taken when nothing is padded: no mask at all.
    without = "full" if attention == "sdpa" and valid.all() else "causal"

    def forward(m: Any) -> Any:
        image = m.encode_images(images)
        embeds = m.embed_text(ids).at[place].set(image.reshape(-1, image.shape[-1]))
        tokens = Tokens(embeds, jnp.asarray(valid), jnp.where(place, 0, -1), given=array)
        hidden = m(tokens)
        states = m.text.run(embeds, tokens.valid, collect=True).states
        return image * m.width**0.5, states, hidden, m.text.logits(hidden)

    def run(mask: str) -> Any:
        backbone = kind({**arch, "mask": mask}, "none")
        return jax.jit(lambda p: backbone.apply({"params": p}, method=forward))(params["backbone"])

    image, states, hidden, logits = run(without)
    yield scaled("image features", image, io["out/image_features"])
    for i, state in enumerate(states):
        if without == "causal" and f"out/hidden_{i}" in io:
            yield scaled(f"hidden {i}", state[valid], io[f"out/hidden_{i}"][valid])
    yield scaled("last hidden", hidden[valid], io["out/last_hidden"][valid])
    yield scaled("logits", logits[valid], io["out/logits"][valid])

    *_, logits = run("prefix")
    yield scaled("logits, prefix", logits[valid], io["out/logits_prefixlm"][valid])
    labels = io["in/labels"][:, 1:]
    scores = jax.nn.log_softmax(logits[:, :-1])
    chosen = jnp.take_along_axis(scores, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    yield scaled("loss, prefix", -chosen[labels >= 0].mean(), io["out/loss_prefixlm"])


def describe(
    config: Mapping[str, Any], params: Mapping[str, np.ndarray]
) -> tuple[str, dict[str, Any]]:
    """Architecture of a tiny RoboPaligemma, read off its tensors."""
    text, vision = "backbone.language_model.model.", "backbone.vision_tower.vision_model."
    patch = params[vision + "embeddings.patch_embedding.weight"]
    side = round(len(params[vision + "embeddings.position_embedding.weight"]) ** 0.5)
    vocab, width = params[text + "embed_tokens.weight"].shape
    head = len(params[text + "layers.0.self_attn.q_proj.weight"]) // HEADS
    second = text + "layers.0.pre_feedforward_layernorm.weight" in params

    name = GENERATIONS["gemma2" if second else "gemma"]
    version = ".".join(config["versions"]["transformers"].split(".")[:2])
    arch = BACKBONES[name].arch(
        {
            "mask": MASKS[version],
            "hidden_size": HIDDEN[name],
            "projection_dim": width,
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
                "hidden_size": width,
                "num_hidden_layers": count_layers(params, text + "layers."),
                "num_attention_heads": HEADS,
                "num_key_value_heads": len(params[text + "layers.0.self_attn.k_proj.weight"])
                // head,
                "head_dim": head,
                "intermediate_size": len(params[text + "layers.0.mlp.gate_proj.weight"]),
                "pad_token_id": PAD,
                **(TINY_GEMMA2 if second else {}),
            },
        }
    )
    return name, arch
