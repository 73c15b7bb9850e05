"""GPT-2 policy head (RoboVLMs' GPTDecoder)."""

from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vla_jax.config import HeadConfig, StructureConfig
from vla_jax.config.option import option
from vla_jax.models import weights as w
from vla_jax.models.heads.common import (
    ActionOutput,
    WindowHead,
    flatten,
    newest,
    trunk_weights,
    width_refusals,
)
from vla_jax.models.towers.block import stack
from vla_jax.models.towers.decoder import causal_mask
from vla_jax.models.towers.layers import Dense, Dropout, LayerNorm
from vla_jax.types import Prediction

DROPOUT = 0.1  # GPT-2's own, on embeddings, attention and residuals


@dataclass(frozen=True)
class GPT2Options(HeadConfig):
    """Options of the head `gpt2`."""

    hidden: int = option(1024, "Width of the transformer, for each latent.", positive=True)
    layers: int = option(4, "Layers (RoboVLMs: 8).", positive=True)
    heads: int = option(8, "Attention heads.", positive=True)


class GPT2Head(WindowHead):
    """A causal transformer over the steps of the window, with a learned position for each.

    Positions count the valid steps of the window, so in a full history the oldest is always 0.

    Legend: b batch · w window · m latents · d features
    """

    head: GPT2Options

    OPTIONS = GPT2Options
    # Causal masks that the original stores as buffers.
    ignore = (r"gpt\.h\.\d+\.attn\.(masked_)?bias$",)

    @nn.compact
    def __call__(
        self, features: Float[Array, "b w m d"], valid: Bool[Array, "b w"], last: bool = False
    ) -> Prediction:
        """Features of a window -> a chunk at each of its steps, or with `last` at the newest."""
        h, width = self.head, self.head.hidden * self.sizes.latents
        x = flatten(features)
        # Where the widths agree RoboVLMs has no projection, and its checkpoints must fit.
        if features.shape[-1] != h.hidden:
            x = Dense((width,), dtype=self.dtype, name="project")(x)
        init = nn.initializers.normal(0.02)
        table = self.param("positions", init, (self.sizes.steps, width)).astype(self.dtype)
        # Steps before the episode would index row -1, which is the newest step's.
        place = jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0)
        x = Dropout(DROPOUT)(x.astype(self.dtype) + table[place])
        layers = stack(
            h.layers,
            # The layers are few and small, so nothing is recomputed.
            "none",
            "layers",
            self.dtype,
            heads=h.heads,
            hidden=4 * width,
            activation="gelu_new",
            dropout=DROPOUT,
            attention_dropout=DROPOUT,
        )
        x, _ = layers(x, causal_mask(valid))
        if last:
            x = newest(x)
        x = LayerNorm(dtype=self.dtype, name="norm")(x)
        return ActionOutput(self.sizes, self.dtype, name="output")(x)

    @classmethod
    def refusals(cls, head: GPT2Options, structure: StructureConfig) -> list[str]:
        """Attention splits the width evenly among its heads."""
        return super().refusals(head, structure) + width_refusals(head, structure)

    @classmethod
    def weight_map(cls, head: GPT2Options, width: int) -> list[w.Weight]:
        """RoboVLMs' names; targets relative to `head/`."""
        layer = "gpt.h.{}."
        rows = [] if width == head.hidden else w.pair("fc", "project")
        return [
            *rows,
            w.Weight("gpt.wpe.weight", "positions"),
            *w.norm(layer + "ln_1", "layers/norm1"),
            *w.pair(layer + "attn.c_attn", "layers/attn/{q,k,v}", "conv1d"),
            *w.pair(layer + "attn.c_proj", "layers/attn/o", "conv1d_from_heads"),
            *w.norm(layer + "ln_2", "layers/norm2"),
            *w.pair(layer + "mlp.c_fc", "layers/mlp/fc1", "conv1d"),
            *w.pair(layer + "mlp.c_proj", "layers/mlp/fc2", "conv1d"),
            *w.norm("gpt.ln_f", "norm"),
            *trunk_weights(),
        ]
