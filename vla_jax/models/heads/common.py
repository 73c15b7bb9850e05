"""Pieces all heads share.

A head is a Linen module made as `Module(head, structure, action_dim, dtype)`, with

    loss(features, valid, actions, key, gripper_weight) -> (float32 scalar, its parts)
    predict(features, valid, key, last=False) -> Prediction

One part is "rows" [b], the mean over each window; the others are scalars. Features are
[b, w, m, d] (m latents a step), `valid` [b, w] is False on steps before the episode's start, and
`key` feeds the heads that draw noise. Each step's output depends on that step and the valid ones
before it, so keeping the features of the last w steps is all that streaming takes; `last` asks for
the newest step alone.

Its file has `weight_map(head, width)`: RoboVLMs' names of a head on features of that width, [] of a
head it lacks; and, if need be, `IGNORE`: regexes of names that carry nothing.

Legend: b batch · w window · c tokens of a step · m latents · d features · f chunk
a action dimension
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from vla_jax.models import weights as w
from vla_jax.models.losses import action_loss
from vla_jax.models.towers.layers import Dense
from vla_jax.types import Actions, Prediction

# Widths of both output trunks, fixed in the original whatever the head's own width.
TRUNK = (1024, 512, 256)


def pool_tokens(
    x: Float[Array, "b w c d"], read: Bool[Array, "b w c"], latents: int
) -> Float[Array, "b w m d"]:
    """Max over `latents` spans of a step's tokens; torch's adaptive max pooling without a mask.

    Of the n tokens that `read` selects, in order, span i holds floor(i n / latents) up to
    ceil((i + 1) n / latents). A step without tokens gives zeros.
    """
    rank = jnp.cumsum(read, axis=-1) - 1
    n = read.sum(-1, keepdims=True)
    spans = []
    for i in range(latents):
        inside = read & (rank >= i * n // latents) & (rank < -(-(i + 1) * n // latents))
        masked = jnp.where(inside[..., None], x, -jnp.inf)
        spans.append(jnp.where(inside.any(-1, keepdims=True), masked.max(axis=2), 0.0))
    return jnp.stack(spans, axis=2).astype(x.dtype)


def flatten(x: Float[Array, "b w m d"]) -> Float[Array, "b w e"]:
    """The latents of a step as one vector, latent-major."""
    return x.reshape(*x.shape[:2], -1)


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


def regression_loss(
    head: nn.Module,
    features: Float[Array, "b w m d"],
    valid: Bool[Array, "b w"],
    actions: Actions,
    key: PRNGKeyArray | None,
    gripper_weight: float,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """`loss` of the heads that map features straight to a `Prediction`."""
    del key
    return action_loss(head(features, valid), actions, gripper_weight)


def regression_predict(
    head: nn.Module,
    features: Float[Array, "b w m d"],
    valid: Bool[Array, "b w"],
    key: PRNGKeyArray | None = None,
    last: bool = False,
) -> Prediction:
    """`predict` of the same heads."""
    del key
    prediction = head(features, valid)
    return newest(prediction) if last else prediction


def newest(tree: Any) -> Any:
    """The last step of every [b, w, ...] array."""
    return jax.tree.map(lambda x: x[:, -1:], tree)


def trunk_weights() -> list[w.Weight]:
    """RoboVLMs' names of both trunks; targets relative to the head."""
    rows = []
    for theirs, ours in (("actions", "arm"), ("gripper", "gripper")):
        for i in range(len(TRUNK) + 1):
            rows += w.pair(f"{theirs}.mlp.{2 * i}", f"output/{ours}/fc{i}")
    return rows
