"""Flow matching over the chunk.

Sources: straight paths from noise to actions (conditional flow matching, Lipman et al. 2023), with
the training times and the Euler sampling of pi0 (Black et al. 2024).

Legend: b batch · w window · u steps to predict · m latents · d features · f chunk
a action dimension
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from vla_jax.config import HeadConfig, StructureConfig
from vla_jax.models import weights as w
from vla_jax.models.heads.denoiser import Denoiser, as_prediction, as_values
from vla_jax.models.losses import masked_mean, row_means
from vla_jax.types import Actions, Prediction

_LATEST = 0.999  # training times stay below; at 1 nothing is left to predict


class FlowHead(nn.Module):
    """Predicts the velocity from noise (time 0) to the chunk (time 1); actions are samples."""

    head: HeadConfig
    structure: StructureConfig
    action_dim: int
    dtype: Any = jnp.float32

    def setup(self):
        self.net = Denoiser(self.head, self.structure, self.action_dim, self.dtype)

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
        clean = as_values(actions)
        one, two = jax.random.split(key)
        noise = jax.random.normal(one, clean.shape)
        # 1 - time / latest is Beta(1.5, 1): more often early, where the noise hides the actions.
        time = _LATEST * (1 - jax.random.uniform(two, clean.shape[:2]) ** (1 / 1.5))
        share = time[..., None, None]
        noisy = (1 - share) * noise + share * clean
        context, seen = self.net.context(features, valid, last=False)
        found = self.net(context, seen, noisy.reshape(-1, *clean.shape[2:]), time.reshape(-1))
        error = jnp.square(found.reshape(clean.shape) - (clean - noise)).mean(-1)
        total = masked_mean(error, actions.mask)
        return total, {"rows": row_means(error, actions.mask), "loss_velocity": total}

    def predict(
        self,
        features: Float[Array, "b w m d"],
        valid: Bool[Array, "b w"],
        key: PRNGKeyArray,
        last: bool = False,
    ) -> Prediction:
        """One sample a step. All steps start from the same noise, so a stream equals a window."""
        context, seen = self.net.context(features, valid, last)
        b, steps = valid.shape[0], 1 if last else valid.shape[1]
        shape = (b, 1, self.structure.chunk, self.action_dim)
        start = jnp.repeat(jax.random.normal(key, shape), steps, axis=1)
        count = self.head.sampling_steps
        net, variables = self.net.unbind()

        def move(i: Array, x: Float[Array, "r f a"]) -> Float[Array, "r f a"]:
            time = jnp.broadcast_to(i / count, x.shape[:1])
            velocity: Any = net.apply(variables, context, seen, x, time)
            return x + velocity / count

        x = jax.lax.fori_loop(0, count, move, start.reshape(b * steps, *shape[2:]))
        return as_prediction(x.reshape(b, steps, *shape[2:]))


def weight_map(head: HeadConfig, width: int) -> list[w.Weight]:
    """RoboVLMs has no such head."""
    del head, width
    return []
