"""Sessions that share a pass of the model get what each would get alone."""

import numpy as np
import pytest

from tests.test_policy import make, observe
from vla_jax.batched_step import buckets
from vla_jax.execution import Execution
from vla_jax.serve.protocol import BatchPolicy

TOLERANCE = 1e-6


def rollouts(policy, starts, steps):
    """Actions of sessions that begin at different times, all in one pass, and each alone."""
    sessions = [policy.new_session() for _ in starts]
    alone = list(sessions)
    for step in range(steps):
        now = [i for i, start in enumerate(starts) if step >= start]
        seen = [observe(100 * i + step, prompt=f"lift {i}") for i in now]
        answers = policy.infer_many([sessions[i] for i in now], seen)
        for i, obs, (reply, session) in zip(now, seen, answers, strict=True):
            expected, alone[i] = policy.infer(alone[i], obs)
            sessions[i] = session
            yield i, reply["actions"], expected["actions"]


@pytest.mark.parametrize(
    ("structure", "head"),
    [
        ("policy_head", "lstm"),
        ("one_step", "diffusion"),
        ("policy_head", "flow"),
        ("interleaved", "mlp"),
        ("discrete", "detokenizer"),
        ("video", "mlp"),
    ],
)
def test_a_batch_equals_its_rows(structure, head):
    policy = make(structure, head, max_batch=4)
    assert isinstance(policy, BatchPolicy)
    policy.warmup()
    seen = {}
    for i, shared, alone in rollouts(policy, starts=(0, 1, 3), steps=6):
        np.testing.assert_allclose(shared, alone, rtol=0, atol=TOLERANCE)
        seen.setdefault(i, []).append(shared.tobytes())
    assert {i: len(x) for i, x in seen.items()} == {0: 6, 1: 5, 2: 3}
    if structure != "discrete":  # untrained, the likeliest token may be the same for all images
        assert len({x for xs in seen.values() for x in xs}) == 14


def test_more_sessions_than_a_batch_takes():
    policy = make(max_batch=2)
    for _, shared, alone in rollouts(policy, starts=(0,) * 5, steps=2):
        np.testing.assert_allclose(shared, alone, rtol=0, atol=TOLERANCE)


def test_cameras_of_many_sizes_in_one_batch():
    policy = make(max_batch=4)
    seen = [observe(i, size=size) for i, size in enumerate((32, 48, 200))]
    fresh = policy.new_session()
    for obs, (reply, _) in zip(seen, policy.infer_many([fresh] * 3, seen), strict=True):
        alone, _ = policy.infer(fresh, obs)
        np.testing.assert_allclose(reply["actions"], alone["actions"], rtol=0, atol=TOLERANCE)


def test_sizes_of_clients_choice_do_not_pile_up(monkeypatch):
    monkeypatch.setattr("vla_jax.batched_step.MAX_SIZES", 3)
    policy = make()
    fresh = policy.new_session()
    for size in (40, 41, 42, 43, 44, 45, 46):
        policy.infer(fresh, observe(size=size))
        assert policy._steps._fit._cache_size() <= 3
    assert policy._steps._fit._cache_size() > 0


def test_chunks_being_executed_need_no_pass():
    policy = make("one_step", "mlp", Execution("receding"), max_batch=4)
    first, second = policy.new_session(), policy.new_session()
    whole, first = policy.infer(first, observe(0))
    ran = []
    run = policy._steps.run
    policy._steps.run = lambda inputs: ran.append(len(inputs)) or run(inputs)
    (rest, _), (fresh, _) = policy.infer_many([first, second], [observe(1), observe(0)])
    assert ran == [1]  # the first session still has an action left
    np.testing.assert_allclose(fresh["actions"], whole["actions"], rtol=0, atol=TOLERANCE)
    assert not np.allclose(rest["actions"], whole["actions"])


def test_everything_is_compiled_before_the_first_request():
    policy = make(max_batch=3)
    policy.warmup()
    programs = dict(policy._steps._programs)
    assert sorted(size for size, _ in programs) == [1, 2, 3]
    for _ in rollouts(policy, starts=(0, 0, 0), steps=3):
        pass
    assert policy._steps._programs == programs


@pytest.mark.parametrize(
    ("largest", "sizes"), [(1, (1,)), (2, (1, 2)), (8, (1, 2, 4, 8)), (6, (1, 2, 4, 6))]
)
def test_buckets(largest, sizes):
    assert buckets(largest) == sizes


def test_no_batch_of_nobody():
    with pytest.raises(ValueError, match="max_batch: must be at least 1"):
        make(max_batch=0)
