"""Flow matching by an expert beside the VLM's layers: noisy actions in, their velocity out.

Here time 1 is noise and time 0 the action, as in the code of pi0 and SmolVLA (their papers have it
the other way round): x = t noise + (1 - t) action, velocity = noise - action, and sampling goes
from 1 down to 0. Actions and the state are padded with zeros to the model's width.

Sources: openpi 15a9616 `models/pi0.py`, lerobot 7427f31 `modeling_smolvla.py`.

Legend: b batch · f chunk · a action dimension · w padded width · s state numbers · d the expert's
width
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from vla_jax.config import ExpertConfig, HeadConfig
from vla_jax.config.option import option
from vla_jax.models import sharding
from vla_jax.models.heads.common import Head
from vla_jax.models.heads.denoiser import as_prediction, as_values
from vla_jax.models.heads.guidance import guided_velocity
from vla_jax.models.losses import masked_mean, row_means
from vla_jax.models.towers.layers import Dense
from vla_jax.types import Actions, Guide, Prediction

# Shortest and longest period of the time's sines.
_PERIODS = 4e-3, 4.0
# Training times: never quite 0, where there is nothing left to predict.
_EARLIEST = 0.001


def time_embedding(time: Float[Array, "b"], width: int) -> Float[Array, "b d"]:
    """Sines, then cosines of a time in [0, 1]."""
    fraction = np.linspace(0.0, 1.0, width // 2)
    # Periods grow geometrically from the shortest to the longest.
    period = _PERIODS[0] * (_PERIODS[1] / _PERIODS[0]) ** fraction
    angle = 2 * math.pi * _turns(time.astype(jnp.float32), 1 / period)
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def _turns(time: Float[Array, "b"], frequency: np.ndarray) -> Float[Array, "b n"]:
    """The products without their whole turns, as if they were made in float64 (as LeRobot's are).

    In float32 a product of 250 turns is off by 1e-4 of an angle. So each factor is cut into 12
    leading bits and the rest: the product of leading bits is exact, and the others are small.
    """
    leading = (frequency.astype(np.float32).view(np.uint32) & 0xFFFFF000).view(np.float32)
    trailing = (frequency - leading).astype(np.float32)
    # What a compiler does not undo, unlike a conversion there and back.
    start = jax.lax.reduce_precision(time, exponent_bits=8, mantissa_bits=11)[:, None]
    product = start * leading
    small = start * trailing + (time[:, None] - start) * (leading + trailing)
    return product - jnp.floor(product) + small


def widen(x: Float[Array, "*b a"], width: int) -> Float[Array, "*b w"]:
    """Zeros behind the last axis, up to a width."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])])


@dataclass(frozen=True)
class ExpertFlowOptions(HeadConfig):
    """Options of the head `expert_flow`; those of the expert are `model.expert`."""

    sampling_steps: int = option(10, "Euler steps in which a chunk is sampled.", positive=True)


class ExpertFlow(Head):
    """What stands before and behind the expert: projections, time, loss and Euler steps.

    Attributes:
        expert: the expert's settings.
    """

    head: ExpertFlowOptions
    expert: ExpertConfig = ExpertConfig()

    OPTIONS = ExpertFlowOptions
    guidable = True
    numbers = True
    reads = "expert"
    reads_reason = "it needs an expert beside the VLM, which only the structure `expert` has"

    def setup(self):
        width = self.expert.width

        def dense(size: int) -> Dense:
            return Dense((size,), dtype=self.dtype)

        self.enter, self.leave = dense(width), dense(self.expert.padded)
        self.time1, self.time2 = dense(width), dense(width)
        if self.expert.state == "expert":
            self.state = dense(width)

    def tokens(
        self, noisy: Float[Array, "b f w"], time: Float[Array, "b"]
    ) -> Float[Array, "b f d"]:
        """The expert's tokens of a noisy chunk."""
        x = self.enter(noisy)
        if self.expert.adaptive:
            # Adaptive norms (pi0.5) take the time in every layer, so the tokens do not carry it.
            return x
        # Without adaptive norms (pi0, SmolVLA) the time enters once, beside every action.
        level = time_embedding(time, self.expert.width).astype(self.dtype)
        both = jnp.concatenate([x, jnp.broadcast_to(level[:, None], x.shape)], axis=-1)
        return self.time2(jax.nn.silu(self.time1(both)))

    def level(self, time: Float[Array, "b"]) -> Float[Array, "b d"] | None:
        """The condition of adaptive norms."""
        if not self.expert.adaptive:
            return None
        level = time_embedding(time, self.expert.width).astype(self.dtype)
        return jax.nn.silu(self.time2(jax.nn.silu(self.time1(level))))

    def state_token(self, state: Float[Array, "b s"]) -> Float[Array, "b 1 d"]:
        """The robot's state as the expert's first token."""
        return self.state(widen(state, self.expert.padded))[:, None]

    def velocity(self, hidden: Float[Array, "b f d"]) -> Float[Array, "b f w"]:
        """The expert's last hidden states -> float32 velocities."""
        return self.leave(hidden).astype(jnp.float32)

    def values(self, actions: Actions) -> Float[Array, "b f a"]:
        """The numbers that are denoised, of a window of one step."""
        # A gripper that is a number already has the arm's units.
        binary = self.head.gripper == "binary"
        return as_values(actions, binary and self.sizes.gripper)[:, 0]

    def draw(
        self, key: PRNGKeyArray, batch: int
    ) -> tuple[Float[Array, "b f w"], Float[Array, "b"]]:
        """Noise and times of a training step; late times, where the noise is, are more frequent."""
        noise_key, time_key = jax.random.split(key)
        noise = jax.random.normal(noise_key, (batch, self.sizes.chunk, self.expert.padded))
        # Beta(1.5, 1), by the inverse of its distribution.
        beta = jax.random.uniform(time_key, (batch,)) ** (1 / 1.5)
        return noise, beta * (1 - _EARLIEST) + _EARLIEST

    def mix(
        self, values: Float[Array, "b f a"], noise: Float[Array, "b f w"], time: Float[Array, "b"]
    ) -> tuple[Float[Array, "b f w"], Float[Array, "b f w"]]:
        """The noisy chunk and the velocity that is to be predicted."""
        clean, fraction = widen(values, self.expert.padded), time[:, None, None]
        return fraction * noise + (1 - fraction) * clean, noise - clean

    def errors(
        self, estimate: Float[Array, "b f w"], wanted: Float[Array, "b f w"]
    ) -> Float[Array, "b f"]:
        """Mean squared error of every action."""
        error = jnp.square(estimate - wanted)
        return (
            # Of what pads an action openpi counts the error, LeRobot does not.
            error if self.expert.loss == "padded" else error[..., : self.sizes.action_dim]
        ).mean(-1)

    def flow_loss(
        self, error: Float[Array, "b f"], actions: Actions
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The mean over the supervised actions, and the parts that are logged."""
        mask = actions.mask[:, 0]
        total = masked_mean(error, mask)
        return total, {"rows": row_means(error, mask), "loss_velocity": total}

    @property
    def times(self) -> Float[Array, "s"]:
        """Of the Euler steps: from 1 (noise) down to 1 / s; the last step lands on 0."""
        count = self.head.sampling_steps
        return 1.0 - jnp.arange(count) / count

    def integrate(
        self,
        start: Float[Array, "b f w"],
        velocity: Callable[[Array, Array], Any],
        guide: Guide | None = None,
    ) -> Float[Array, "b f w"]:
        """Euler steps from noise to a chunk.

        Args:
            start: noise.
            velocity: (chunk, number of the step, of `times`) -> velocity; a pure function.
            guide: what the chunk is to agree with.
        """
        count, times = self.head.sampling_steps, self.times

        def move(i: Array, x: Float[Array, "b f w"]) -> Float[Array, "b f w"]:
            def towards(y: Float[Array, "b f w"]) -> Float[Array, "b f w"]:
                # Guidance counts time from the noise, and velocities towards the action.
                return -velocity(y, i)

            return x + guided_velocity(towards, x, 1.0 - times[i], guide) / count

        # A loop would copy every layer's weights out of their stack in every step.
        return jax.lax.fori_loop(0, count, move, start, unroll=sharding.unroll(count))

    def prediction(self, values: Float[Array, "b f w"]) -> Prediction:
        """Chunks as the robot's part of them; a binary gripper is open above 0."""
        values = values[:, None, :, : self.sizes.action_dim]
        if self.head.gripper == "binary":
            return as_prediction(values, self.sizes.gripper)
        return Prediction(arm=values[..., :-1], gripper=values[..., -1])
