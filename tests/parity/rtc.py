"""Parity of guided sampling: the loop of real-time-chunking-kinetix, around its own small network.

The network is written out here, as it is no part of ours; what is compared is the guidance.
"""

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.parity import golden
from tests.parity.table import Row, compare
from vla_jax.inference.realtime import SCHEDULES, prefix_weights
from vla_jax.models.heads.expert_flow import time_embedding
from vla_jax.models.heads.guidance import guided_velocity
from vla_jax.types import Guide

TOLERANCE = 1e-4


def run(folder: Path) -> Iterator[Row]:
    """The network's velocity, weights of every schedule, actions of every schedule."""
    io, config = golden.arrays(folder), golden.config(folder)
    weights = {name: jnp.asarray(value) for name, value in golden.weights(folder).items()}
    start, count, chunk = jnp.asarray(io["noise"]), config["num_steps"], config["chunk"]

    def velocity(noisy: jax.Array, time: Any) -> jax.Array:
        return _network(weights, config, jnp.asarray(io["obs"]), noisy, time)

    def sample(guide: Guide | None) -> jax.Array:
        x = start
        for i in range(count):
            time = jnp.float32(i / count)
            x = x + guided_velocity(lambda y, t=time: velocity(y, t), x, time, guide) / count
        return x

    yield compare("velocity", velocity(start, 0.3), io["v_at_noise_t0.3"], TOLERANCE)
    plain = jax.jit(lambda: sample(None))()
    yield compare("actions, no guide", plain, io["actions_plain"], TOLERANCE)
    previous, delay = jnp.asarray(io["prev_chunk"]), config["inference_delay"]
    limit = config["max_guidance_weight"]

    @functools.partial(jax.jit, static_argnums=1)
    def guided(rows: jax.Array, jacobian: bool) -> jax.Array:
        return sample(Guide(previous, rows, limit, jacobian=jacobian))

    for schedule in SCHEDULES:
        result = prefix_weights(delay, config["prefix_attention_horizon"], chunk, schedule)
        yield compare(f"weights, {schedule}", result, io[f"weights/{schedule}"], 1e-6)
        rows = jnp.broadcast_to(jnp.asarray(result), previous.shape[:2])
        actions = guided(rows, True)
        yield compare(f"actions, {schedule}", actions, io[f"actions/{schedule}"], TOLERANCE)
        if schedule == "exp":
            actions = guided(rows, False)
            expected = io["own/actions_exp_no_jacobian"]
            yield compare("actions, exp, direct", actions, expected, TOLERANCE)


def _network(
    weights: Mapping[str, jax.Array],
    config: Mapping[str, Any],
    seen: jax.Array,
    noisy: jax.Array,
    time: Any,
) -> jax.Array:
    def linear(x: jax.Array, name: str) -> jax.Array:
        return x @ weights[f"{name}/kernel"] + weights.get(f"{name}/bias", np.float32(0))

    def modulated(x: jax.Array, scale: jax.Array, shift: jax.Array) -> jax.Array:
        wide = x - x.mean(-1, keepdims=True)
        return wide * jax.lax.rsqrt((wide**2).mean(-1, keepdims=True) + 1e-6) * (1 + scale) + shift

    def parts(name: str, count: int) -> list[jax.Array]:
        return jnp.split(linear(level, name)[:, None], count, axis=-1)

    level = time_embedding(jnp.full(noisy.shape[:1], time), config["channel_dim"])
    level = jax.nn.silu(linear(level, "time_mlp/layers/0"))
    level = jax.nn.silu(linear(level, "time_mlp/layers/2"))
    repeated = jnp.repeat(seen[:, None], noisy.shape[1], axis=1)
    x = linear(jnp.concatenate([noisy, repeated], axis=-1), "in_proj")
    for i in range(config["num_layers"]):
        layer = f"mlp_stack/{i}"
        scale, shift, gate = parts(f"{layer}/adaln_1", 3)
        tokens = modulated(x, scale, shift).transpose(0, 2, 1)
        tokens = linear(
            jax.nn.gelu(linear(tokens, f"{layer}/token_mix_in")), f"{layer}/token_mix_out"
        )
        x = x + gate * tokens.transpose(0, 2, 1)
        scale, shift, gate = parts(f"{layer}/adaln_2", 3)
        channels = linear(modulated(x, scale, shift), f"{layer}/channel_mix_in")
        x = x + gate * linear(jax.nn.gelu(channels), f"{layer}/channel_mix_out")
    scale, shift = parts("final_adaln", 2)
    return linear(modulated(x, scale, shift), "out_proj")
