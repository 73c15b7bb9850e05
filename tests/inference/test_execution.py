"""Which actions of which chunk are executed."""

import numpy as np
import pytest

from vla_jax.inference.execution import Execution, Plan

F, A = 3, 2


def chunk(step: int) -> np.ndarray:
    """Entry [k, 0] is 10 * (step it was made) + k; [k, 1] the step it is meant for."""
    return np.array([[10 * step + k, step + k] for k in range(F)], np.float32)


def run(execution: Execution, steps: int) -> tuple[list[np.ndarray], list[bool]]:
    plan, replies, asked = Plan(), [], []
    for step in range(steps):
        asked.append(execution.needs_chunk(plan))
        actions, plan = execution.select(chunk(step) if asked[-1] else None, plan)
        assert len(actions) == execution.reply_length(F)
        replies.append(actions)
    return replies, asked


def test_a_chunk_and_its_beginning():
    np.testing.assert_array_equal(run(Execution("chunk"), 1)[0][0], chunk(0))
    np.testing.assert_array_equal(run(Execution("chunk", horizon=2), 1)[0][0], chunk(0)[:2])


def test_first():
    replies, asked = run(Execution("first"), 4)
    assert [x[0, 0] for x in replies] == [0, 10, 20, 30]
    assert all(asked)


@pytest.mark.parametrize(
    ("horizon", "made"),
    [
        (0, [0, 1, 2, 30, 31, 32, 60]),
        (2, [0, 1, 20, 21, 40, 41, 60]),
        (1, [0, 10, 20, 30, 40, 50, 60]),
    ],
)
def test_receding(horizon, made):
    replies, asked = run(Execution("receding", horizon=horizon), 7)
    assert [x[0, 0] for x in replies] == made
    # Every action is executed at the step it was meant for, whatever chunk it comes from.
    assert [x[0, 1] for x in replies] == list(range(7))
    assert asked == [i % (horizon or F) == 0 for i in range(7)]


def test_ensemble_means_what_is_said_of_the_same_step():
    replies, asked = run(Execution("ensemble", decay=0.5), 5)
    assert all(asked)
    assert [x[0, 1] for x in replies] == pytest.approx(range(5), abs=1e-5)
    for step, reply in enumerate(replies):
        ages = range(min(step, F - 1), -1, -1)  # oldest first
        weights = np.exp(-0.5 * np.arange(len(ages)))
        votes = [10 * (step - age) + age for age in ages]
        assert reply[0, 0] == pytest.approx(np.dot(weights, votes) / weights.sum(), rel=1e-5)


def test_ensemble_without_decay_is_the_mean():
    replies, _ = run(Execution("ensemble", decay=0.0), 3)
    assert replies[2][0, 0] == pytest.approx((2 + 11 + 20) / 3)


def test_problems_are_all_named():
    with pytest.raises(ValueError, match="execution") as error:
        Execution("best", horizon=-1, decay=-0.1, lost="go")
    for word in ("'best'", "'receding'", "horizon", "decay", "lost 'go'"):
        assert word in str(error.value)
    with pytest.raises(ValueError, match="no meaning with 'first'"):
        Execution("first", horizon=2)
    with pytest.raises(ValueError, match="horizon 4 exceeds the chunk of 3"):
        Execution("receding", horizon=4).reply_length(F)
