"""The whole config of a run, as frozen dataclasses; every field has its default.

The groups are in `model`, `data` and `training` beside this file. The defaults are RoboVLMs'
published setting where it has one: Kosmos-2, policy head, LSTM.
"""

import dataclasses
import textwrap
import typing
from dataclasses import dataclass

from vla_jax.config.data import AugmentConfig, DataConfig
from vla_jax.config.model import ModelConfig
from vla_jax.config.observation import ObservationConfig
from vla_jax.config.option import Options, group, kinds, option
from vla_jax.config.training import LoraConfig, MeshConfig, OptimConfig, TrainConfig


@dataclass(frozen=True)
class Config(Options):
    """All of a run."""

    # That of RoboVLMs' shipped configs.
    seed: int = option(123, "Seed of initial weights, sample order, dropout and augmentation.")
    model: ModelConfig = group(ModelConfig)
    data: DataConfig = group(DataConfig)
    augment: AugmentConfig = group(AugmentConfig)
    lora: LoraConfig = group(LoraConfig)
    optim: OptimConfig = group(OptimConfig)
    mesh: MeshConfig = group(MeshConfig)
    train: TrainConfig = group(TrainConfig)
    observation: ObservationConfig = group(ObservationConfig)


def describe(cls: type = Config, prefix: str = "", beyond: type = type) -> str:
    """Every key of a group with its default, its legal values and what it does, as text.

    Args:
        cls: dataclass of the group.
        prefix: of the keys.
        beyond: a class whose keys are left out.
    """
    hints = typing.get_type_hints(cls)
    parts = []
    for field in dataclasses.fields(cls):
        # A field with a default is an attribute of its class, so this finds what all kinds share.
        if hasattr(beyond, field.name):
            continue
        key = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(hints[field.name]):
            inner = typing.cast(type, hints[field.name])
            about = (inner.__doc__ or "").split("\n")[0]
            parts.append(f"\n{key}: {about}\n{describe(inner, key + '.')}")
            for kind, kind_class in kinds(field.metadata).items():
                if kind_class is not inner:
                    parts.append(
                        f"\n{key} of kind {kind}:\n{describe(kind_class, key + '.', inner)}"
                    )
            continue
        default = field.default
        if default is dataclasses.MISSING:
            # A mutable default is made anew for every config, so one is made to be shown.
            default = field.default_factory()  # type: ignore[misc]
        choices = field.metadata["choices"]
        legal = f"  ({' | '.join(choices)})" if choices else ""
        doc = textwrap.indent(textwrap.fill(field.metadata["doc"], 92), "    ")
        parts.append(f"{key} = {default!r}{legal}\n{doc}")
    return "\n".join(parts)
