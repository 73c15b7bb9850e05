"""The network that diffusion and flow matching share: a transformer over the chunk.

Source: DiT with adaLN-Zero (Peebles and Xie 2023). The noise level enters through the norms; what
the VLM says of this step and the ones before it stands as tokens in front of the chunk's, as in
CogACT (Li et al. 2024), one learned position an age, so that a window and a stream of steps give
the same.

Legend: b batch · w window · u steps to predict (w, or 1: the last) · m latents · d features
r sequences = b u · c context tokens · n sequence · f chunk · a action dimension · h width
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from vla_jax.config import HeadConfig
from vla_jax.config.option import option
from vla_jax.models import sharding
from vla_jax.models.heads.common import HeadSizes
from vla_jax.models.losses import masked_mean, row_means
from vla_jax.models.towers.layers import MLP, Attention, Dense
from vla_jax.types import Actions, Prediction

# As in DiT: 256 numbers, half of them cosines.
_FREQUENCIES = 128


@dataclass(frozen=True)
class DenoiserOptions(HeadConfig):
    """Options of heads that denoise a chunk with `Denoiser`."""

    hidden: int = option(1024, "Width of the transformer.", positive=True)
    layers: int = option(4, "Layers of the transformer.", positive=True)
    heads: int = option(8, "Attention heads.", positive=True)
    sampling_steps: int = option(10, "Steps in which an action is sampled.", positive=True)


def time_embedding(time: Float[Array, "r"]) -> Float[Array, "r k"]:
    """Cosines and sines of a time in [0, 1]; periods as DiT's of 0 ... 1000."""
    frequency = jnp.exp(-math.log(10000.0) * jnp.arange(_FREQUENCIES) / _FREQUENCIES)
    angle = 1000.0 * time[:, None] * frequency
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def _normalize(x: Float[Array, "r n h"]) -> Float[Array, "r n h"]:
    # The norm has no parameters of its own: scale and shift come from the noise level.
    wide = x.astype(jnp.float32)
    wide = wide - wide.mean(-1, keepdims=True)
    return (wide * jax.lax.rsqrt((wide * wide).mean(-1, keepdims=True) + 1e-6)).astype(x.dtype)


class Layer(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the noise level; starts as identity."""

    heads: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "r n h"], level: Float[Array, "r h"], mask: Bool[Array, "r n n"]
    ) -> tuple[Float[Array, "r n h"], None]:
        """One layer, in the (carry, output) form that `nn.scan` wants."""
        x, width = sharding.rows(x), x.shape[-1]
        zeros = nn.initializers.zeros
        # Zero weights make both gates 0, so that a fresh layer is the identity (adaLN-Zero).
        modulation = Dense((6 * width,), dtype=self.dtype, init=zeros, name="modulation")(level)
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(modulation[:, None], 6, axis=-1)
        y = _normalize(x) * (1 + scale1) + shift1
        x = x + gate1 * Attention(self.heads, dtype=self.dtype, name="attn")(y, y, mask)
        y = _normalize(x) * (1 + scale2) + shift2
        mlp = MLP(4 * width, "gelu_new", dtype=self.dtype, name="mlp")
        return sharding.rows(x + gate2 * mlp(y)), None


class Denoiser(nn.Module):
    """Noisy chunk, its noise level and the features -> a number for every entry of the chunk."""

    head: DenoiserOptions
    sizes: HeadSizes
    dtype: Any = jnp.float32

    def setup(self):
        h, s = self.head, self.sizes
        width, init = h.hidden * s.latents, nn.initializers.normal(0.02)

        def dense(size: int, name: str, init: Any = None) -> Dense:
            return Dense((size,), dtype=self.dtype, init=init, name=name)

        self.project = dense(width, "project")
        # Positions count back from the predicted step: a stream and a window must agree.
        self.age = self.param("age_positions", init, (s.steps, s.latents, width))
        self.enter = dense(width, "enter")
        self.place = self.param("chunk_positions", init, (s.chunk, width))
        self.time1, self.time2 = dense(width, "time1"), dense(width, "time2")
        scanned = nn.scan(
            Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,  # type: ignore[arg-type]
            length=h.layers,
            unroll=sharding.unroll(h.layers),
        )
        self.layers = scanned(h.heads, self.dtype)
        # Zeros here and below: the first estimate is 0, as DiT's.
        self.final = dense(2 * width, "final", nn.initializers.zeros)
        self.leave = dense(s.action_dim, "leave", nn.initializers.zeros)

    def context(
        self, features: Float[Array, "b w m d"], valid: Bool[Array, "b w"], last: bool
    ) -> tuple[Float[Array, "r c h"], Bool[Array, "r c"]]:
        """Each step's own features and those before it, newest first, and which exist."""
        x, (b, w) = self.project(features.astype(self.dtype)), valid.shape
        steps = jnp.arange(w - 1, w) if last else jnp.arange(w)
        # Age 0 is the step itself; a negative index lies before the window and is masked.
        source = steps[:, None] - jnp.arange(self.sizes.steps)
        exists = valid[:, jnp.maximum(source, 0)] & (source >= 0)
        x = x[:, jnp.maximum(source, 0)] + self.age.astype(self.dtype)
        latents = x.shape[3]
        x = x.reshape(b * len(steps), self.sizes.steps * latents, -1)
        return x, jnp.repeat(exists.reshape(b * len(steps), self.sizes.steps), latents, axis=1)

    def __call__(
        self,
        context: Float[Array, "r c h"],
        exists: Bool[Array, "r c"],
        noisy: Float[Array, "r f a"],
        time: Float[Array, "r"],
    ) -> Float[Array, "r f a"]:
        """Float32 estimate of what the loss asks for."""
        chunk = noisy.shape[1]
        level = self.time1(time_embedding(time).astype(self.dtype))
        level = jax.nn.silu(self.time2(jax.nn.silu(level)))
        x = self.enter(noisy.astype(self.dtype)) + self.place.astype(self.dtype)
        x = jnp.concatenate([context, x], axis=1)
        exists = jnp.concatenate([exists, jnp.ones(noisy.shape[:2], bool)], axis=1)
        # The actions of a chunk see each other in both directions: they are denoised together.
        mask = jnp.broadcast_to(exists[:, None], (*exists.shape, exists.shape[1]))
        x, _ = self.layers(x, level, mask)
        # The tokens of the context have been attended to, and nothing is read from them.
        shift, scale = jnp.split(self.final(level)[:, None], 2, axis=-1)
        return self.leave(_normalize(x[:, -chunk:]) * (1 + scale) + shift).astype(jnp.float32)

    def loss(
        self,
        features: Float[Array, "b w m d"],
        valid: Bool[Array, "b w"],
        noisy: Float[Array, "b w f a"],
        time: Float[Array, "b w"],
        wanted: Float[Array, "b w f a"],
        mask: Bool[Array, "b w f"],
    ) -> tuple[Float[Array, ""], Float[Array, "b"]]:
        """Mean squared error over what `mask` holds, whole and of each row."""
        context, exists = self.context(features, valid, last=False)
        estimate = self(context, exists, noisy.reshape(-1, *noisy.shape[2:]), time.reshape(-1))
        error = jnp.square(estimate.reshape(wanted.shape) - wanted).mean(-1)
        return masked_mean(error, mask), row_means(error, mask)

    def sample(
        self,
        features: Float[Array, "b w m d"],
        valid: Bool[Array, "b w"],
        key: PRNGKeyArray,
        last: bool,
        move: Callable[[Array, Array, Callable[[Array, Array], Any]], Array],
    ) -> Prediction:
        """`head.sampling_steps` moves from noise to a chunk, for every step or the last.

        All steps start from the same noise, so a stream equals a window.

        Args:
            features: what the VLM says of each step.
            valid: False on padding.
            key: of the noise.
            last: only the window's last step.
            move: (number of the move, chunks [r, f, a], estimate) -> chunks, where
                `estimate(chunks, time [])` is this network's.
        """
        context, exists = self.context(features, valid, last)
        b, steps = valid.shape[0], 1 if last else valid.shape[1]
        shape = (b, 1, self.sizes.chunk, self.sizes.action_dim)
        start = jnp.repeat(jax.random.normal(key, shape), steps, axis=1)
        # Bound modules cannot enter a loop of jax's.
        net, variables = self.unbind()

        def step(i: Array, x: Float[Array, "r f a"]) -> Float[Array, "r f a"]:
            def estimate(chunks: Array, time: Array) -> Any:
                times = jnp.broadcast_to(time, chunks.shape[:1])
                return net.apply(variables, context, exists, chunks, times)

            return move(i, x, estimate)

        x = jax.lax.fori_loop(
            0, self.head.sampling_steps, step, start.reshape(b * steps, *shape[2:])
        )
        return as_prediction(x.reshape(b, steps, *shape[2:]), self.sizes.gripper)


def as_values(actions: Actions, gripper: bool) -> Float[Array, "b w f a"]:
    """The chunk with a gripper at 1 = open, -1 = closed, like the arm's range."""
    if not gripper:
        return actions.chunk
    # Labels are 0 and 1; noise of unit size wants a range around 0.
    scaled = 2.0 * actions.chunk[..., -1:] - 1.0
    return jnp.concatenate([actions.chunk[..., :-1], scaled], axis=-1)


def as_prediction(values: Float[Array, "b u f a"], gripper: bool) -> Prediction:
    """Inverse of `as_values`."""
    if not gripper:
        return Prediction(arm=jnp.clip(values, -1.0, 1.0), gripper=None)
    # A sample may leave the range that actions are normalized to. Of the gripper only the sign is
    # read, so it needs no bound.
    return Prediction(arm=jnp.clip(values[..., :-1], -1.0, 1.0), gripper=values[..., -1])
