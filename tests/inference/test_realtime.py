"""Chunks that agree with what is still executed of the last one."""

import functools
import math
from typing import Any

import numpy as np
import pytest

from tests.inference.test_policy import SPEC, make
from vla_jax.data.units.policy_units import PolicyUnits
from vla_jax.data.units.scaling import Scaling
from vla_jax.inference.execution import Execution
from vla_jax.inference.protocol import ObservationError
from vla_jax.inference.realtime import DELAY_KEY, EXECUTED_KEY, RealTime, prefix_weights

CHUNK = 8


def observation(seed: int = 0, **timing: float) -> dict:
    pixels = np.random.default_rng(seed).integers(0, 255, (2, 48, 48, 3), np.uint8)
    obs = {
        "observation/image": pixels[0],
        "observation/wrist_image": pixels[1],
        "prompt": "lift the red block",
    }
    return obs | {f"rtc/{key}": value for key, value in timing.items()}


@functools.cache  # a session holds all that changes
def policy(head: str, guidance: str = "jacobian", mode: str = "rtc"):
    changes: dict[str, Any] = {"structure.chunk": CHUNK, "head.sampling_steps": 10}
    return make("one_step", head, Execution(mode, guidance=guidance), **changes)


def test_weights_by_hand():
    # One of three steps of the ramp lies at each of the actions 2, 3, 4.
    np.testing.assert_allclose(
        prefix_weights(2, 5, 8, "linear"), [1, 1, 0.75, 0.5, 0.25, 0, 0, 0], atol=1e-6
    )
    half = 0.5 * math.expm1(0.5) / (math.e - 1)
    np.testing.assert_allclose(prefix_weights(1, 2, 3, "exp"), [1, half, 0], atol=1e-6)
    np.testing.assert_array_equal(prefix_weights(1, 2, 4, "ones"), [1, 1, 0, 0])
    np.testing.assert_array_equal(prefix_weights(1, 3, 4, "zeros"), [1, 0, 0, 0])
    # A delay longer than the overlap: all of the overlap binds, and nothing behind it.
    np.testing.assert_array_equal(prefix_weights(7, 3, 5, "exp"), [1, 1, 1, 0, 0])
    with pytest.raises(ValueError, match=r"none of.*linear"):
        prefix_weights(0, 1, 2, "cosine")


def test_the_overlap_is_what_is_left_or_what_was_chosen():
    everything = RealTime(jacobian=False, limit=5.0, schedule="ones")
    assert everything.weights(8, executed=3, delay=1).tolist() == [1] * 5 + [0] * 3
    bounded = RealTime(jacobian=False, limit=5.0, schedule="ones", overlap=2)
    assert bounded.weights(8, executed=3, delay=1).tolist() == [1] * 2 + [0] * 6
    assert everything.weights(8, executed=9, delay=1).tolist() == [0] * 8


# The exact guidance of a flow has its original beside it in tests/parity.
@pytest.mark.parametrize(
    ("guidance", "head"),
    [
        ("jacobian", "diffusion"),
        ("direct", "flow"),
        pytest.param("jacobian", "flow", marks=pytest.mark.slow),
        pytest.param("direct", "diffusion", marks=pytest.mark.slow),
    ],
)
def test_a_chunk_follows_the_last(guidance, head):
    guided, free = policy(head, guidance), policy(head, mode="chunk")
    first, session = guided.infer(guided.new_session(), observation(0))
    plain, other = free.infer(free.new_session(), observation(0))
    # An episode's first chunk has nothing to follow.
    np.testing.assert_allclose(first["actions"], plain["actions"], atol=1e-5)
    executed, delay = 3, 2
    observed = observation(1, executed=executed, delay=delay)
    second, _ = guided.infer(session, observed)
    unguided, _ = free.infer(other, observation(1))
    arm = slice(0, 6)
    overlap = slice(0, delay)
    wanted = first["actions"][executed:][overlap, arm]
    error = np.abs(second["actions"][overlap, arm] - wanted).mean()
    before = np.abs(unguided["actions"][overlap, arm] - wanted).mean()
    assert error < 0.35 * before, (error, before)


def test_a_client_that_tells_no_times_gets_free_chunks():
    guided, free = policy("flow"), policy("flow", mode="chunk")
    sessions = [x.infer(x.new_session(), observation(0))[1] for x in (guided, free)]
    replies = [
        x.infer(session, observation(1))[0]["actions"]
        for x, session in zip((guided, free), sessions, strict=True)
    ]
    np.testing.assert_allclose(*replies, atol=1e-5)


def test_metadata_say_what_to_send_and_how_far_a_step_may_go():
    described = policy("flow", "direct").metadata["rtc"]
    assert described["guidance"] == "direct"
    assert (described["executed"], described["delay"]) == (EXECUTED_KEY, DELAY_KEY)
    # A quarter of each range; the gripper is not bounded.
    np.testing.assert_allclose(described["max_step"], [0.1] * 3 + [0.25] * 3 + [0], rtol=1e-5)
    # A head that draws no samples cannot follow; its client blends.
    assert policy("mlp").metadata["rtc"]["guidance"] is None
    assert "rtc" not in policy("flow", mode="chunk").metadata


def test_wrong_times_are_refused_by_name():
    guided = policy("flow")
    guided.check(observation(executed=2, delay=1))
    with pytest.raises(ObservationError, match=r"rtc/executed.*got -1.*rtc/delay.*got 0\.5"):
        guided.check(observation(executed=-1, delay=0.5))
    with pytest.raises(ObservationError, match="rtc/executed: missing beside rtc/delay"):
        guided.check(observation(delay=1))


def test_relative_actions_are_counted_from_the_state_of_now():
    scaling = Scaling("openpi_quantile", (-1.0, -2.0, 0.0), (1.0, 2.0, 1.0))
    units = PolicyUnits(scaling, scaling, 3, (True, True, False))
    before, array = np.array([0.1, 0.2, 0.3]), np.array([0.4, -0.1, 0.5])
    chunk = np.random.default_rng(0).normal(size=(4, 5))  # two numbers of padding
    moved = units.reanchor(chunk, before, array)
    # The same targets in robot units, asked for from another state.
    np.testing.assert_allclose(units.restore(moved, array), units.restore(chunk, before), atol=1e-9)
    np.testing.assert_array_equal(moved[:, 3:], chunk[:, 3:])
    assert np.abs(moved[:, :2] - chunk[:, :2]).min() > 0.01


def test_rtc_has_no_horizon_and_names_its_forms():
    with pytest.raises(ValueError, match="horizon 3 has no meaning with 'rtc'"):
        Execution("rtc", horizon=3)
    with pytest.raises(ValueError, match=r"guidance 'exact' is none of \['jacobian', 'direct'\]"):
        Execution("rtc", guidance="exact")
    assert SPEC.dim == 7
