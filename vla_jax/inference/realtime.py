"""Chunks that overlap in time: what of the last one binds the next.

A client that asks for the next chunk while it still executes the last one says, with each request,
how many actions of the last chunk it has executed when the observation is made, and how many more
it will have executed when the answer arrives. What is in between must not be contradicted.

Legend: f chunk · a action dimension · p robot state
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from vla_jax.data.units.gripper import GripperState
from vla_jax.data.units.normalize import ActionSpec
from vla_jax.data.units.policy_units import PolicyUnits
from vla_jax.inference.protocol import STATE_KEY

SCHEDULES = ("linear", "exp", "ones", "zeros")
# Keys of a request, both control steps: executed since the last request's observation, and
# expected until this one's answer.
EXECUTED_KEY = "rtc/executed"
DELAY_KEY = "rtc/delay"
# Of an action's range in robot units: where an answer arrives at another time than was said, a
# client moves by no more a step from the last chunk to the next.
MAX_STEP = 0.25


def prefix_weights(
    start: int, end: int, chunk: int, schedule: str = "exp"
) -> Float[np.ndarray, "f"]:
    """How strongly each action of a new chunk is held to the last chunk's.

    Args:
        start: actions that will have been executed when the new chunk arrives: weight 1.
        end: the first action that the last chunk says nothing of, or is not to bind: weight 0.
        chunk: f
        schedule: between the two: linear, exp (falls faster than linear), ones (all 1), zeros (all
            0).

    Raises:
        ValueError: the schedule is none of `SCHEDULES`.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule {schedule!r} is none of {list(SCHEDULES)}")
    # An end beyond the chunk squeezes the ramp into it, as LeRobot does; kinetix never has one.
    end = min(end, chunk)
    # More delay than there is of the last chunk: all that there is binds.
    start = min(start, end)
    number = np.arange(chunk)
    weights = {
        "ones": np.ones(chunk),
        "zeros": (number < start).astype(float),
    }.get(schedule)
    if weights is None:
        # Falls in equal steps: 1 before `start`, and would be 0 at `end`.
        weights = np.clip(1 - (number - start + 1) / (end - start + 1), 0.0, 1.0)
        if schedule == "exp":
            weights = weights * np.expm1(weights) / (math.e - 1)
    return np.where(number < end, weights, 0.0).astype(np.float32)


@dataclass(frozen=True)
class Last:
    """The chunk before.

    Attributes:
        values: as the model gave it.
        state: of the robot when it was asked for, as the robot gave it; empty of one without.
    """

    values: Float[np.ndarray, "f a"]
    state: Float[np.ndarray, "p"]


@dataclass(frozen=True)
class RealTime:
    """How a new chunk is held to the last.

    Attributes:
        jacobian: the form, see `vla_jax.models.heads.guidance`.
        limit: the strongest correction.
        schedule: how its weight falls towards the end of the overlap.
        overlap: actions of the last chunk that bind, counted from the observation; 0 = all that
            are left of it.
    """

    jacobian: bool
    limit: float
    schedule: str
    overlap: int = 0

    def weights(self, chunk: int, executed: int, delay: int) -> Float[np.ndarray, "f"]:
        """Of each action of the new chunk, how strongly it is held to the last one's.

        Args:
            chunk: f
            executed: actions of the last chunk before the observation.
            delay: actions of it until the answer.
        """
        remaining = max(chunk - executed, 0)
        end = min(self.overlap, remaining) if self.overlap else remaining
        return prefix_weights(delay, end, chunk, self.schedule)

    def held(
        self,
        last: Last | None,
        obs: Mapping[str, Any],
        free: Float[np.ndarray, "f a"],
        units: PolicyUnits | None,
    ) -> tuple[Float[np.ndarray, "f a"], Float[np.ndarray, "f"]]:
        """What is still executed of the last chunk, and the weights of the next one's actions.

        Args:
            last: None in an episode's first request.
            obs: the request, with its timing; without one nothing binds.
            free: a chunk of zeros.
            units: of the policy, if it has such: relative actions count from the state of now.
        """
        steps = timing(obs, len(free))
        if last is None or steps is None:
            return free, np.zeros(len(free), np.float32)
        values, (executed, delay) = last.values, steps
        if units is not None and units.relative:
            values = units.reanchor(values, last.state, np.asarray(obs[STATE_KEY], np.float64))
        remaining = values[executed:]
        # Zeros stand behind the last chunk's end; no weight reaches them.
        aligned = np.pad(remaining, ((0, len(free) - len(remaining)), (0, 0)))
        return aligned.astype(np.float32), self.weights(len(free), executed, delay)


# Each project's own values: both the paper's code and LeRobot's were tuned with theirs.
FORMS = {
    "jacobian": RealTime(jacobian=True, limit=5.0, schedule="exp"),
    "direct": RealTime(jacobian=False, limit=10.0, schedule="linear", overlap=10),
}


def timing(obs: Mapping[str, Any], chunk: int) -> tuple[int, int] | None:
    """Executed actions and delay of a request; None of a client that says nothing of them."""
    if EXECUTED_KEY not in obs:
        return None
    return min(int(obs[EXECUTED_KEY]), chunk), int(obs.get(DELAY_KEY, 0))


def timing_problems(obs: Mapping[str, Any]) -> list[str]:
    """What is wrong with a request's timing, one line each."""
    problems = []
    for key in (EXECUTED_KEY, DELAY_KEY):
        value = obs.get(key, 0)
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 0:
            problems.append(f"{key}: expected control steps, a whole number from 0, got {value!r}")
    if DELAY_KEY in obs and EXECUTED_KEY not in obs:
        problems.append(f"{EXECUTED_KEY}: missing beside {DELAY_KEY}")
    return problems


def describe(guidance: str | None, spec: ActionSpec, units: PolicyUnits | None) -> dict[str, Any]:
    """What the metadata says of it.

    Args:
        guidance: the form; None where chunks do not follow the last, so that a client blends them.
        spec: of the robot's actions.
        units: in place of the spec, see `Policy`.
    """
    dim = spec.dim
    ends = np.stack([-np.ones(dim, np.float32), np.ones(dim, np.float32)])
    if units is not None:
        ends = units.restore(ends, np.zeros(len(units.state.first)))
    else:
        ends, _ = spec.to_env(ends, GripperState())
    steps = MAX_STEP * np.abs(ends[1] - ends[0])
    # A gripper is told to open or to close: half of either is no command.
    if spec.gripper is not None:
        steps[-1] = 0.0
    return {
        "guidance": guidance,
        "executed": EXECUTED_KEY,
        "delay": DELAY_KEY,
        # Robot units, of every number of an action; 0 = without a bound.
        "max_step": [float(x) for x in steps],
    }
