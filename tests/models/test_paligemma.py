"""What only PaliGemma has: a choice of masks, two generations, prompts with their own specials."""

import dataclasses
import json
from types import SimpleNamespace

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
from vla_jax.convert import config_files
from vla_jax.data.text import Tokenizer
from vla_jax.models import streaming, vla
from vla_jax.models.backbones import paligemma, paligemma2
from vla_jax.models.captions import caption_loss
from vla_jax.types import Captions

HEADS = {"policy_head": "lstm", "interleaved": "mlp", "discrete": "detokenizer"}
# One step: <eos>, 4 tokens of each camera, the instruction, the action token, \n.
IMAGES, WORDS = 8, 5  # the shorter row's words
FIRST = 1 + IMAGES + WORDS


def config(structure, mask="causal", name="paligemma", **changes):
    found = tiny.config(structure, HEADS[structure], backbone=name, **changes)
    backbone = dataclasses.replace(found.backbone, arch={**ARCHS[name], "mask": mask})
    return dataclasses.replace(found, backbone=backbone)


def influence(structure, mask, column):
    """Columns of the first row whose hidden state changes with one column of the input."""
    model, params = tiny.build(config(structure, mask))
    seen = tiny.observe(window=1 if structure == "policy_head" else 2, size=28)

    def look(m, at):
        tokens = m.encode(seen)
        sequence = m.sequence(tokens, jnp.ones(tokens.shape[:2], bool), seen)
        embeds = sequence.tokens.embeds
        moved = embeds.at[0, at].multiply(-0.5)
        hidden = [m.backbone(sequence.tokens._replace(embeds=x)) for x in (embeds, moved)]
        return jnp.abs(hidden[0] - hidden[1])[0].max(-1), sequence.tokens.valid[0]

    change, valid = jax.jit(lambda p, at: model.apply({"params": p}, at, method=look))(
        params, column
    )
    return set(np.flatnonzero((np.asarray(change) > 1e-6) & np.asarray(valid)).tolist())


def test_who_sees_whom():
    end = FIRST + 2
    assert influence("policy_head", "causal", 3) == set(range(3, end))
    assert influence("policy_head", "causal", FIRST) == {FIRST, FIRST + 1}
    # The last word is seen by images; the action token by nothing before it.
    assert influence("policy_head", "prefix", FIRST - 1) == set(range(end))
    assert influence("policy_head", "prefix", FIRST) == {FIRST, FIRST + 1}
    assert influence("policy_head", "full", FIRST + 1) == set(range(end))


def test_steps_of_a_window_have_their_own_prefix():
    end = FIRST + 2
    assert influence("interleaved", "prefix", FIRST - 1) == set(range(2 * end))
    assert influence("interleaved", "prefix", end + FIRST - 1) == set(range(end, 2 * end))


@pytest.mark.parametrize("name", ["paligemma", "paligemma2"])
def test_streaming_with_a_prefix_equals_the_window(name):
    model, params = tiny.build(config("interleaved", "prefix", name))
    whole, window = tiny.observe(window=tiny.WINDOW + 1, size=28), tiny.WINDOW
    step = jax.jit(lambda o, h: model.apply({"params": params}, o, h, method="step"))
    history, got = streaming.empty_history(model, 2), None
    for t in range(window + 1):
        got, history = step(tiny.steps(whole, t, t + 1), history)
    apply = jax.jit(lambda o: model.apply({"params": params}, o))
    expected = apply(tiny.steps(whole, 1, window + 1))
    np.testing.assert_allclose(got.arm, expected.arm[:, -1:], atol=1e-5)
    # A step's features do not know the steps behind it, or training would see the future.
    features = jax.jit(lambda o: model.apply({"params": params}, o, method="features")[0])
    early, late = features(tiny.steps(whole, 0, 2)), features(tiny.steps(whole, 0, 3))
    np.testing.assert_allclose(early, late[:, :2], atol=1e-5)


@pytest.mark.parametrize("name", ["paligemma", "paligemma2"])
def test_what_is_written_behind_a_prefix_is_what_recomputing_gives(name):
    """Token by token behind the cached prompt, for each step of a window."""
    model, params = tiny.build(config("discrete", "prefix", name))
    seen = tiny.observe(window=2, size=28)
    step = jax.jit(lambda o, h: model.apply({"params": params}, o, h, method="step"))
    history = streaming.empty_history(model, 2)
    for t in range(2):
        _, history = step(tiny.steps(seen, t, t + 1), history)
    ids = history.ids[:, -2:]

    def best(m):
        tokens = m.encode(seen)
        valid = jnp.ones(tokens.shape[:2], bool)
        scores = m.read(m.sequence(tokens, valid, seen, ids), valid)
        return m.head.choose(scores)

    chosen = jax.jit(lambda p: model.apply({"params": p}, method=best))(params)
    assert len(np.unique(ids)) > 2  # one token again and again would prove little
    np.testing.assert_array_equal(chosen[..., : ids.shape[-1]], ids)


def test_answers_are_no_prefix():
    read = {}

    def run(tokens):
        read["given"] = np.asarray(tokens.given)
        return tokens.embeds

    backbone = SimpleNamespace()
    model = SimpleNamespace(layout=paligemma.LAYOUT, backbone=backbone)

    class Spy:
        encode_images = staticmethod(lambda x: jnp.zeros((len(x), 2, 4)))
        embed_text = staticmethod(lambda ids: jnp.zeros((*ids.shape, 4)))
        logits = staticmethod(lambda x: jnp.zeros((*x.shape[:2], 9)))
        __call__ = staticmethod(run)

    model.backbone = Spy()
    text = jnp.ones((1, 6), jnp.int32)
    target = jnp.asarray([[0, 0, 0, 1, 1, 1]], bool)
    told = Captions(None, jnp.ones(1, bool), text, jnp.ones((1, 6), bool), target)
    caption_loss(model, jnp.zeros((1, 8, 8, 3)), told)
    assert read["given"].astype(int).tolist() == [[1, 1, 1, 1, 1, 0, 0, 0]]


def test_a_mask_without_direction_is_refused_where_it_would_leak():
    with pytest.raises(ConfigError, match=r"paligemma \+ discrete: .*'full'.*'prefix'"):
        vla.build(config("discrete", "full"))
    with pytest.raises(ConfigError, match=r"paligemma \+ interleaved: .*padded_column"):
        vla.build(config("interleaved", "full"))
    vla.build(config("interleaved", "full", **{"structure.act_insert": "padded_column"}))
    model, params = tiny.build(config("policy_head", "full"))
    hidden = jnp.zeros((1, 1, 32))
    with pytest.raises(ValueError, match="none can be predicted"):
        model.apply({"params": params}, method=lambda m: m.backbone.logits(hidden))


def test_wrong_architectures_name_every_mistake():
    with pytest.raises(ValueError, match="'both' is none of") as error:
        paligemma.arch({"mask": "both", "text_config": {"model_type": "gemma2"}})
    assert "['causal', 'prefix', 'full']" in str(error.value)
    assert "'paligemma2' has 'gemma2'" in str(error.value)
    with pytest.raises(ValueError, match=r"projection_dim: 2048 is not .* 64"):
        paligemma.arch({"text_config": {"hidden_size": 64}})


def test_a_downloaded_config_keeps_our_choices():
    """Ten times the released keys, none of them ours; both ways of writing rotary positions."""
    text = {"model_type": "gemma2", "hidden_size": 3584, "attn_logit_softcapping": 50.0}
    text |= {"rope_parameters": {"rope_theta": 5e4, "rope_type": "default"}, "num_image_tokens": 4}
    described = {"model_type": "paligemma", "projection_dim": 3584, "text_config": text}
    found = paligemma2.arch({**described, "vision_config": {"image_size": 448}}, strict=False)
    assert (found["mask"], found["attention_cap"]) == ("causal", False)
    spec = paligemma.text_spec(found)
    assert spec.rope is not None
    assert (spec.width, spec.rope.theta, spec.block.soft_cap, spec.logit_cap) == (
        3584, 5e4, None, 30.0
    )  # fmt: skip
    assert paligemma.text_spec({**found, "attention_cap": True}).block.soft_cap == 50.0
    assert paligemma2.image_tokens(found) == 1024


@pytest.mark.parametrize(("file", "kind"), [(paligemma, "gemma"), (paligemma2, "gemma2")])
def test_the_config_for_a_folder_is_that_of_its_generation(file, kind, tmp_path):
    described = {**file.arch({}), "text_config": file.ARCH["text_config"]}
    (tmp_path / "config.json").write_text(json.dumps(described))
    configs = config_files.Path(paligemma_ph.__file__).parent
    page = {"gemma": paligemma_ph, "gemma2": paligemma2_ph}[kind]
    assert config_files.find(configs, tmp_path) == config_files.Path(page.__file__)
    assert resolve(page.get_config()).model.backbone.name == file.__name__.rsplit(".")[-1]
    described["text_config"] = {**described["text_config"], "model_type": "llama"}
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(ConfigError, match=r"text_config\.model_type: 'llama'"):
        config_files.find(configs, tmp_path)


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

    told, padding = read(vla.prompt(config("policy_head")), 10)
    assert told == ["<eos>", *"pushit", "\n"]
    assert padding == ["<pad>"] * 2
    told, _ = read(vla.prompt(config("discrete")), 80)
    assert (told[0], told[-1], told.count("<bos>"), told.count("<eos>")) == ("<bos>", "<eos>", 1, 1)
    again = Tokenizer.from_json(tokenizer.to_json())
    assert again.encode("push", 4)[0].tolist() == tokenizer.encode("push", 4)[0].tolist()
    usual = Tokenizer.from_dir(folder)
    assert usual.encode("push", 5)[0][0] == usual.token_id("<bos>")
