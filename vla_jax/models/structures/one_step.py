"""The VLM sees one step; there is no history."""

from vla_jax.config import ModelConfig
from vla_jax.models.backbones.base import Backbone
from vla_jax.models.structures.base import Structure


class OneStep(Structure):
    """The features of a step go to the head by themselves, as RT-2 and OpenVLA act."""

    description = "the VLM sees one step; there is no history"
    one_step_reason = (
        "with one step there is nothing to remember (policy_head with window 1 computes the same)"
    )

    @classmethod
    def refusals(cls, config: ModelConfig, backbone: Backbone) -> list[str]:
        """Also a window, which it has not."""
        problems, window = super().refusals(config, backbone), config.structure.window
        if window != 1:
            problems.append(f"structure.window: one_step has no history: 1, not {window}")
        return problems
