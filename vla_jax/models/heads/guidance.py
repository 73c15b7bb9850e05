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

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vla_jax.types import Guide

# Denoised values, clean estimate = function(values).
Estimate = Callable[[Array], Array]


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

    def twice(x: Array) -> tuple[Array, Array]:
        estimate = clean(x)
        return estimate, estimate

    return _corrected(twice, noisy, 1.0, guide)


def _corrected(
    estimate: Callable[[Array], tuple[Array, Array]],
    noisy: Float[Array, "b f w"],
    strength: Array | float,
    guide: Guide,
) -> Float[Array, "b f w"]:
    # `estimate` gives the clean chunk, and what is to be corrected.
    padding = noisy.shape[-1] - guide.previous.shape[-1]
    # Experts denoise more numbers than an action has. Training pads actions with zeros, so the
    # padding is guided to zeros as well.
    previous = jnp.pad(guide.previous, ((0, 0), (0, 0), (0, padding)))
    if guide.jacobian:
        # What is to be corrected comes out of the same forward pass, which a second call would
        # repeat.
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
    # At time 0 the ratio has no bound, so the limit decides; at time 1 the floors keep 0 times
    # infinity out.
    return jnp.minimum(ratio, limit)
