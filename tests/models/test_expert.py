"""The expert beside the VLM: who sees whom, one reading of the prefix, insulation, refusals."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench.denoising import reads
from configs.tiny import ARCHS
from tests.models import tiny
from vla_jax.config import ConfigError
from vla_jax.models import vla
from vla_jax.models.towers.expert import blocks_mask
from vla_jax.types import Actions, Observation

# One layer cannot alternate.
TWO = {
    **ARCHS["paligemma"],
    "text_config": {**ARCHS["paligemma"]["text_config"], "num_hidden_layers": 2},
}
KINDS: dict[str, dict[str, Any]] = {
    "pi0": {"expert.adaptive": False, "expert.state": "expert", "structure.proprio": 5},
    "pi05": {"expert.insulate": True},
    "smolvla": {
        "expert.adaptive": False, "expert.state": "prefix", "structure.proprio": 5,
        "expert.joint_every": 2, "expert.causal": True, "backbone.arch": TWO, "expert.loss": "real",
    },
}  # fmt: skip


def build(kind: str, **changes: Any) -> tuple[Any, Any]:
    return tiny.build(tiny.config("expert", "expert_flow", **(KINDS[kind] | changes)))


def inputs(model: Any) -> tuple[Observation, Actions]:
    count = model.config.structure.proprio
    observation = tiny.observe(window=1, size=model.image.size)
    rng = np.random.default_rng(3)
    state = jnp.asarray(rng.normal(size=(2, 1, count)), jnp.float32) if count else None
    return dataclasses.replace(observation, proprio=state), tiny.act(window=1)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_what_they_should(kind):
    model, params = build(kind)
    observation, actions = inputs(model)

    def loss(p: Any) -> Any:
        return model.apply(
            {"params": p}, observation, actions, jax.random.key(0), 0.0, method="loss"
        )[0]

    grads = jax.jit(jax.grad(loss))(params)
    for name in ("backbone", "expert", "head"):
        size = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(grads[name]))
        assert (size == 0) == (name == "backbone" and kind == "pi05"), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_later_action_is_seen_by_earlier_ones_unless_causal(kind):
    model, params = build(kind)
    observation, actions = inputs(model)
    noise, time = jax.random.normal(jax.random.key(1), (2, 2, 8)), jnp.full(2, 0.5)
    run = jax.jit(
        lambda a, n: model.apply({"params": params}, observation, a, n, time, method="errors")[1]
    )
    before, after = run(actions, noise), run(actions, noise.at[:, 1].add(1.0))
    moved = bool(jnp.abs(before[:, 0] - after[:, 0]).max() > 1e-6)
    assert moved == (kind != "smolvla")


def test_a_masked_camera_is_as_if_it_were_not_there():
    model, params = build("pi0")
    observation, _ = inputs(model)
    hidden = {**observation.image_mask, "wrist": jnp.zeros((2, 1), bool)}
    masked = dataclasses.replace(observation, image_mask=hidden)
    alone = dataclasses.replace(model.config.structure, cameras=("primary",))
    other = vla.build(dataclasses.replace(model.config, structure=alone), model.arch)
    start = jax.random.normal(jax.random.key(1), (2, 2, 8))
    results = [
        jax.jit(lambda o, m=m: m.apply({"params": params}, o, start, method="sample"))(o)
        for m, o in ((model, masked), (other, observation))
    ]
    np.testing.assert_allclose(*results, atol=1e-5)


def test_control_steps_are_samples_of_their_key():
    model, params = build("pi0")
    observation, _ = inputs(model)
    step = jax.jit(
        lambda k: model.apply(
            {"params": params}, observation, model.empty_history(2), k, method="step"
        )[0]
    )
    single, same, other = (step(jax.random.key(i)) for i in (0, 0, 1))
    assert single.arm.shape == (2, 1, 2, 6)
    np.testing.assert_array_equal(single.arm, same.arm)
    assert np.abs(np.asarray(single.arm) - np.asarray(other.arm)).max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_a_denoising_step_reads_nothing_that_could_be_made_before(kind):
    """Neither the VLM nor, where norms follow the time, the maps of the time."""
    changes: dict[str, Any] = {"structure.proprio": 5} | KINDS[kind]
    result = reads(tiny.config("expert", "expert_flow", **changes))
    inside = {path.rsplit("/", 1)[0] for path in result.inside}
    assert not any(path.startswith("backbone/") for path in inside)
    assert any(path.startswith("expert/layers/") for path in inside)
    of_time = {path for path in inside if "modulation" in path or path.startswith("head/time")}
    assert bool(of_time) == (kind != "pi05")
    assert sum("modulation" in path for path in result.before) == (6 if kind == "pi05" else 0)


def test_blocks():
    mask = blocks_mask(jnp.array([True, True, False, False]))[0]
    expected = [[1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]]
    np.testing.assert_array_equal(mask, np.array(expected, bool))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"structure.window": 2}, "expert has no history"),
        ({"expert.state": "expert"}, "needs structure.proprio"),
        ({"expert.padded": 4}, "expert.padded: 4 is less"),
        ({"expert.layers": 3}, "3 layers do not divide"),
        ({"structure.readout": "text"}, "reads all tokens"),
    ],
)
def test_refusals(changes, words):
    with pytest.raises(ConfigError, match=words):
        vla.build(tiny.config("expert", "expert_flow", **changes))


def test_backbones_without_keys_and_values_are_refused():
    with pytest.raises(ConfigError, match=r"kosmos2 takes .*video"):
        vla.build(tiny.config("expert", "expert_flow", "kosmos2"))
