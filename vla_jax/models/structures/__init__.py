"""The structures, how history and action meet the VLM: one file each, one line here."""

from vla_jax.models.structures.base import Structure
from vla_jax.models.structures.discrete import Discrete
from vla_jax.models.structures.expert import Expert
from vla_jax.models.structures.interleaved import Interleaved
from vla_jax.models.structures.one_step import OneStep
from vla_jax.models.structures.parallel import Parallel
from vla_jax.models.structures.policy_head import PolicyHead
from vla_jax.models.structures.video import Video

STRUCTURES: dict[str, type[Structure]] = {
    "one_step": OneStep,
    "discrete": Discrete,
    "interleaved": Interleaved,
    "policy_head": PolicyHead,
    "video": Video,
    "expert": Expert,
    "parallel": Parallel,
}
