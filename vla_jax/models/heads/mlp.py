"""MLP head, the same at every step (RoboVLMs' FCDecoder)."""

from dataclasses import dataclass

import flax.linen as nn
import jax
from jaxtyping import Array, Bool, Float

from vla_jax.config import HeadConfig
from vla_jax.config.option import option
from vla_jax.models import weights as w
from vla_jax.models.heads.common import ActionOutput, Head, flatten, trunk_weights
from vla_jax.models.towers.layers import Dense
from vla_jax.types import Prediction


@dataclass(frozen=True)
class MLPOptions(HeadConfig):
    """Options of the head `mlp`."""

    hidden: int = option(1024, "Width behind the second layer, for each latent.", positive=True)


class MLPHead(Head):
    """Two linear layers with ReLU between, then the trunks; no memory.

    Legend: b batch · w window · m latents · d features
    """

    head: MLPOptions

    OPTIONS = MLPOptions

    @nn.compact
    def __call__(self, features: Float[Array, "b w m d"], valid: Bool[Array, "b w"]) -> Prediction:
        """Features of every step -> the chunk predicted there."""
        del valid
        # RoboVLMs draws all linear layers of this head so, in place of torch's default.
        x, init = flatten(features), nn.initializers.xavier_uniform()
        # RoboVLMs halves the width between the two layers.
        hidden, out = x.shape[-1] // 2, self.head.hidden * self.sizes.latents
        x = jax.nn.relu(Dense((hidden,), dtype=self.dtype, init=init, name="fc1")(x))
        x = Dense((out,), dtype=self.dtype, init=init, name="fc2")(x)
        return ActionOutput(self.sizes, self.dtype, name="output")(x)

    @classmethod
    def weight_map(cls, head: HeadConfig, width: int) -> list[w.Weight]:
        """RoboVLMs' names; targets relative to `head/`."""
        del head, width
        return [*w.pair("mlp.0", "fc1"), *w.pair("mlp.2", "fc2"), *trunk_weights()]
