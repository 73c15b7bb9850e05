"""Every action from its own hidden states, by a residual perceptron (OpenVLA-OFT's L1 head).

Source: openvla-oft 213c5ff `action_heads.py`.

Legend: b batch · w window · m hidden states of a step, one a number of the chunk · d features
f chunk · a action dimension
"""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from vla_jax.config import HeadConfig
from vla_jax.config.option import option
from vla_jax.models.heads.common import Head
from vla_jax.models.heads.denoiser import as_prediction, as_values
from vla_jax.models.losses import masked_mean, row_means
from vla_jax.models.towers.layers import Dense
from vla_jax.models.towers.norms import LayerNorm
from vla_jax.types import Actions, Guide, Prediction


@dataclass(frozen=True)
class L1Options(HeadConfig):
    """Options of the head `l1`."""

    hidden: int = option(1024, "Width of the blocks.", positive=True)
    layers: int = option(4, "Residual blocks.", positive=True)


class L1Head(Head):
    """`head.layers` residual blocks of width `head.hidden`, the same for every action."""

    head: L1Options

    OPTIONS = L1Options
    reads = "places"
    reads_reason = (
        "it reads a hidden state for each number of the chunk, which only the structure parallel "
        "has"
    )
    numbers = True

    @nn.compact
    def values(self, features: Float[Array, "b w m d"]) -> Float[Array, "b w f a"]:
        """Hidden states -> float32 actions."""
        # The places count action by action, so the states of one action lie side by side and become
        # one vector.
        x = features.reshape(*features.shape[:2], self.sizes.chunk, -1)
        # Torch's own epsilon, which the original leaves as it is.
        x = LayerNorm(1e-5, self.dtype, name="norm_in")(x)
        x = jax.nn.relu(Dense((self.head.hidden,), dtype=self.dtype, name="fc_in")(x))
        for i in range(self.head.layers):
            y = LayerNorm(1e-5, self.dtype, name=f"norm{i}")(x)
            x = x + jax.nn.relu(Dense((self.head.hidden,), dtype=self.dtype, name=f"fc{i}")(y))
        x = LayerNorm(1e-5, self.dtype, name="norm_out")(x)
        # These outputs are the actions themselves, which bfloat16 would round to 8 bits.
        return Dense((self.sizes.action_dim,), dtype=jnp.float32, name="fc_out")(x)

    def loss(
        self,
        features: Float[Array, "b w m d"],
        valid: Bool[Array, "b w"],
        targets: Actions,
        key: PRNGKeyArray | None,
        gripper_weight: float,
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Mean absolute error; the gripper weighs as any other number."""
        # The one step of the structure always exists; what lies beyond an episode's end is left out
        # by the mask of the targets.
        del valid, key, gripper_weight
        each = jnp.abs(self.values(features) - as_values(targets, self._is_binary)).mean(-1)
        total = masked_mean(each, targets.mask)
        return total, {"rows": row_means(each, targets.mask), "loss_l1": total}

    def predict(
        self,
        features: Float[Array, "b w m d"],
        valid: Bool[Array, "b w"],
        key: PRNGKeyArray | None = None,
        last: bool = False,
        guide: Guide | None = None,
    ) -> Prediction:
        """The chunk of the one step there is.

        With a binary gripper as in all other heads: it is open above 0, the arm ends at -1 and 1.
        """
        del valid, key, last, guide
        values = self.values(features)
        if self.head.gripper == "binary":
            return as_prediction(values, self.sizes.gripper)
        if not self.sizes.gripper:
            return Prediction(arm=values, gripper=None)
        return Prediction(arm=values[..., :-1], gripper=values[..., -1])

    @property
    def _is_binary(self) -> bool:
        return self.sizes.gripper and self.head.gripper == "binary"
