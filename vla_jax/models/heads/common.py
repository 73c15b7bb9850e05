"""Pieces all heads share.

Legend: b batch · w window · n latents · d features · f chunk · a action dimension
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vla_jax.models import weights as w
from vla_jax.models.layers import Dense
from vla_jax.types import Prediction

# Widths of both output trunks, fixed in the original whatever the head's own width.
TRUNK = (1024, 512, 256)


def pool_latents(
    x: Float[Array, "b w m d"], latents: int, down_sample: str
) -> Float[Array, "b w e"]:
    """Token features of a step -> one vector of latents * d features, token-major.

    Args:
        x: features of m tokens a step.
        latents: tokens kept.
        down_sample: none (m must equal `latents`) or pooling (torch's adaptive max pooling:
            window i spans tokens floor(i m / latents) to ceil((i + 1) m / latents)).
    """
    tokens = x.shape[2]
    if down_sample == "pooling":
        parts = [
            x[:, :, i * tokens // latents : -(-(i + 1) * tokens // latents)].max(axis=2)
            for i in range(latents)
        ]
        x = jnp.stack(parts, axis=2)
    return x.reshape(*x.shape[:2], latents * x.shape[3])


class Trunk(nn.Module):
    """Four linear layers with ReLU between; float32, as the outputs go into a loss."""

    out: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b out"]:
        """Features -> raw outputs."""
        xavier = nn.initializers.xavier_uniform()
        for i, size in enumerate(TRUNK):
            x = jax.nn.relu(Dense((size,), dtype=self.dtype, init=xavier, name=f"fc{i}")(x))
        return Dense((self.out,), dtype=jnp.float32, init=xavier, name=f"fc{len(TRUNK)}")(x)


class ActionOutput(nn.Module):
    """Arm trunk (tanh) and gripper trunk (logits)."""

    chunk: int
    action_dim: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b w d"]) -> Prediction:
        """Features of every step -> the chunk predicted there."""
        arm = Trunk(self.chunk * (self.action_dim - 1), self.dtype, name="arm")(x)
        gripper = Trunk(self.chunk, self.dtype, name="gripper")(x)
        arm = jnp.tanh(arm).reshape(*x.shape[:2], self.chunk, self.action_dim - 1)
        return Prediction(arm=arm, gripper=gripper)


def trunk_weights() -> list[w.Weight]:
    """RoboVLMs' names of both trunks; targets relative to the head."""
    rows = []
    for theirs, ours in (("actions", "arm"), ("gripper", "gripper")):
        for i in range(len(TRUNK) + 1):
            rows += w.pair(f"{theirs}.mlp.{2 * i}", f"output/{ours}/fc{i}")
    return rows
