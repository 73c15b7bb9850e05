"""A chunk in one pass: who sees whom, where it is read, FiLM, and what is refused."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.tiny import ARCHS
from tests.models import tiny
from vla_jax.config import ConfigError
from vla_jax.models import vla
from vla_jax.models.backbones.prismatic import Prismatic
from vla_jax.types import Actions, Observation

FILM: dict[str, Any] = {"backbone.arch": {**ARCHS["prismatic"], "film": True}}


PARTS = ("scale", "shift")


def build(head: str = "l1", backbone: str = "", **changes: Any) -> tuple[Any, Any]:
    changes = {"structure.proprio": 5, **changes}
    return tiny.build(tiny.config("parallel", head, backbone, **changes))


def inputs(model: Any) -> tuple[Observation, Actions]:
    observation = tiny.observe(window=1, size=model.image.size)
    count = model.config.structure.proprio
    state = jnp.asarray(np.random.default_rng(3).normal(size=(2, 1, count)), jnp.float32)
    return dataclasses.replace(observation, proprio=state), tiny.act(window=1)


def call(model: Any, params: Any, method: Any, *args: Any) -> Any:
    return tiny.call(model, params, method, *args)


def chunk(model: Any, params: Any, observation: Observation) -> np.ndarray:
    result, _ = call(model, params, "step", observation, model.empty_history(2))
    return np.asarray(result.arm)


@pytest.mark.parametrize(
    ("head", "backbone"),
    [("l1", "prismatic"), ("detokenizer", "prismatic"), ("l1", "smolvlm")],
)
def test_every_backbone_gets_gradients_and_answers(head, backbone):
    model, params = build(head, backbone)
    observation, actions = inputs(model)

    def loss(p: Any) -> Any:
        return model.apply({"params": p}, observation, actions, None, 0.0, method="evaluate")[:2]

    (total, parts), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert np.isfinite(total)
    np.testing.assert_allclose(parts["rows"].mean(), total, rtol=1e-4)
    for path in ("backbone", "state"):
        assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(grads[path])) > 0, path
    assert chunk(model, params, observation).shape == (2, 1, 2, 6)


def test_the_prompt_sees_its_end_and_the_stop_token():
    model, params = build()
    observation, _ = inputs(model)

    def hidden(m: Any, o: Observation) -> Any:
        return m.hidden(m.tokens(o)[0])

    before = call(model, params, hidden, observation)
    last = observation.text_mask.sum(1) - 1
    changed = observation.text.at[jnp.arange(2), last].add(1)
    after = call(model, params, hidden, dataclasses.replace(observation, text=changed))
    assert np.abs(before[:, 0] - after[:, 0]).max() > 1e-4


def test_padding_changes_nothing():
    model, params = build()
    observation, _ = inputs(model)
    text = jnp.where(observation.text_mask, observation.text, 77)
    other = dataclasses.replace(observation, text=text)
    np.testing.assert_allclose(
        chunk(model, params, observation), chunk(model, params, other), atol=1e-6
    )


def test_the_last_token_of_the_prompt_says_the_first_number():
    model, params = build("detokenizer")
    observation, actions = inputs(model)

    def look(m: Any) -> Any:
        arguments, first = m.tokens(observation)
        scores = m.backbone.logits(m.hidden(arguments))
        return first[:, 0], scores, m.features(observation)[0], m.targets(observation, actions)

    first, scores, features, labels = call(model, params, look)
    for row in range(2):
        np.testing.assert_allclose(features[row, 0, 0], scores[row, first[row] - 1], atol=1e-5)
    # Two actions of seven numbers, then the stop token: the prompt's last.
    assert labels.shape == (2, 1, 15)
    last = observation.text[jnp.arange(2), observation.text_mask.sum(1) - 1]
    np.testing.assert_array_equal(labels[:, 0, -1], last)


def test_the_places_are_zeros_of_which_nothing_is_learned():
    model, params = build()
    observation, _ = inputs(model)
    arguments, first = call(model, params, "tokens", observation)
    for row in range(2):
        at = int(first[row, 0])
        assert not np.asarray(arguments.embeds[row, at : at + 14]).any()
        assert np.asarray(arguments.embeds[row, at + 14]).any()
    assert "action_token" not in params


def test_cameras_come_in_their_order_and_the_state_behind_them():
    model, params = build()
    observation, _ = inputs(model)
    arguments, _ = call(model, params, "tokens", observation)
    swapped = dataclasses.replace(
        observation,
        images={"primary": observation.images["wrist"], "wrist": observation.images["primary"]},
    )
    other, _ = call(model, params, "tokens", swapped)
    k = model.vlm.image_tokens
    first, second = arguments.embeds[:, 1 : 1 + k], other.embeds[:, 1 + k : 1 + 2 * k]
    np.testing.assert_allclose(first, second, atol=1e-5)
    moved = dataclasses.replace(observation, proprio=jnp.asarray(observation.proprio) + 1)
    changed, _ = call(model, params, "tokens", moved)
    where = np.flatnonzero(np.abs(arguments.embeds - changed.embeds).max((0, 2)))
    assert where.tolist() == [1 + 2 * k]


def test_film_follows_the_instruction_and_starts_as_the_plain_tower():
    model, params = build(**FILM)
    observation, _ = inputs(model)
    other = dataclasses.replace(observation, text=observation.text.at[:, 3].add(1))
    single, two = (call(model, params, "tokens", o)[0] for o in (observation, other))
    assert np.abs(single.embeds[:, 1:5] - two.embeds[:, 1:5]).max() > 1e-5

    def fresh(key: Any) -> Any:
        # What is not returned is not computed.
        vision = vla.initial_params(model, key)["backbone"]["vision"]
        return [vision[t]["layers"][f"film_{n}"] for t in ("dino", "siglip") for n in PARTS]

    result = jax.tree.leaves(jax.jit(fresh)(jax.random.key(0)))
    assert not any(np.asarray(leaf).any() for leaf in result)


def test_the_mean_of_the_instruction_counts_padding_on_request():
    model, params = build(**FILM)
    observation, _ = inputs(model)
    structure = dataclasses.replace(
        model.config.structure,
        parity=dataclasses.replace(model.config.structure.parity, padded_mean=True),
    )
    padded = vla.build(dataclasses.replace(model.config, structure=structure), model.arch)
    text = jnp.take(params["backbone"]["text"]["embedding"], observation.text, axis=0)
    for m, count in ((model, 7), (padded, 9)):
        result = call(m, params, "language", observation, text)
        np.testing.assert_allclose(result[0], text[0, :count].mean(0), atol=1e-6)


def test_towers_that_follow_the_instruction_need_a_structure_that_tells_it():
    with pytest.raises(ConfigError, match="tells them nothing; parallel does"):
        vla.build(tiny.config("one_step", "mlp", "prismatic", **FILM))


def test_sizes_that_do_not_go_together():
    arch = {"fused_featurizer": {"image_size": 28}, "image_crop": 0.0, "arch_specifier": "linear"}
    with pytest.raises(ValueError, match="image_size: 224 is not") as error:
        Prismatic.arch(arch)
    for words in ("image_crop", "arch_specifier: 'linear' is none of"):
        assert words in str(error.value)
