"""What only PaliGemma has: a choice of masks, two generations, prompts with their own specials."""

import dataclasses
import functools
import json
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import AddedToken, Regex, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from configs import paligemma2_ph, paligemma_ph
from configs.tiny import ARCHS
from tests.models import tiny
from vla_jax.config import ConfigError, resolve
from vla_jax.convert.default_config import default_config
from vla_jax.data.language.tokenizer import Tokenizer
from vla_jax.models import vla
from vla_jax.models.backbones.paligemma import PaliGemma
from vla_jax.models.backbones.paligemma2 import PaliGemma2
from vla_jax.models.caption_loss import caption_loss
from vla_jax.types import Captions

HEADS = {"policy_head": "mlp", "interleaved": "mlp", "discrete": "detokenizer"}
# One step: <eos>, 4 tokens of each camera, the instruction, the action token, \n.
IMAGES, WORDS = 8, 5  # the shorter row's words
ACT = 1 + IMAGES + WORDS
END = ACT + 2


def config(structure, mask="causal", name="paligemma", **changes):
    result = tiny.config(structure, HEADS[structure], backbone=name, **changes)
    backbone = dataclasses.replace(result.backbone, arch={**ARCHS[name], "mask": mask})
    return dataclasses.replace(result, backbone=backbone)


@functools.cache
def params(name):
    """They depend on neither the mask nor, as far as it has them, the structure."""
    return {"params": tiny.build(config("policy_head", name=name))[1]}


def influence(structure, mask):
    """[of column, on column] of the first row's real columns: does the hidden state change?"""
    model = vla.build(config(structure, mask))
    observation = tiny.observe(window=1 if structure == "policy_head" else 2, size=28)

    def look(m):
        tokens = m.encode(observation)
        sequence = m.sequence(tokens, jnp.ones(tokens.shape[:2], bool), observation).tokens
        single = jax.tree.map(lambda x: x[:1], sequence)

        def hidden(column):
            moved = single.embeds.at[0, column].multiply(-0.5)
            return m.backbone(single._replace(embeds=moved))[0]

        columns = jnp.arange(single.valid.shape[1])
        change = jax.vmap(hidden)(columns) - m.backbone(single)
        return jnp.abs(change).max(-1) > 1e-5, single.valid[0]

    changed, valid = jax.jit(lambda p: model.apply(p, method=look))(params("paligemma"))
    return np.asarray(changed)[valid][:, valid]


def test_who_sees_whom():
    causal = np.triu(np.ones((END, END), bool))
    np.testing.assert_array_equal(influence("policy_head", "causal"), causal)
    # The instruction is seen by the images; the action token by nothing before it.
    prefix = causal.copy()
    prefix[:ACT, :ACT] = True
    np.testing.assert_array_equal(influence("policy_head", "prefix"), prefix)
    assert influence("policy_head", "full").all()
    # Each step of a window has its own prefix, and does not know the steps behind it.
    both = np.triu(np.ones((2 * END, 2 * END), bool))
    both[:ACT, :ACT] = both[END : END + ACT, END : END + ACT] = True
    np.testing.assert_array_equal(influence("interleaved", "prefix"), both)


BOTH = ["paligemma2", pytest.param("paligemma", marks=pytest.mark.slow)]


@pytest.mark.slow
@pytest.mark.parametrize("name", BOTH)
def test_streaming_with_a_prefix_equals_the_window(name):
    model, weights = vla.build(config("interleaved", "prefix", name)), params(name)
    full, window = tiny.observe(window=tiny.WINDOW + 1, size=28), tiny.WINDOW
    step = jax.jit(lambda o, h: model.apply(weights, o, h, method="step"))
    history = model.empty_history(2)
    got: Any = None
    for t in range(window + 1):
        got, history = step(tiny.steps(full, t, t + 1), history)
    apply = jax.jit(lambda o: model.apply(weights, o))
    expected = apply(tiny.steps(full, 1, window + 1))
    np.testing.assert_allclose(got.arm, expected.arm[:, -1:], atol=1e-5)


@pytest.mark.parametrize("name", BOTH)
def test_what_is_written_behind_a_prefix_is_what_recomputing_gives(name):
    """Token by token behind the cached prompt, for each step of a window."""
    model, weights = vla.build(config("discrete", "prefix", name)), params(name)
    observation = tiny.observe(window=2, size=28)
    step = jax.jit(lambda o, h: model.apply(weights, o, h, method="step"))
    history = model.empty_history(2)
    for t in range(2):
        _, history = step(tiny.steps(observation, t, t + 1), history)
    ids = history.ids[:, -2:]

    def best(m):
        tokens = m.encode(observation)
        valid = jnp.ones(tokens.shape[:2], bool)
        sequence = m.sequence(tokens, valid, observation, ids)
        hidden = m.backbone(sequence.tokens, columns=sequence.columns)
        scores = m.scores(hidden, valid)
        return m.head.choose(scores[..., slice(*m.head.ids)] if m.head.ids else scores)

    chosen = jax.jit(lambda p: model.apply(p, method=best))(weights)
    assert len(np.unique(ids)) > 1  # one token again and again would prove little
    np.testing.assert_array_equal(chosen[..., : ids.shape[-1]], ids)


def test_answers_are_no_prefix():
    read = {}

    def run(tokens):
        read["given"] = np.asarray(tokens.given)
        return tokens.embeds

    backbone = SimpleNamespace()
    model = SimpleNamespace(layout=PaliGemma.LAYOUT, backbone=backbone)

    class Spy:
        encode_images = staticmethod(lambda x: jnp.zeros((len(x), 2, 4)))
        embed_text = staticmethod(lambda ids: jnp.zeros((*ids.shape, 4)))
        logits = staticmethod(lambda x: jnp.zeros((*x.shape[:2], 9)))
        __call__ = staticmethod(run)

    model.backbone = Spy()
    text = jnp.ones((1, 6), jnp.int32)
    target = jnp.asarray([[0, 0, 0, 1, 1, 1]], bool)
    unread = jnp.zeros((1, 8, 8, 3), jnp.uint8)  # the preprocessed ones are given apart
    message = Captions(unread, jnp.ones(1, bool), text, jnp.ones((1, 6), bool), target)
    caption_loss(model, jnp.zeros((1, 8, 8, 3)), message)
    assert read["given"].astype(int).tolist() == [[1, 1, 1, 1, 1, 0, 0, 0]]


def test_a_mask_without_direction_is_refused_where_it_would_leak():
    with pytest.raises(ConfigError, match=r"paligemma \+ discrete: .*'full'.*'prefix'"):
        vla.build(config("discrete", "full"))
    with pytest.raises(ConfigError, match=r"paligemma \+ interleaved: .*padded_column"):
        vla.build(config("interleaved", "full"))
    vla.build(config("interleaved", "full", **{"structure.parity.act_insert": "padded_column"}))
    model, hidden = vla.build(config("policy_head", "full")), jnp.zeros((1, 1, 32))
    with pytest.raises(ValueError, match="none can be predicted"):
        model.apply(params("paligemma"), method=lambda m: m.backbone.logits(hidden))


def test_wrong_architectures_name_every_mistake():
    with pytest.raises(ValueError, match="'both' is none of") as error:
        PaliGemma.arch({"mask": "both", "text_config": {"model_type": "gemma2"}})
    assert "['causal', 'prefix', 'full']" in str(error.value)
    assert "'paligemma2' has 'gemma2'" in str(error.value)
    with pytest.raises(ValueError, match=r"projection_dim: 2048 is not .* 64"):
        PaliGemma.arch({"text_config": {"hidden_size": 64}})


def test_a_downloaded_config_keeps_our_choices():
    """Ten times the released keys, none of them ours; both ways of writing rotary positions."""
    text = {"model_type": "gemma2", "hidden_size": 3584, "attn_logit_softcapping": 50.0}
    text |= {"rope_parameters": {"rope_theta": 5e4, "rope_type": "default"}, "num_image_tokens": 4}
    described = {"model_type": "paligemma", "projection_dim": 3584, "text_config": text}
    arch = PaliGemma2.arch({**described, "vision_config": {"image_size": 448}}, strict=False)
    assert (arch["mask"], arch["attention_cap"]) == ("causal", False)
    spec = PaliGemma2(arch).text_spec
    assert spec.rope is not None
    assert (spec.width, spec.rope.theta, spec.block.soft_cap, spec.logit_cap) == (
        3584, 5e4, None, 30.0
    )  # fmt: skip
    assert PaliGemma2({**arch, "attention_cap": True}).text_spec.block.soft_cap == 50.0
    assert PaliGemma2(arch).image_tokens == 1024


@pytest.mark.parametrize(("backbone", "kind"), [(PaliGemma, "gemma"), (PaliGemma2, "gemma2")])
def test_the_config_for_a_folder_is_that_of_its_generation(backbone, kind, tmp_path):
    described = {**backbone.arch({}), "text_config": backbone.RELEASED["text_config"]}
    (tmp_path / "config.json").write_text(json.dumps(described))
    page = {"gemma": paligemma_ph, "gemma2": paligemma2_ph}[kind]
    assert default_config(tmp_path) == page.__name__.removeprefix("configs.")
    assert resolve(page.get_config()).model.backbone.name == backbone.__name__.lower()
    described["text_config"] = {**described["text_config"], "model_type": "llama"}
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(ConfigError, match=r"text_config\.model_type: 'llama'"):
        default_config(tmp_path)


@pytest.fixture
def folder(tmp_path):
    """Letters, and a tokenizer.json that adds <bos> like Gemma's."""
    specials = ["<pad>", "<eos>", "<bos>", "<unk>"]
    letters = [*"abcdefghijklmnopqrstuvwxyzINOW:?\n", "▁"]
    names = {token: i for i, token in enumerate([*specials, *letters])}
    backend = Backend(models.BPE(vocab=names, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(" "), "removed")  # type: ignore[assignment]
    backend.add_special_tokens([AddedToken(token, special=True) for token in specials])
    backend.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="<bos> $A", special_tokens=[("<bos>", 2)]
    )
    (tmp_path / "tokenizer.json").write_text(backend.to_str())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": "<pad>"}))
    return tmp_path


def test_prompts_bring_their_own_special_tokens(folder):
    ends = vla.ends(config("policy_head"))
    tokenizer = Tokenizer.from_dir(folder, plain=any(ends))
    name = {tokenizer.token_id(t): t for t in ["<bos>", "<eos>", "<pad>", *"pushit\n"]}

    def read(prompt, length):
        ids, mask = tokenizer.encode(prompt.format(instruction="push it"), length)
        return [name.get(i, "?") for i in ids[mask]], [name[i] for i in ids[~mask]]

    message, padding = read(vla.prompt(config("policy_head")), 10)
    assert message == ["<eos>", *"pushit", "\n"]
    assert padding == ["<pad>"] * 2
    message, _ = read(vla.prompt(config("discrete")), 80)
    assert (message[0], message[-1], message.count("<bos>"), message.count("<eos>")) == (
        "<bos>",
        "<eos>",
        1,
        1,
    )
    again = Tokenizer.from_json(tokenizer.to_json())
    assert again.encode("push", 4)[0].tolist() == tokenizer.encode("push", 4)[0].tolist()
    usual = Tokenizer.from_dir(folder)
    assert usual.encode("push", 5)[0][0] == usual.token_id("<bos>")
