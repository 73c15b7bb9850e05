"""Checkpoint -> observation -> actions, without a server."""

import jax
import numpy as np
import pytest

from configs import quickstart
from vla_jax.config import resolve, to_dict
from vla_jax.data.normalize import ActionSpec
from vla_jax.data.text import Tokenizer
from vla_jax.models import vla
from vla_jax.models.backbones import kosmos2
from vla_jax.policy import Policy, with_complete_arch
from vla_jax.serve.protocol import ObservationError
from vla_jax.serve.protocol import Policy as Protocol

SPEC = ActionSpec(
    dim=7,
    normalization="q99",
    clip=1.0,
    low=(-0.1,) * 3 + (-0.5,) * 3,
    high=(0.3,) * 3 + (0.5,) * 3,
    gripper_env=(-1.0, 1.0),
    hz=10.0,
)


@pytest.fixture(scope="module")
def policy() -> Policy:
    raw = quickstart.get_config()
    raw.model.structure.update({"window": 3, "chunk": 2, "text_len": 14})
    config = resolve(raw)
    config = with_complete_arch(config, vla.build(config.model).arch)
    assert resolve(to_dict(config)) == config
    model = vla.build(config.model)
    params = jax.jit(lambda k: vla.initial_params(model, k))(jax.random.key(3))
    tokenizer = Tokenizer.build([kosmos2.PROMPT.format(instruction="lift the red block")], 64)
    return Policy(config, params, tokenizer, SPEC, "tabletop", step=7)


def observe(seed: int = 0, size: int = 64, prompt: str = "lift the red block"):
    rng = np.random.default_rng(seed)
    image = {
        key: rng.integers(0, 255, (size, size, 3), np.uint8)
        for key in ("observation/image", "observation/wrist_image")
    }
    return {**image, "prompt": prompt}


def test_is_what_the_server_wants(policy):
    assert isinstance(policy, Protocol)
    policy.warmup()
    assert policy.metadata["cameras"] == {
        "primary": "observation/image",
        "wrist": "observation/wrist_image",
    }


def test_actions_are_in_robot_units(policy):
    policy.check(observe())
    reply, _ = policy.infer(policy.new_session(), observe())
    actions = reply["actions"]
    assert actions.shape == (2, 7)
    assert actions.dtype == np.float32
    assert np.all(actions[:, :3] >= -0.1 - 1e-6)
    assert np.all(actions[:, :3] <= 0.3 + 1e-6)
    assert set(np.unique(actions[:, 6])) <= {-1.0, 1.0}


def test_history_lives_in_the_session(policy):
    fresh = policy.new_session()
    first, used = policy.infer(fresh, observe(0))
    second, _ = policy.infer(used, observe(1))
    alone, _ = policy.infer(fresh, observe(1))
    again, _ = policy.infer(fresh, observe(0))
    np.testing.assert_array_equal(first["actions"], again["actions"])
    assert not np.array_equal(second["actions"], alone["actions"])


def test_any_camera_size(policy):
    reply, _ = policy.infer(policy.new_session(), observe(size=96))
    assert np.isfinite(reply["actions"]).all()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"observation/image": None}, "observation/image: missing"),
        ({"observation/image": np.zeros((4, 4, 3))}, "expected a uint8 array"),
        ({"observation/image": np.zeros((3, 4, 4), np.uint8)}, r"got \[3, 4, 4\]"),
        ({"prompt": ""}, "prompt: expected the instruction"),
        ({"prompt": "block " * 40}, "prompt: "),
    ],
)
def test_bad_observations(policy, change, problem):
    obs = {k: v for k, v in {**observe(), **change}.items() if v is not None}
    with pytest.raises(ObservationError, match=problem):
        policy.check(obs)


def test_all_problems_at_once(policy):
    with pytest.raises(ObservationError) as error:
        policy.check({"wrist": 3})
    for key in ("observation/image", "observation/wrist_image", "prompt", "got ['wrist']"):
        assert key in str(error.value)
