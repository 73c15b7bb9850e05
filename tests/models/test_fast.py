"""A VLM that writes FAST tokens: what it is trained on, what it writes, beside an expert."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import tiny
from vla_jax.config import ConfigError
from vla_jax.models import vla
from vla_jax.models.fast_code import FastCode
from vla_jax.models.heads.fast import answer_loss

CODE = tiny.fast_text()


def build(changes: Any = None, backbone: str = "paligemma") -> tuple[Any, Any]:
    changes = {"fast.code": CODE.to_json(), **(changes or {})}
    return tiny.build(tiny.config("discrete", "fast", backbone, **changes))


def inputs(model: Any) -> tuple[Any, Any]:
    observation = tiny.observe(window=1, size=model.image.size)
    return observation, tiny.write(model, tiny.act(window=1))


def run(model: Any, params: Any, *args: Any, method: str) -> Any:
    return tiny.call(model, params, method, *args)


def chunks(model: Any, prediction: Any) -> np.ndarray:
    """A prediction in the numbers that are written."""
    assert model.config.has_gripper
    parts = [np.asarray(prediction.arm), np.asarray(prediction.gripper)[..., None]]
    return np.concatenate(parts, -1)[:, 0]


def test_a_random_model_writes_whole_chunks_and_each_is_what_its_ids_say():
    model, params = build()
    observation, _ = inputs(model)
    ids = np.asarray(run(model, params, observation, jax.random.key(0), method="write"))
    assert ids.shape == (2, tiny.ANSWER)
    assert (ids[:, :2] == CODE.opening).all()
    result = chunks(model, run(model, params, observation, method="__call__"))
    for row, chunk in zip(ids, result, strict=True):
        wanted = CODE.read(row, tiny.CHUNK, 7)
        wanted[:, :-1] = wanted[:, :-1].clip(-1, 1)  # of the arm
        np.testing.assert_allclose(chunk, wanted, atol=1e-5)


# PaliGemma's choice among a chunk's tokens is looked at below.
@pytest.mark.parametrize("backbone", [pytest.param("paligemma", marks=pytest.mark.slow), "kosmos2"])
def test_each_word_written_is_the_likeliest_given_those_before(backbone):
    model, params = build({"fast.parity.vocabulary": "all"}, backbone)
    observation, actions = inputs(model)
    ids = run(model, params, observation, jax.random.key(0), method="write")
    scores = run(model, params, observation, ids, method="scores")
    np.testing.assert_array_equal(np.argmax(scores, axis=-1), ids)
    # A random model writes no chunk: an error, not an action.
    prediction = run(model, params, observation, method="__call__")
    assert np.isnan(np.asarray(prediction.arm)).all()
    _, parts, filled = run(model, params, observation, actions, None, 0.0, method="evaluate")
    assert parts["unreadable"] == 1
    assert not np.asarray(filled.arm).any()


def test_while_a_chunk_is_written_only_its_tokens_are_scored_and_the_likeliest_taken():
    model, params = build()
    observation, _ = inputs(model)
    ids = np.asarray(run(model, params, observation, jax.random.key(0), method="write"))
    scores = run(model, params, observation, jnp.asarray(ids), method="scores")
    code = FastCode.from_json(model.config.fast.code, tiny.CHUNK, 7)
    first, progress, taken = code.token_end - code.size, code.begin(2), 0
    for column in range(len(CODE.opening), ids.shape[1]):
        may = code.may_follow(progress)
        ours = scores[:, column, first : code.token_end][:, ::-1]
        token = jnp.argmax(jnp.where(may, ours, -jnp.inf), axis=-1)
        goes_on = np.asarray(may.any(1))
        np.testing.assert_array_equal(ids[goes_on, column], code.token_end - 1 - token[goes_on])
        assert (ids[~goes_on, column] == CODE.stop).all()
        progress, taken = code.follow(progress, token), taken + goes_on.sum()
    assert taken > 2
    key = jax.random.key(0)
    traced = jax.make_jaxpr(lambda p: model.apply({"params": p}, observation, key, method="write"))(
        params
    )
    # Of the whole vocabulary there is the table itself and nothing else.
    vocab = model.arch["text_config"]["vocab_size"]
    assert f",{vocab}]" not in str(traced)


def test_the_loss_is_a_mean_of_answers_and_leaves_out_what_is_not_supervised():
    model, params = build()
    observation, actions = inputs(model)
    _, parts = run(model, params, observation, actions, None, 0.0, method="loss")
    scores = run(model, params, observation, actions.written, method="scores")
    logs = np.asarray(jax.nn.log_softmax(scores))
    for row, ids, each in zip(logs, np.asarray(actions.written), parts["rows"], strict=True):
        ids = ids[ids >= 0]
        np.testing.assert_allclose(each, -row[np.arange(len(ids)), ids].mean(), rtol=1e-5)
    total, _ = answer_loss(scores, actions.written, jnp.array([True, False]))
    np.testing.assert_allclose(total, parts["rows"][0], rtol=1e-6)
    # The tail of a chunk may lie behind an episode's end: the answer counts as a whole.
    cut = dataclasses.replace(actions, mask=actions.mask.at[0, 0, 1].set(False))
    assert np.asarray(model.supervised(cut).mask).all()


def test_words_see_the_prompt_and_what_was_written_before_them():
    model, params = build({"backbone.arch.mask": "prefix"})
    observation, actions = inputs(model)
    before = run(model, params, observation, actions.written, method="scores")
    later = actions.written.at[:, 4].set(actions.written[:, 4] - 1)
    after = run(model, params, observation, later, method="scores")
    moved = np.abs(np.asarray(before - after)).max((0, 2)) > 1e-6
    assert not moved[:5].any()
    assert moved[5]
    # The last word of the prompt is seen by its first.
    assert model.config.structure.text_len == 9
    text = observation.text.at[1, 8].set(11)
    other = dataclasses.replace(observation, text=text)
    changed = run(model, params, other, actions.written, method="scores")
    assert np.abs(np.asarray(before - changed))[1, 0].max() > 1e-6


def test_state_and_black_images_are_tokens():
    model, params = build({"structure.proprio": 5, "fast.blank": 1})
    observation, actions = inputs(model)
    state = jnp.asarray(np.random.default_rng(0).normal(size=(2, 1, 5)), jnp.float32)
    observation = dataclasses.replace(observation, proprio=state)
    tokens = run(model, params, observation, method="encode")
    assert tokens.shape[1] == 3 * model.vlm.image_tokens + 1
    black = -jnp.asarray(model.image.mean) / jnp.asarray(model.image.std)
    images = observation.images | {
        "secondary": jnp.broadcast_to(black, observation.images["wrist"].shape)
    }
    with_third = dataclasses.replace(
        model.config,
        fast=dataclasses.replace(model.config.fast, blank=0),
        structure=dataclasses.replace(
            model.config.structure, cameras=("primary", "wrist", "secondary")
        ),
    )
    third = vla.build(with_third, model.arch)
    observed = observation.image_mask | {"secondary": jnp.ones((2, 1), bool)}
    same = dataclasses.replace(observation, images=images, image_mask=observed)
    single = run(model, params, observation, actions.written, method="scores")
    two = run(third, params, same, actions.written, method="scores")
    np.testing.assert_allclose(single, two, atol=1e-5)


def test_without_a_tokenizer_nothing_is_written():
    model, params = build({"fast.code": {}})
    observation, _ = inputs(model)
    with pytest.raises(ConfigError, match=r"model\.fast\.dir"):
        run(model, params, observation, method="__call__")


# ---- Beside an expert.


def beside(**changes: Any) -> tuple[Any, Any]:
    changes = {"fast.code": CODE.to_json(), "expert.fast_weight": 0.5, **changes}
    return tiny.build(tiny.config("expert", "expert_flow", **changes))


def gradients(model: Any, params: Any, observation: Any, actions: Any) -> Any:
    def loss(p: Any) -> Any:
        args = observation, actions, jax.random.key(0), 0.0
        return model.apply({"params": p}, *args, method="loss")[0]

    return jax.jit(jax.grad(loss))(params)


def test_insulated_the_vlm_learns_from_the_words_alone_and_the_expert_from_the_flow_alone():
    model, params = beside(**{"expert.insulate": True})
    observation, actions = inputs(model)
    grads = gradients(model, params, observation, actions)

    def words(p: Any) -> Any:
        written = actions.written
        scores = model.apply({"params": p}, observation, written, method="prefix_and_answer")[1]
        return 0.5 * answer_loss(scores, written, jnp.ones(2, bool))[0]

    alone = jax.jit(jax.grad(words))(params)
    for result, wanted in zip(
        jax.tree.leaves(grads["backbone"]), jax.tree.leaves(alone["backbone"]), strict=True
    ):
        np.testing.assert_allclose(result, wanted, atol=1e-6)
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(grads["backbone"])) > 0
    silent = dataclasses.replace(model.config.expert, fast_weight=0.0)
    flow = vla.build(dataclasses.replace(model.config, expert=silent), model.arch)
    without = gradients(flow, params, observation, actions)
    for name in ("expert", "head"):
        for result, wanted in zip(
            jax.tree.leaves(grads[name]), jax.tree.leaves(without[name]), strict=True
        ):
            np.testing.assert_allclose(result, wanted, atol=1e-6)
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(without["backbone"]))


def test_the_expert_does_not_see_the_words():
    model, params = beside()
    observation, actions = inputs(model)
    other = dataclasses.replace(actions, written=actions.written.at[:, 3].set(11))
    parts = [
        run(model, params, observation, x, jax.random.key(0), 0.0, method="loss")[1]
        for x in (actions, other)
    ]
    np.testing.assert_allclose(parts[0]["loss_velocity"], parts[1]["loss_velocity"], rtol=1e-6)
    assert parts[0]["loss_token"] != parts[1]["loss_token"]
