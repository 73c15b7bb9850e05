"""A structure and a head from outside the package: one class and one line each, nothing else."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import bridge_smoke
from tests.models import tiny
from vla_jax.config import ConfigError, HeadConfig, describe, resolve, to_dict
from vla_jax.config.option import option
from vla_jax.models import legality, vla
from vla_jax.models.heads import HEADS
from vla_jax.models.heads.common import Head, flatten, newest
from vla_jax.models.structures import STRUCTURES, Structure
from vla_jax.models.towers.layers import Dense
from vla_jax.types import Prediction


class Average(Structure):
    """The head sees one vector: a learned multiple of the mean over the steps so far."""

    description = "the head sees the mean of the window's features"
    one_step_reason = "the window becomes its mean, so there are no steps to remember"

    @property
    def sizes(self):
        return dataclasses.replace(super().sizes, steps=1)

    def setup(self):
        super().setup()
        self.gain = self.param("gain", nn.initializers.ones, ())

    def features(self, observation, actions=None):
        features, valid = super().features(observation, actions)
        return self.mean(features, valid), valid.any(axis=1, keepdims=True)

    def mean(self, features, valid):
        weight = valid[..., None, None] / jnp.maximum(valid.sum(1), 1)[:, None, None, None]
        return self.gain * (features * weight).sum(axis=1, keepdims=True)

    def supervised(self, actions):
        return newest(actions)

    def step(self, observation, history, key=None):
        features, valid = super().features(observation)
        history = history.append(features, valid)
        mean = self.mean(history.features, history.valid)
        return self.head.predict(mean, valid, key, last=True), history


@dataclasses.dataclass(frozen=True)
class LinearOptions(HeadConfig):
    """Options of the head `linear`."""

    reach: float = option(1.0, "Largest value of the arm.", positive=True)


class LinearHead(Head):
    """One matrix; it inherits the loss, and which structures take it."""

    head: LinearOptions

    OPTIONS = LinearOptions

    @nn.compact
    def __call__(self, features, valid):
        del valid
        s = self.sizes
        out = Dense((s.chunk * s.action_dim,), dtype=self.dtype, name="out")(flatten(features))
        out = out.reshape(*features.shape[:2], s.chunk, s.action_dim)
        return Prediction(arm=self.head.reach * jnp.tanh(out[..., :-1]), gripper=out[..., -1])


@pytest.fixture(autouse=True)
def added(monkeypatch):
    monkeypatch.setitem(STRUCTURES, "average", Average)
    monkeypatch.setitem(HEADS, "linear", LinearHead)


def test_a_new_structure_and_a_new_head_are_legal_where_they_should_be():
    for head in HEADS:
        reason = legality.refusal("kosmos2", "average", head)
        if HEADS[head].reads != "features":
            assert reason == HEADS[head].reads_reason
        else:
            assert reason == (Average.one_step_reason if head in ("lstm", "gpt2") else None)
    for structure in STRUCTURES:
        assert (legality.refusal("ofa", structure, "linear") is None) == (
            structure in ("average", "one_step", "policy_head")
        )
    with pytest.raises(ConfigError, match=r"average takes mlp, diffusion, flow, linear"):
        vla.build(tiny.config("average", "lstm"))


def test_the_options_of_a_new_head_are_options_like_all_others():
    assert "model.head.reach = 1.0\n    Largest value of the arm." in describe()
    raw = bridge_smoke.get_config("data")
    raw.model.head.reach = 0.5  # as the command line does
    assert "reach" not in to_dict(resolve(raw))["model"]["head"]  # the kind is still lstm
    raw.model.head.kind = "linear"
    config = resolve(raw)
    assert config.model.head == LinearOptions(kind="linear", reach=0.5)
    assert resolve(to_dict(config)) == config
    raw.model.head.reach, raw.train.batch_size = -1.0, 0
    with pytest.raises(ConfigError) as error:
        resolve(raw)
    for key in ("model.head.reach", "train.batch_size"):
        assert f"{key}: must be positive" in str(error.value)


def test_they_train_and_a_stream_of_steps_equals_the_window():
    model, params = tiny.build(tiny.config("average", "linear"))
    assert set(params["head"]) == {"out"}
    variables, full = {"params": params}, tiny.observe()

    def loss(params: Any) -> Any:
        args = (full, tiny.act(), None, 0.1)
        return model.apply({"params": params}, *args, method="loss")[0]

    assert np.abs(jax.jit(jax.grad(loss))(params)["gain"]) > 0
    step = jax.jit(lambda o, h: model.apply(variables, o, h, method="step"))
    history = model.empty_history(2)
    got: Any = None
    for t in range(tiny.WINDOW):
        got, history = step(tiny.steps(full, t, t + 1), history)
    expected = jax.jit(lambda o: model.apply(variables, o))(full)
    np.testing.assert_allclose(got.arm, expected.arm, atol=1e-5)
    np.testing.assert_allclose(got.gripper, expected.gripper, atol=1e-5)
