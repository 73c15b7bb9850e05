"""The structures, how history and action meet the VLM: one file each, one line here."""

from vla_jax.models.heads import HEADS
from vla_jax.models.structures.base import Structure
from vla_jax.models.structures.discrete import Discrete
from vla_jax.models.structures.expert import Expert
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


def find(structure: str, head: str) -> type[Structure]:
    """The module of a structure with a head.

    Args:
        structure: a key of `STRUCTURES`.
        head: a key of `HEADS`.
    """
    return STRUCTURES[structure].for_head(HEADS[head])


# Programs of version 0.1 import the helpers of `splicing` from here.
__getattr__ = names_of(__name__)
