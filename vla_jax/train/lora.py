"""LoRA (Hu et al. 2021, arXiv 2106.09685): y = x W + dropout(x) A B * alpha / rank, W frozen.

The factors are parameters beside their kernel: `.../q/kernel` [layers, *in, *out] gets
`.../q/lora_a` [layers, in, rank] and `.../q/lora_b` [layers, rank, out], so rules, sharding and
checkpoints see ordinary paths. `layers.Dense` adds the product wherever it finds factors, which
covers every linear map of every backbone: no merged copy of the weights is made and no gradient of
a whole kernel. The dropout is on activations, a new draw for every token, as in peft.

Start as in peft: A uniform in +-1 / sqrt(in), B zero, so that step 0 is the base model.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vla_jax import rules
from vla_jax.config import Config, ConfigError, LoraConfig
from vla_jax.train import split

Init = Callable[[jax.Array], Mapping[str, Any]]

FACTORS = r"/lora_[ab]$"
VLM = r"^backbone/"


def train_rules(config: Config) -> list[tuple[str, int]]:
    """`split.train_rules`, before which factors train and their kernels do not.

    All else of the VLM is frozen last, if `lora.freeze` says so.
    """
    if not config.lora.rank:
        return split.train_rules(config.optim)
    kernels = [(pattern, split.NONE) for pattern in config.lora.targets]
    frozen = [(VLM, split.NONE)] if config.lora.freeze else []
    # The first match wins: factors train even inside a tower that is frozen.
    return [(FACTORS, split.ALL), *kernels, *split.train_rules(config.optim), *frozen]


def extend(init: Init, config: LoraConfig) -> Init:
    """The initial parameters of `init`, and factors beside every targeted kernel.

    Raises:
        ConfigError: when called, naming regexes without a kernel and paths that are none.
    """
    if not config.rank:
        return init

    def both(key: jax.Array) -> dict[str, Any]:
        flat = rules.flatten(init(key))
        sizes = factor_shapes({path: x.shape for path, x in flat.items()}, config)
        for i, (path, shape) in enumerate(sizes.items()):
            if path.endswith("lora_a"):
                bound = 1.0 / math.sqrt(shape[-2])
                draw = jax.random.fold_in(key, i)
                flat[path] = jax.random.uniform(draw, shape, minval=-bound, maxval=bound)
            else:
                flat[path] = jnp.zeros(shape)
        return rules.unflatten(flat)

    return both


def factor_shapes(
    shapes: Mapping[str, tuple[int, ...]], config: LoraConfig
) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every factor, from the shapes of the model's parameters.

    Raises:
        ConfigError: naming regexes that match no kernel, and matched paths that are none.
    """
    table = [*((pattern, True) for pattern in config.targets), ("", False)]
    chosen = [path for path, hit in rules.match_all(table, list(shapes)).items() if hit]
    problems = [
        f"lora.targets: {pattern!r} matches none of {len(shapes)} parameters"
        for pattern in config.targets
        if not any(rules.match([(pattern, True), ("", False)], path) for path in shapes)
    ]
    factors: dict[str, tuple[int, ...]] = {}
    for path in chosen:
        # Every layer of a stack has factors of its own.
        lead = 1 if rules.STACKED.search(path) else 0
        inputs = rules.match(rules.INPUT_AXES, path)
        # A kernel has at least one output axis behind its inputs.
        if not inputs or len(shapes[path]) <= lead + inputs:
            problems.append(f"lora.targets: {path} is no kernel of a linear map")
            continue
        stack, fan_in, fan_out = np.split(np.array(shapes[path]), [lead, lead + inputs])
        folder = path.removesuffix("kernel")
        factors[folder + "lora_a"] = (*stack.tolist(), int(fan_in.prod()), config.rank)
        factors[folder + "lora_b"] = (*stack.tolist(), config.rank, int(fan_out.prod()))
    if problems:
        raise ConfigError("\n".join(problems))
    return factors


def active(params: Mapping[str, Any], config: LoraConfig, train: bool) -> Mapping[str, Any]:
    """Parameters as `Dense` wants them: B times alpha / rank; the dropout rate in training."""
    if not config.rank:
        return params
    flat = rules.flatten(params)
    # Over a list, because entries are added on the way.
    for path in [path for path in flat if path.endswith("/lora_b")]:
        flat[path] = flat[path] * (config.alpha / config.rank)
        if train and config.dropout:
            # One number a layer: the scan over layers slices every leaf.
            rate = jnp.full(flat[path].shape[:-2], config.dropout, jnp.float32)
            flat[path.removesuffix("b") + "rate"] = rate
    return rules.unflatten(flat)


def merge(params: Mapping[str, Any], config: LoraConfig) -> dict[str, Any]:
    """Parameters of the plain model: every update added to its kernel, in float32."""
    if not config.rank:
        return dict(params)
    flat = rules.flatten(params)
    # Over a list, because entries are removed on the way.
    for path in [path for path in flat if path.endswith("/lora_a")]:
        folder = path.removesuffix("lora_a")
        a, b = (flat.pop(f"{folder}lora_{m}").astype(jnp.float32) for m in "ab")
        # The default precision on a TPU would round the update to bfloat16.
        update = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
        kernel = flat[folder + "kernel"]
        scale = config.alpha / config.rank
        flat[folder + "kernel"] = kernel.astype(jnp.float32) + scale * update.reshape(kernel.shape)
    return rules.unflatten(flat)


def without(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that are no factors: what a VLM's own weights fill."""
    return {path: x for path, x in flat.items() if "/lora_" not in path}


def count(flat: Mapping[str, Any]) -> int:
    """Numbers in all factors of a flat dict of arrays or shape structs."""
    return sum(math.prod(x.shape) for path, x in flat.items() if "/lora_" in path)
