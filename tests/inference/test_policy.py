"""Checkpoint -> observation -> actions, without a server."""

import dataclasses
import tracemalloc
from typing import Any

import numpy as np
import pytest

from configs import quickstart
from tests.models import tiny
from vla_jax.config import resolve, to_dict
from vla_jax.data.language.tokenizer import Tokenizer
from vla_jax.data.units.normalize import ActionSpec, StateSpec
from vla_jax.inference.execution import Execution
from vla_jax.inference.policy import Policy, with_complete_arch
from vla_jax.inference.protocol import STATE_KEY, ObservationError
from vla_jax.inference.protocol import Policy as Protocol
from vla_jax.models import vla

SPEC = ActionSpec(
    dim=7,
    normalization="q99",
    clip=1.0,
    low=(-0.1,) * 3 + (-0.5,) * 3,
    high=(0.3,) * 3 + (0.5,) * 3,
    gripper_env=(-1.0, 1.0),
    hz=10.0,
)


def make(
    structure: str = "policy_head",
    head: str = "lstm",
    execution: Execution | None = None,
    spec: ActionSpec = SPEC,
    states: StateSpec | None = None,
    max_batch: int = 1,
    **changes: Any,
) -> Policy:
    raw = quickstart.get_config()
    window = 1 if structure == "one_step" else 3
    raw.model.structure.update({"kind": structure, "window": window, "chunk": 2, "text_len": 20})
    raw.model.head.update({"kind": head, "hidden": 16, "heads": 2, "bins": 20, "sampling_steps": 3})
    raw.model.backbone.arch["vision_config"].update({"hidden_size": 16, "intermediate_size": 24})
    raw.model.backbone.arch["text_config"].update({"embed_dim": 16, "ffn_dim": 24, "layers": 1})
    raw.model.update_from_flattened_dict(changes)
    config = resolve(raw)
    model, params = tiny.build(config.model, seed=3)
    config = with_complete_arch(config, model.arch)
    assert resolve(to_dict(config)) == config
    prompt = vla.prompt(config.model).format(instruction="lift the red block")
    tokenizer = Tokenizer.build([prompt], model.word_ids)
    options: Any = {"execution": execution, "states": states, "max_batch": max_batch}
    return Policy(config, params, tokenizer, spec, "tabletop", step=7, **options)


@pytest.fixture(scope="module")
def policy() -> Policy:
    return make()


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
        ({"observation/image": np.zeros((4, 4, 4), np.uint8)}, r"got \[4, 4, 4\]"),
        ({"prompt": ""}, "prompt: expected the instruction"),
        ({"prompt": "block " * 40}, "prompt: "),
        # Cheap to tokenize or not: such a text, kept, would be the client's way to our memory.
        ({"prompt": "lift" + " " * 10_000}, "prompt: 10004 characters, at most 8192"),
        # Resized or padded, these would take minutes and gigabytes.
        ({"observation/image": np.zeros((1, 5000, 3), np.uint8)}, "no camera's; at most 4096"),
        ({"observation/image": np.zeros((100, 1601, 3), np.uint8)}, "16 times as long as wide"),
    ],
)
def test_bad_observations(policy, change, problem):
    obs = {k: v for k, v in {**observe(), **change}.items() if v is not None}
    with pytest.raises(ObservationError, match=problem):
        policy.check(obs)


def test_instructions_are_kept_for_a_while(policy):
    """Encoded once, yet a client that sends ever new ones does not fill the memory."""
    policy.check(observe(prompt="lift the red block"))
    assert policy._encode("lift the red block") is policy._encode("lift the red block")
    for number in range(2100):
        policy._encode(f"lift {number}")
    assert len(policy._texts) <= 1024


def test_all_problems_at_once(policy):
    with pytest.raises(ObservationError) as error:
        policy.check({"wrist": 3})
    for key in ("observation/image", "observation/wrist_image", "prompt", "got ['wrist']"):
        assert key in str(error.value)


@pytest.mark.parametrize(
    ("structure", "head"),
    [
        pytest.param("one_step", "diffusion", marks=pytest.mark.slow),
        pytest.param("discrete", "detokenizer", marks=pytest.mark.slow),
        ("interleaved", "mlp"),
        pytest.param("policy_head", "flow", marks=pytest.mark.slow),
        pytest.param("video", "mlp", marks=pytest.mark.slow),
    ],
)
def test_every_structure_serves(structure, head):
    policy = make(structure, head)
    policy.warmup()
    session, replies = policy.new_session(), []
    for seed in range(4):
        policy.check(observe(seed))
        reply, session = policy.infer(session, observe(seed))
        replies.append(reply["actions"])
        assert replies[-1].shape == (2, 7)
    if structure != "discrete":  # untrained, the likeliest token may be the same for all images
        assert len({r.tobytes() for r in replies}) == 4
    again, _ = policy.infer(policy.new_session(), observe(0))
    np.testing.assert_array_equal(again["actions"], replies[0])  # samples, too, are reproducible


def test_execution(policy):
    """The same predictions, executed in four ways."""
    chunks, session = [], policy.new_session()
    for seed in range(3):
        reply, session = policy.infer(session, observe(seed))
        chunks.append(reply["actions"])
    expected = {
        "first": [c[:1] for c in chunks],
        "receding": [chunks[0][:1], chunks[0][1:], chunks[2][:1]],
        "ensemble": [chunks[0][:1], (chunks[0][1:] + chunks[1][:1]) / 2],
    }
    for mode, replies in expected.items():
        other = make(execution=Execution(mode, decay=0.0))
        assert other.metadata["chunk"] == 1
        assert other.metadata["execution"] == mode
        session = other.new_session()
        for seed, want in enumerate(replies):
            reply, session = other.infer(session, observe(seed))
            np.testing.assert_allclose(reply["actions"][:, :6], want[:, :6], atol=1e-6)
    assert policy.metadata["execution"] == "chunk"
    assert policy.metadata["chunk"] == 2


def test_a_gripper_with_a_memory():
    spec = dataclasses.replace(SPEC, gripper_repeat=2)
    with pytest.raises(ValueError, match="a gripper with a memory"):
        make(spec=spec)
    policy = make(spec=spec, execution=Execution("first"))
    session = policy.new_session()
    commands = []
    for seed in range(6):
        reply, session = policy.infer(session, observe(seed))
        commands.append(float(reply["actions"][0, 6]))
    assert commands[0] == 0.0  # nothing has changed yet
    assert set(commands) <= {-1.0, 0.0, 1.0}


def test_a_horizon_beyond_the_chunk():
    with pytest.raises(ValueError, match="horizon 5 exceeds the chunk of 2"):
        make(execution=Execution("receding", horizon=5))


@pytest.mark.parametrize(
    ("state", "problem"),
    [
        ([0.0, 1.0, float("nan"), 0.0], "not all finite"),
        (np.array([0, np.inf, 0, 0], np.float32), "not all finite"),
        ([0.0, 1.0, "x", 0.0], "expected 4 numbers"),
        ([[0.0], [1.0, 2.0], 0.0, 0.0], "expected 4 numbers"),
        ([10**400] * 4, "expected 4 numbers"),
        (np.zeros((4, 1), np.float32), "expected 4 numbers"),
    ],
)
def test_a_state_that_is_none(stateful, state, problem):
    with pytest.raises(ObservationError, match=f"{STATE_KEY}: .*{problem}"):
        stateful.check({**observe(), STATE_KEY: state})


def test_a_state_may_be_a_list_or_an_array(stateful):
    for state in ([0, 0.5, 1, True], [np.float32(0.5)] * 4, np.zeros(4, ">f8")):
        stateful.check({**observe(), STATE_KEY: state})


def test_a_list_of_texts_is_not_made_an_array(stateful):
    """An array would give every entry room for the longest: 2 GB of these."""
    tracemalloc.start()
    try:
        with pytest.raises(ObservationError, match="expected 4 numbers"):
            stateful.check({**observe(), STATE_KEY: ["x" * 10**5] + [""] * 5000})
        assert tracemalloc.get_traced_memory()[1] < 2e6
    finally:
        tracemalloc.stop()


@pytest.fixture(scope="module")
def stateful() -> Policy:
    states = StateSpec(low=(-1.0,) * 4, high=(1.0,) * 4)
    changes: Any = {"structure.proprio": 4}
    return make("video", "mlp", states=states, **changes)


@pytest.mark.slow
def test_the_robots_state():
    states = StateSpec(low=(-1.0,) * 4, high=(1.0,) * 4)
    changes: Any = {"structure.proprio": 4}
    policy = make("video", "mlp", states=states, **changes)
    policy.warmup()
    assert policy.metadata["needs_proprio"]
    assert policy.metadata["proprio_dim"] == 4
    with pytest.raises(
        ObservationError, match=r"observation/state: expected 4 numbers, got .*\[0\]"
    ):
        policy.check(observe())
    replies = []
    for value in (0.0, 0.9, 5.0, 7.0):
        obs = {**observe(), STATE_KEY: np.full(4, value, np.float32)}
        policy.check(obs)
        replies.append(policy.infer(policy.new_session(), obs)[0]["actions"])
    assert not np.array_equal(replies[0], replies[1])
    np.testing.assert_array_equal(replies[2], replies[3])  # both beyond the quantiles


def test_an_answer_that_is_no_chunk_reaches_no_robot_as_one():
    changes = {
        "structure.window": 1, "fast.code": tiny.fast_text().to_json(), "fast.prompt": "pi0",
        "fast.images": "backbone", "fast.length": 20,
    }  # fmt: skip
    guided = make("discrete", "fast", max_batch=2, **changes)
    sessions, recorded = [guided.new_session()] * 2, [observe(), observe(seed=5)]
    together = [reply["actions"] for reply, _ in guided.infer_many(sessions, recorded)]
    for session, obs, actions in zip(sessions, recorded, together, strict=True):
        assert np.isfinite(actions).all()
        np.testing.assert_allclose(guided.infer(session, obs)[0]["actions"], actions, atol=1e-5)
    # Left to itself a random model writes nothing that could be read.
    changes["fast.parity.vocabulary"] = "all"
    policy = make("discrete", "fast", execution=Execution(lost="zero"), **changes)
    first = policy.new_session()
    reply, _ = policy.infer(first, observe())
    # The server sends no such reply, see `serve.engine`; there is nothing yet to hold.
    assert np.isnan(reply["actions"]).any()
    last = np.arange(1.0, 8.0)
    moving = dataclasses.replace(first, last=last)
    reply, after = policy.infer(moving, observe())
    assert reply["actions"].tolist() == [[0, 0, 0, 0, 0, 0, 7]] * 2
    assert after.steps == 1
    lost = np.full((2, 7), np.nan)
    held = Execution(lost="last").hold(lost, last, 2, True)
    assert held is not None
    np.testing.assert_array_equal(held, [last, last])
