"""AdamW or Muon, the schedule, groups of parameters, and the average of what comes out.

The original: RoboVLMs `base_trainer.py` (AdamW on every parameter, the same decay on all, the
multiplier stepped once an optimizer step, so that step 0 of a warmup has rate 0).
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import optax
import optax.contrib
from jaxtyping import Array, Float

from vla_jax import rules
from vla_jax.config import ConfigError, OptimConfig

Schedule = Callable[[Any], Float[Array, ""]]


def make_schedule(config: OptimConfig, steps: int) -> Schedule:
    """Learning rate of optimizer step 0, 1, ...

    All kinds rise linearly over `warmup_steps` w, as t / w, or (t + 1) / (w + 1) with
    `warmup_from` = one; then, with t the step and n `steps`:
    constant 1; cosine (1 + cos(pi (t-w)/(n-w))) / 2; half_cosine the same between 1 and
    `min_scale`; drop 1 and, from step `drop_at` on, `min_scale`. Past n the last value holds.
    """
    # A warmup as long as the run would leave nothing to divide by.
    warmup, span = config.warmup_steps, max(1, steps - config.warmup_steps)
    # True counts as 1 below: the first step then has a rate above 0.
    early = config.warmup_from == "one"
    # A floor of 1 makes the cosine constant.
    floor = {"cosine": 0.0, "half_cosine": config.min_scale}.get(config.schedule, 1.0)

    def schedule(step: Any) -> Float[Array, ""]:
        step = jnp.asarray(step, jnp.float32)
        done = jnp.clip((step - warmup) / span, 0.0, 1.0)
        scale = floor + (1.0 - floor) * 0.5 * (1.0 + jnp.cos(jnp.pi * done))
        if config.schedule == "drop":
            scale = jnp.where(step < config.drop_at, 1.0, config.min_scale)
        rising = (step + early) / max(1, warmup + early)
        return config.learning_rate * jnp.where(step < warmup, rising, scale)

    return schedule


def make_optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """Clip to the global norm (0 = off), then AdamW; for a flat dict of trainable parameters.

    Kernels that `muon` matches get Muon's step in place of Adam's.

    Raises:
        ConfigError: from `init`, naming regexes of `rates`, `decays` and `muon` that match no
            parameter.
    """
    chain = [
        _directions(config),
        _decay_and_scale(config),
        optax.scale_by_learning_rate(make_schedule(config, steps)),
    ]
    if config.clip_norm:
        # First, since the norm is that of the gradients and not of Adam's steps.
        chain.insert(0, optax.clip_by_global_norm(config.clip_norm))
    return optax.chain(*chain)


def _directions(config: OptimConfig) -> optax.GradientTransformation:
    """Gradients -> steps of about unit size: Adam's, or Muon's where `config.muon` says so."""
    adam = optax.scale_by_adam(
        b1=config.b1, b2=config.b2, eps=config.eps, mu_dtype=config.mean_dtype
    )
    if not config.muon:
        return adam
    muon = optax.contrib.scale_by_muon(weight_dimension_numbers=_matrices)
    table = [(pattern, True) for pattern in config.muon] + [("", False)]

    # optax.partition gives the same steps to the bit and stores another state: to read runs that
    # hold this one would take as many lines as it saves.
    def parts(tree: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        chosen = rules.match_all(table, list(tree))
        return (
            {path: x for path, x in tree.items() if chosen[path]},
            {path: x for path, x in tree.items() if not chosen[path]},
        )

    def init(params: Any) -> tuple[Any, Any]:
        matrices, remaining = parts(params)
        _matrices(matrices)
        return muon.init(matrices), adam.init(remaining)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params  # neither needs them
        matrices, remaining = parts(updates)
        turned, muon_state = muon.update(matrices, state[0])
        scaled, adam_state = adam.update(remaining, state[1])
        steps: dict[str, Any] = dict(scaled)  # type: ignore[arg-type]
        for path, (rows, columns) in _matrices(matrices).items():
            x: Any = turned[path]  # type: ignore[index]
            sides = [math.prod(x.shape[i] for i in axes) for axes in (rows, columns)]
            # An orthogonal matrix has entries of RMS 1 / sqrt(longer side). 0.2 is the RMS of
            # Adam's steps in practice, so that rates and decays carry over from AdamW (Liu et
            # al. 2025, arXiv 2502.16982).
            steps[path] = x * (0.2 * math.sqrt(max(sides)))
        return steps, (muon_state, adam_state)

    return optax.GradientTransformation(init, update)


def _matrices(params: Any) -> dict[str, Any]:
    """Which axes of each kernel are a matrix's rows (inputs) and columns (outputs).

    Kernels are [*in, *out], in a stack of layers [layers, *in, *out], each layer a matrix of its
    own; `rules.INPUT_AXES` says how many of the axes are inputs.

    Raises:
        ConfigError: naming the parameters that are no matrices.
    """
    dimensions, problems = {}, []
    for path, x in params.items():
        first = 1 if rules.STACKED.search(path) else 0
        # Muon takes whatever is named, kernels or not, as a matrix of one input axis.
        inputs = rules.match(rules.INPUT_AXES, path) or 1
        axes = range(first, x.ndim)
        if len(axes) <= inputs:
            problems.append(f"optim.muon: {path!r} of shape {tuple(x.shape)} is no matrix")
            continue
        dimensions[path] = optax.contrib.MuonDimensionNumbers(
            tuple(axes[:inputs]), tuple(axes[inputs:])
        )
    if problems:
        raise ConfigError("\n".join(problems))
    return dimensions


def _decay_and_scale(config: OptimConfig) -> optax.GradientTransformation:
    """AdamW's decay and the factors on the rate, each by the first rule that matches the path."""
    decays = [*config.decays, ("", config.weight_decay)]
    rates = [*config.rates, ("", 1.0)]
    named = {"rates": [p for p, _ in config.rates], "decays": [p for p, _ in config.decays]}
    named["muon"] = list(config.muon)

    def init(params: Any) -> optax.EmptyState:
        problems = [
            f"optim.{name}: {pattern!r} matches none of {len(params)} trainable parameters"
            for name, patterns in named.items()
            for pattern in patterns
            if not any(rules.match([(pattern, True), ("", False)], path) for path in params)
        ]
        if problems:
            raise ConfigError("\n".join(problems))
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None) -> tuple[dict[str, Any], Any]:
        changed = {}
        for path, x in updates.items():
            decay, rate = rules.match(decays, path), rules.match(rates, path)
            # Before the rate and behind Adam: this is what makes it AdamW and not L2.
            x = x + decay * params[path] if decay else x
            changed[path] = x * rate if rate != 1.0 else x
        return changed, state

    return optax.GradientTransformation(init, update)


def moving_average(
    average: Mapping[str, Any],
    params: Mapping[str, Any],
    step: Any,
    decay: float,
    warmup: bool = True,
) -> dict[str, Any]:
    """One step of the exponential moving average, in float32.

    Args:
        average: slash path -> average so far; may be empty.
        params: slash path -> parameter after the step; the same paths.
        step: optimizer steps done before this one.
        decay: share of the old average that stays.
        warmup: early on less stays, min(decay, (1 + t) / (10 + t)) as in TensorFlow's
            `num_updates`, so that a short run does not average in its random start.
    """
    t = jnp.asarray(step, jnp.float32)
    moved = 1.0 - (jnp.minimum(decay, (1.0 + t) / (10.0 + t)) if warmup else decay)
    return {path: old + moved * (params[path] - old) for path, old in average.items()}
