"""OpenFlamingo: who sees an image, what heads read, the choice of language models."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.tiny import ARCHS, WIDTH
from tests.models import tiny
from vla_jax.models import vla
from vla_jax.models.backbones import flamingo
from vla_jax.models.backbones.base import Tokens
from vla_jax.models.caption_loss import caption_loss
from vla_jax.types import Captions

IMAGE = ARCHS["flamingo"]["media_token_id"]
N, LATENTS = 6, 4
# <image> first, in the middle, nowhere, only as padding.
IDS = np.array([[IMAGE, 9, 9, 9, 9, 9], [9, 9, IMAGE, 9, 9, 9], [9] * 6, [9, 9, 9, 9, 9, IMAGE]])
VALID = np.array([[True] * 6] * 3 + [[True] * 5 + [False]])
FIRST = (0, 2, 0, 0)  # column that sees first


@pytest.fixture(scope="module")
def bound():
    """A jitted (method, tokens...) -> result of one small model with open gates."""
    config = tiny.config("policy_head", "lstm", "flamingo")
    model, params = tiny.build(config)
    backbone = flamingo.Flamingo(model.arch, "none")
    tree = {"params": params["backbone"]}
    run = jax.jit(
        lambda method, *args: backbone.apply(tree, *args, method=method), static_argnums=0
    )
    return run, backbone, tree


def tokens(run, seed=0, seen=True):
    images = np.random.default_rng(seed).normal(size=(len(IDS), LATENTS, WIDTH))
    embeds = run("embed_text", jnp.asarray(IDS))
    return Tokens(
        embeds=embeds,
        valid=jnp.asarray(VALID),
        place=jnp.full(VALID.shape, -1),
        images=jnp.asarray(images, jnp.float32),
        seen=jnp.full((len(IDS), LATENTS), seen),
    )


def test_text_sees_its_images_from_their_token_on(bound):
    run, *_ = bound
    a, b, c = (run("__call__", tokens(run, seed)) for seed in (0, 1, 0))
    np.testing.assert_array_equal(a, c)
    for row, first in enumerate(FIRST):
        moved = np.abs(a - b)[row].max(axis=-1) > 1e-6
        np.testing.assert_array_equal(moved[:5], np.arange(5) >= first)
    blind = [run("__call__", tokens(run, seed, seen=False)) for seed in (0, 1)]
    np.testing.assert_array_equal(*blind)


def test_reading_on_remembers_images(bound):
    run, backbone, _ = bound
    full = tokens(run)
    expected = run("__call__", full)

    def part(begin, end):
        images = (full.images, full.seen) if begin == 0 else (None, None)
        embeds, valid, place = (x[:, begin:end] for x in (full.embeds, full.valid, full.place))
        return Tokens(embeds, valid, place, *images)

    cache, collected = backbone.empty_cache(len(IDS), N), []
    for begin, end in ((0, 3), (3, 4), (4, N)):
        hidden, cache = run("extend", part(begin, end), cache)
        collected.append(hidden)
    got = np.concatenate(collected, axis=1)
    np.testing.assert_allclose(got[VALID], np.asarray(expected)[VALID], atol=1e-5)
    with pytest.raises(ValueError, match="come with its images"):
        run("extend", part(1, 2), backbone.empty_cache(len(IDS), N))


@pytest.mark.slow
def test_heads_read_what_enters_the_last_layer(bound):
    run, backbone, tree = bound
    inputs = tokens(run)

    def states(m):
        x, context, _ = m._look(inputs, flamingo.Memory(None))
        return m.text.run(x, inputs.valid, context=context, collect=True).states

    output = backbone.apply(tree, method=states)
    np.testing.assert_allclose(run("features", inputs), output[-1], atol=1e-6)
    assert np.abs(run("features", inputs) - run("__call__", inputs)).max() > 0.1


def small(kind):
    """A text config of another language model."""
    text = {"model_type": kind, "vocab_size": 64}
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2}
    hidden = {"ffn_dim": 48} if kind == "opt" else {"intermediate_size": 48}
    mpt = {"d_model": 32, "n_layers": 2, "n_heads": 2}
    return {**text, **(mpt if kind == "mpt" else {**sizes, **hidden})}


@pytest.mark.parametrize("kind", ["gpt_neox", "mpt", "llama", "opt"])
def test_other_language_models(kind):
    """Every parameter has its name; cross-attention stands where the released model has it."""
    everything = 2
    arch = {
        **ARCHS["flamingo"],
        "text_config": small(kind),
        "cross_attn_every_n_layers": everything,
    }
    model = vla.build(tiny.config("policy_head", "lstm", "flamingo", **{"backbone.arch": arch}))
    tree = jax.eval_shape(lambda k: vla.initial_params(model, k), jax.random.key(0))
    layers = tree["backbone"]["text"]["layers"]
    assert set(layers) == {"blocks_0", "blocks_1", "extra"}
    names = [n for row in flamingo.Flamingo(model.arch).weight_map() for n in row.expand(1)]
    assert len(set(names)) == len(names)
    gates = [n for n in names if n.endswith("ff_gate")]
    assert gates[1] == "lang_encoder.gated_cross_attn_layers.1.ff_gate"


def test_a_language_models_own_config_chooses():
    separate = {
        "model_type": "gpt_neox",
        "hidden_size": 64,
        "architectures": ["GPTNeoXForCausalLM"],
    }
    arch = flamingo.Flamingo.arch(separate, strict=False)
    assert (arch["model_type"], arch["cross_attn_every_n_layers"]) == ("flamingo", 2)
    assert arch["text_config"]["hidden_size"] == 64
    assert flamingo.Flamingo.arch({})["text_config"]["model_type"] == "mosaic_gpt"
    with pytest.raises(ValueError, match=r"text_config.model_type: 'bloom' is none of"):
        flamingo.Flamingo.arch({"text_config": {"model_type": "bloom"}})
    with pytest.raises(ValueError, match="n_layer: unknown key; did you mean 'n_layers'"):
        flamingo.Flamingo.arch({"text_config": {"n_layer": 3}})


def test_captions_look_at_their_image():
    """Where there is one, <image> or not; a text without one is scored the same beside any."""
    model, params = tiny.build(tiny.config("policy_head", "lstm", "flamingo"))
    mask = np.arange(N) < np.array([[6], [5], [4]])
    captions = Captions(
        images=jnp.zeros((3, 8, 8, 3), jnp.uint8),  # the preprocessed ones are given apart
        has_image=jnp.array([True, True, False]),
        text=jnp.asarray(np.where(mask, [[IMAGE, 9, 9, 9, 9, 9], [9] * 6, [9] * 6], 1)),
        text_mask=jnp.asarray(mask),
        target=jnp.asarray(mask),
    )
    rng = np.random.default_rng(0)
    images = rng.normal(size=(2, 3, model.image.size, model.image.size, 3))

    def loss(images, only):
        target = captions.target & (jnp.arange(3)[:, None] == only)
        changed = dataclasses.replace(captions, target=target)
        return model.apply({"params": params}, images, changed, method=caption_loss)[0]

    run = jax.jit(loss)
    a, b = (np.array([run(x, i) for i in range(3)]) for x in images)
    assert np.isfinite(a).all()
    assert (np.abs(a - b)[:2] > 1e-5).all()
    assert a[2] == b[2]
