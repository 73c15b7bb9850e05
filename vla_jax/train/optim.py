"""AdamW, its schedule, and the split of parameters into those that train and those that do not.

The original: RoboVLMs `base_trainer.py` (AdamW on every parameter, the same decay on all, the
multiplier stepped once an optimizer step, so that step 0 of a warmup has rate 0).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from vla_jax import rules
from vla_jax.config import ConfigError, OptimConfig

Schedule = Callable[[Any], Float[Array, ""]]


def make_schedule(config: OptimConfig, steps: int) -> Schedule:
    """Learning rate of optimizer step 0, 1, ...

    All kinds rise linearly from 0 over `warmup_steps` w; then, with t the step and n `steps`:
    constant 1; cosine (1 + cos(pi (t-w)/(n-w))) / 2; half_cosine the same between 1 and
    `min_scale`. Past n the last value holds.
    """
    warmup, span = config.warmup_steps, max(1, steps - config.warmup_steps)
    floor = {"constant": 1.0, "cosine": 0.0, "half_cosine": config.min_scale}[config.schedule]

    def schedule(step: Any) -> Float[Array, ""]:
        step = jnp.asarray(step, jnp.float32)
        done = jnp.clip((step - warmup) / span, 0.0, 1.0)
        scale = floor + (1.0 - floor) * 0.5 * (1.0 + jnp.cos(jnp.pi * done))
        rising = step / max(1, warmup)
        return config.learning_rate * jnp.where(step < warmup, rising, scale)

    return schedule


def make_optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """Clip to the global norm (0 = off), then AdamW; for a flat dict of trainable parameters."""
    adamw = optax.adamw(
        make_schedule(config, steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
    )
    if not config.clip_norm:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)


def moving_average(
    average: Mapping[str, Any], params: Mapping[str, Any], step: Any, decay: float
) -> dict[str, Any]:
    """One step of the exponential moving average, in float32.

    Args:
        average: slash path -> average so far; may be empty.
        params: slash path -> parameter after the step; the same paths.
        step: optimizer steps done before this one.
        decay: share of the old average that stays. Early on less stays, min(decay, (1 + t) /
            (10 + t)) as in TensorFlow's `num_updates`, so that a short run does not average in
            its random start.
    """
    t = jnp.asarray(step, jnp.float32)
    moved = 1.0 - jnp.minimum(decay, (1.0 + t) / (10.0 + t))
    return {path: old + moved * (params[path] - old) for path, old in average.items()}


class Split(NamedTuple):
    """Flat dicts of one model's parameters: trainable float32, frozen bfloat16."""

    trainable: dict[str, Any]
    frozen: dict[str, Any]


def split(params: Mapping[str, Any], frozen: tuple[str, ...]) -> Split:
    """Nested parameters -> what trains and what does not, each in its dtype.

    Args:
        params: nested dict of arrays or shape structs.
        frozen: path regexes; a parameter that any of them is found in does not train.

    Raises:
        ConfigError: naming regexes that match nothing, or if nothing is left to train.
    """
    flat = rules.flatten(params)
    table = [(pattern, True) for pattern in frozen] + [("", False)]
    stays = rules.match_all(table, list(flat))
    problems = [
        f"optim.frozen: {pattern!r} matches none of {len(flat)} parameters"
        for pattern in frozen
        if not any(rules.match([(pattern, True), ("", False)], path) for path in flat)
    ]
    if all(stays.values()):
        problems.append("optim.frozen: leaves no parameter to train")
    if problems:
        raise ConfigError("\n".join(problems))
    return Split(
        {path: _cast(x, jnp.float32) for path, x in flat.items() if not stays[path]},
        {path: _cast(x, jnp.bfloat16) for path, x in flat.items() if stays[path]},
    )


def merge(trainable: Mapping[str, Any], frozen: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `split`, up to dtype."""
    return rules.unflatten({**trainable, **frozen})


def _cast(leaf: Any, dtype: Any) -> Any:
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)
    return leaf.astype(dtype)
