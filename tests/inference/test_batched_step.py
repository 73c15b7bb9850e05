"""Sessions that share a pass of the model get what each would get alone."""

from typing import Any

import jax
import numpy as np
import pytest

from tests.inference.test_policy import make, observe
from vla_jax.inference import batched_step
from vla_jax.inference.batched_step import buckets
from vla_jax.inference.execution import Execution
from vla_jax.inference.policy import Policy
from vla_jax.inference.protocol import BatchPolicy
from vla_jax.models import layers_apart
from vla_jax.plan import machines

# Rounding of sums in another order, of numbers up to 1; jax 0.12 reaches 1.5e-6.
TOLERANCE = 3e-6


def shaken(policy: Policy, scale: float = 0.1) -> Policy:
    """With noise on all weights: some begin as zeros, and would hide what the images say."""
    rng = np.random.default_rng(0)
    policy._steps._params = jax.tree.map(
        lambda x: jax.device_put((x + scale * rng.normal(size=x.shape)).astype(x.dtype)),
        policy._steps._params,
    )
    return policy


@pytest.fixture(scope="module")
def policy() -> Policy:
    return shaken(make(max_batch=4))


def check_shared_steps(
    policy: Any, ages: tuple[int, ...], steps: int = 4, different: int = 0
) -> None:
    """Sessions of these ages go on together, and each of them alone.

    At least so many `different` replies are expected; 0: more than half of them.
    """
    alone = []
    for i, age in enumerate(ages):
        session = policy.new_session()
        for step in range(age):
            _, session = policy.infer(session, observe(100 * i + step))
        alone.append(session)
    shared = list(alone)
    replies = set()
    for step in range(steps):
        observed = [observe(100 * i + age + step, prompt=f"lift {i}") for i, age in enumerate(ages)]
        results = policy.infer_many(shared, observed)
        shared = [session for _, session in results]
        for i, (reply, _) in enumerate(results):
            expected, alone[i] = policy.infer(alone[i], observed[i])
            np.testing.assert_allclose(
                reply["actions"], expected["actions"], rtol=0, atol=TOLERANCE
            )
            replies.add(reply["actions"].tobytes())
    # Were all replies the same, equality would say nothing; an untrained diffusion ends at the
    # limits of the range, and on the side of its noise.
    assert len(replies) >= (different or 0.5 * steps * len(ages) + 1)


def test_a_batch_equals_its_rows(policy):
    assert isinstance(policy, BatchPolicy)
    check_shared_steps(policy, ages=(2, 1, 0))


@pytest.mark.parametrize(
    ("structure", "head"),
    [
        pytest.param("one_step", "flow", marks=pytest.mark.slow),
        pytest.param("interleaved", "mlp", marks=pytest.mark.slow),
        pytest.param("policy_head", "diffusion", marks=pytest.mark.slow),
        pytest.param("discrete", "detokenizer", marks=pytest.mark.slow),
        pytest.param("video", "mlp", marks=pytest.mark.slow),
    ],
)
def test_in_every_structure(structure, head):
    # The likeliest of 20 words is mostly the same, whatever images say to an untrained model.
    is_discrete = structure == "discrete"
    policy = shaken(make(structure, head, max_batch=4), 1.0 if is_discrete else 0.1)
    check_shared_steps(policy, ages=(3, 1, 0), different=2 if is_discrete else 0)


def test_layers_apart_answer_as_layers_in_a_stack(policy, monkeypatch):
    mesh = layers_apart.serving_mesh(machines.stand_ins(machines.parse("h100:1"))[0])
    monkeypatch.setattr(layers_apart, "serving_mesh", lambda _: mesh)
    steps = (apart := make(max_batch=2))._steps
    stacked = policy._steps._params
    steps._params = layers_apart.apart(stacked)
    assert isinstance(steps._params["backbone"]["text"]["layers"]["norm1"]["scale"], tuple)
    jax.tree.map(np.testing.assert_array_equal, layers_apart.together(steps._params), stacked)
    sessions, remaining = [policy.new_session()] * 2, [apart.new_session()] * 2
    for step in range(2):
        recorded = [observe(step), observe(10 + step)]
        expected, sessions = zip(*policy.infer_many(sessions, recorded), strict=True)
        result, remaining = zip(*apart.infer_many(remaining, recorded), strict=True)
        for a, b in zip(result, expected, strict=True):
            np.testing.assert_allclose(a["actions"], b["actions"], atol=1e-4)


def test_only_gpus_take_layers_apart():
    assert layers_apart.serving_mesh(jax.devices()[0]) is None
    assert layers_apart.compiler_options(None) is None


def test_more_sessions_than_a_batch_takes(policy):
    check_shared_steps(policy, ages=(0,) * 5, steps=2)


def test_cameras_of_many_sizes_in_one_batch(policy):
    observed = [observe(i, size=size) for i, size in enumerate((32, 48, 200))]
    fresh = policy.new_session()
    for obs, (reply, _) in zip(observed, policy.infer_many([fresh] * 3, observed), strict=True):
        alone, _ = policy.infer(fresh, obs)
        np.testing.assert_allclose(reply["actions"], alone["actions"], rtol=0, atol=TOLERANCE)


def test_sizes_of_clients_choice_do_not_pile_up(policy, monkeypatch):
    monkeypatch.setattr("vla_jax.inference.batched_step.MAX_SIZES", 3)
    fresh = policy.new_session()
    for size in (40, 41, 42, 43, 44):
        policy.infer(fresh, observe(size=size))
        assert 0 < policy._steps._fit._cache_size() <= 3


def test_chunks_being_executed_need_no_pass():
    policy = make("one_step", "mlp", Execution("receding"), max_batch=4)
    first, second = policy.new_session(), policy.new_session()
    full, first = policy.infer(first, observe(0))
    ran = []
    run = policy._steps.run
    policy._steps.run = lambda inputs: ran.append(len(inputs)) or run(inputs)
    (remainder, _), (fresh, _) = policy.infer_many([first, second], [observe(1), observe(0)])
    assert ran == [1]  # the first session still has an action left
    np.testing.assert_allclose(fresh["actions"], full["actions"], rtol=0, atol=TOLERANCE)
    assert not np.allclose(remainder["actions"], full["actions"])


def test_everything_is_compiled_before_the_first_request():
    policy = make(max_batch=3)
    policy.warmup()
    programs = dict(policy._steps._programs)
    assert sorted(size for size, _ in programs) == [1, 2, 3]
    check_shared_steps(policy, ages=(0, 1, 0), steps=2)
    assert policy._steps._programs == programs


def test_all_batch_sizes_have_one_trace_of_the_model(monkeypatch):
    traced = []
    observed = batched_step.Observation
    monkeypatch.setattr(
        batched_step, "Observation", lambda *x, **y: traced.append(1) or observed(*x, **y)
    )
    policy = make(max_batch=4)
    policy.warmup()
    assert len(policy._steps._programs) == 3
    assert len(traced) == 1


@pytest.mark.parametrize(
    ("largest", "sizes"), [(1, (1,)), (2, (1, 2)), (8, (1, 2, 4, 8)), (6, (1, 2, 4, 6))]
)
def test_buckets(largest, sizes):
    assert buckets(largest) == sizes


def test_no_batch_of_nobody():
    with pytest.raises(ValueError, match="max_batch: must be at least 1"):
        make(max_batch=0)
