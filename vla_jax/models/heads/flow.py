"""Flow matching over the chunk.

Sources: straight paths from noise to actions (conditional flow matching, Lipman et al. 2023), with
the training times and the Euler sampling of pi0 (Black et al. 2024).

Legend: b batch · w window · u steps to predict · m latents · d features · f chunk
a action dimension
"""

from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from vla_jax.config import StructureConfig
from vla_jax.models.heads.common import Head, width_refusals
from vla_jax.models.heads.denoiser import Denoiser, DenoiserOptions, as_values
from vla_jax.models.heads.guidance import guided_velocity
from vla_jax.types import Actions, Guide, Prediction

_LATEST = 0.999  # training times stay below; at 1 nothing is left to predict


@dataclass(frozen=True)
class FlowOptions(DenoiserOptions):
    """Options of the head `flow`."""


class FlowHead(Head):
    """Predicts the velocity from noise (time 0) to the chunk (time 1); actions are samples."""

    head: FlowOptions

    OPTIONS = FlowOptions
    guidable = True

    @classmethod
    def refusals(cls, head: FlowOptions, structure: StructureConfig) -> list[str]:
        """Attention splits the width evenly among its heads."""
        return super().refusals(head, structure) + width_refusals(head, structure)

    def setup(self):
        self.net = Denoiser(self.head, self.sizes, self.dtype)

    def loss(
        self,
        features: Float[Array, "b w m d"],
        valid: Bool[Array, "b w"],
        actions: Actions,
        key: PRNGKeyArray,
        gripper_weight: float,
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Mean squared error of the velocity at one random time a step; the gripper as the arm."""
        del gripper_weight
        clean = as_values(actions, self.sizes.gripper)
        noise_key, time_key = jax.random.split(key)
        noise = jax.random.normal(noise_key, clean.shape)
        # 1 - time / latest is Beta(1.5, 1): more often early, where the noise hides the actions.
        time = _LATEST * (1 - jax.random.uniform(time_key, clean.shape[:2]) ** (1 / 1.5))
        fraction = time[..., None, None]
        noisy = (1 - fraction) * noise + fraction * clean
        total, rows = self.net.loss(features, valid, noisy, time, clean - noise, actions.mask)
        return total, {"rows": rows, "loss_velocity": total}

    def predict(
        self,
        features: Float[Array, "b w m d"],
        valid: Bool[Array, "b w"],
        key: PRNGKeyArray,
        last: bool = False,
        guide: Guide | None = None,
    ) -> Prediction:
        """One sample a step; see `Denoiser.sample`."""
        count = self.head.sampling_steps

        def move(i: Array, x: Float[Array, "r f a"], velocity: Any) -> Float[Array, "r f a"]:
            # Euler's step from time i / count, where 1 is the clean chunk.
            time = i / count
            return x + guided_velocity(lambda y: velocity(y, time), x, time, guide) / count

        return self.net.sample(features, valid, key, last, move)
