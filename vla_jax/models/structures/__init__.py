"""The structures, how history and action meet the VLM: one file each, one line here."""

from vla_jax.models.structures.base import Structure
from vla_jax.models.structures.discrete import Discrete
from vla_jax.models.structures.expert import Expert
from vla_jax.models.structures.fast import FastTokens
from vla_jax.models.structures.interleaved import Interleaved
from vla_jax.models.structures.one_step import OneStep
from vla_jax.models.structures.parallel import Parallel
from vla_jax.models.structures.policy_head import PolicyHead
from vla_jax.models.structures.video import Video
from vla_jax.moved import names_of

STRUCTURES: dict[str, type[Structure]] = {
    "one_step": OneStep,
    "discrete": Discrete,
    "interleaved": Interleaved,
    "policy_head": PolicyHead,
    "video": Video,
    "expert": Expert,
    "parallel": Parallel,
}

# (structure, head) -> the module where it is another one than for the structure's other heads.
VARIANTS: dict[tuple[str, str], type[Structure]] = {("discrete", "fast"): FastTokens}


def find(structure: str, head: str) -> type[Structure]:
    """The module of a structure with a head.

    Args:
        structure: a key of `STRUCTURES`.
        head: name of a head.
    """
    return VARIANTS.get((structure, head), STRUCTURES[structure])


__getattr__ = names_of(__name__)
