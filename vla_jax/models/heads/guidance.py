"""Real-time chunking: a new chunk that agrees with what is still executed of the last one.

While a chunk is computed the robot goes on with the last one, so the first actions of the new chunk
are already decided when it arrives, and the ones behind them should not contradict it. Heads that
denoise are therefore pulled towards the last chunk at every denoising step (inpainting), strongly
where it is certain to be executed, less towards its end.

There are two forms of it, which give different actions:

* with the Jacobian (Black et al. 2025, "Real-Time Execution of Action Chunking Flow Policies"): the
  error of the estimated clean chunk goes back through the network, as guidance by pseudoinverse has
  it; it costs a backward pass a step;
* direct (LeRobot): the error itself is added, as if the network were the identity.

Sources: real-time-chunking-kinetix cc6c5f5 `model.py`, lerobot 7427f31 `modeling_rtc.py`.

Legend: b batch · f chunk · w denoised width
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vla_jax.types import Guide

SCHEDULES = ("linear", "exp", "ones", "zeros")
# Denoised values, clean estimate = function(values).
Estimate = Callable[[Array], Array]


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
    place = np.arange(chunk)
    weights = {
        "ones": np.ones(chunk),
        "zeros": (place < start).astype(float),
    }.get(schedule)
    if weights is None:
        # Falls in equal steps: 1 before `start`, and would be 0 at `end`.
        weights = np.clip(1 - (place - start + 1) / (end - start + 1), 0.0, 1.0)
        if schedule == "exp":
            weights = weights * np.expm1(weights) / (math.e - 1)
    return np.where(place < end, weights, 0.0).astype(np.float32)


def guided_velocity(
    velocity: Estimate, noisy: Float[Array, "b f w"], time: Array, guide: Guide | None
) -> Float[Array, "b f w"]:
    """The velocity towards the clean chunk, turned towards the last one.

    Args:
        velocity: of the network at this time: the clean chunk minus the noise.
        noisy: the chunk now.
        time: 0 is noise, 1 the clean chunk; a scalar.
        guide: None leaves the velocity as it is.
    """
    if guide is None:
        return velocity(noisy)

    def clean(x: Array) -> tuple[Array, Array]:
        towards = velocity(x)
        return x + (1 - time) * towards, towards

    return _corrected(clean, noisy, _strength(time, guide.limit), guide)


def guided_clean(
    clean: Estimate, noisy: Float[Array, "b f w"], guide: Guide | None
) -> Float[Array, "b f w"]:
    """The estimate of the clean chunk at a level of noise, moved towards the last one.

    For heads that denoise without a velocity. Unlike a velocity, which acts for a fraction of the
    time, an estimate is moved by the weighted error itself, so 1 replaces it.
    """
    if guide is None:
        return clean(noisy)
    return _corrected(lambda x: (clean(x),) * 2, noisy, 1.0, guide)


def _corrected(
    estimate: Callable[[Array], tuple[Array, Array]],
    noisy: Float[Array, "b f w"],
    strength: Array | float,
    guide: Guide,
) -> Float[Array, "b f w"]:
    # `estimate` gives the clean chunk, and what is to be corrected.
    padding = noisy.shape[-1] - guide.previous.shape[-1]
    previous = jnp.pad(guide.previous, ((0, 0), (0, 0), (0, padding)))
    if guide.jacobian:
        clean, back, value = jax.vjp(estimate, noisy, has_aux=True)
    else:
        (clean, value), back = estimate(noisy), None
    error = (previous - clean) * guide.weights[..., None]
    if back is not None:
        (error,) = back(error)
    return value + strength * error


def _strength(time: Array, limit: float) -> Array:
    """How much of the correction counts: much while there is noise, at most `limit`."""
    left = 1 - time
    # The odds of what is left, times the inverse variance of the clean chunk given the noisy one,
    # for unit noise and unit actions.
    ratio = left / jnp.maximum(time, 1e-12) * (time**2 + left**2) / jnp.maximum(left**2, 1e-12)
    return jnp.minimum(ratio, limit)
