"""A VLA from its config: backbone x structure x head, checked, built and initialized.

The three are independent choices. The structure is the outermost module and holds the other two;
`structures/base.py` says what it does, `legality.py` which choices combine.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from vla_jax import rules
from vla_jax.config import ModelConfig
from vla_jax.models import legality, structures
from vla_jax.models.backbones import BACKBONES
from vla_jax.models.structures import Structure
from vla_jax.types import Actions, Observation

# What `build` returns; a structure with its backbone and head is the whole model.
VLA = Structure


def build(config: ModelConfig, arch: Mapping[str, Any] | None = None) -> VLA:
    """The model of a config.

    Args:
        config: the model part of a resolved config.
        arch: the backbone's complete architecture; by default the released one with
            `config.backbone.arch` applied.

    Raises:
        ConfigError: naming every choice that does not exist or does not combine, with the legal
            ones.
    """
    config, complete = legality.completed(config, arch)
    return _kind(config)(config, complete)


def prompt(config: ModelConfig) -> str:
    """Template of the text, with {instruction}: the backbone's own, or the structure's question."""
    return _kind(config).prompt(config)


def prompt_form(config: ModelConfig) -> str:
    """Form of the prompt, of structures whose prompt is more than a template; "" of others."""
    return _kind(config).prompt_form(config)


def written(config: ModelConfig) -> int:
    """Columns of the texts that say a chunk, `Actions.written`; 0 where the model reads none."""
    return _kind(config).written(config)


def _kind(config: ModelConfig) -> type[Structure]:
    return structures.find(config.structure.kind, config.head.kind)


def ends(config: ModelConfig) -> tuple[str, str]:
    """What captions begin and end with; empty where the tokenizer adds what they need."""
    return BACKBONES[config.backbone.name].ENDS


def initial_params(model: VLA, key: Array) -> dict[str, Any]:
    """Random parameters as a plain nested dict; under `eval_shape` their shapes, without memory."""
    c, s, shape = model.config, model.config.structure, model.image.shape
    # Parameters depend on shapes alone, so any observation of the right shapes will do.
    ones = jnp.ones((1, s.text_len), bool)
    observation = Observation(
        images={c: jnp.zeros((1, s.window, *shape, 3)) for c in s.cameras},
        image_mask={c: jnp.ones((1, s.window), bool) for c in s.cameras},
        text=ones.astype(jnp.int32),
        text_mask=ones,
        proprio=jnp.zeros((1, s.window, s.proprio)) if s.proprio else None,
        sentence=jnp.zeros((1, c.sentence.dim)),
    )
    actions = Actions(
        chunk=jnp.zeros((1, s.window, s.chunk, c.action_dim)),
        mask=jnp.ones((1, s.window, s.chunk), bool),
        written=jnp.zeros((1, written(c)), jnp.int32) if written(c) else None,
    )
    # `loss` reaches every module, such as the sentence output, which `__call__` does not.
    variables = model.init(key, observation, actions, jax.random.key(0), 0.0, method="loss")
    return dict(variables["params"])


def linear_maps(model: VLA) -> dict[str, tuple[int, int]]:
    """Path of the kernel of every linear map -> how many axes its stack has, and its inputs.

    A module names its own: those are all that `whole_numbers.brought_back` scales.
    """
    axes_of: dict[str, tuple[int, int]] = {}

    def look(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module, result = context.module, call(*args, **kwargs)
        # Other methods, such as the LoRA product of a `Dense`, come by here as well.
        if context.method_name == "__call__" and hasattr(module, "kernels"):
            for name, inputs in module.kernels().items():
                # Of a stack a module sees one layer.
                axes = module.get_variable("params", name).ndim
                axes_of["/".join((*module.path, name))] = axes, inputs
        return result

    # Shapes are enough to visit every module, and the weights of a large model would not fit.
    with nn.intercept_methods(look):
        params = jax.eval_shape(lambda key: initial_params(model, key), jax.random.key(0))
    stored = rules.flatten(params)
    return {path: (stored[path].ndim - axes, inputs) for path, (axes, inputs) in axes_of.items()}
