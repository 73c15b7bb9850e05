"""The datasets and mixtures of Open X-Embodiment, as octo and openvla read them."""

from vla_jax.data.oxe.mixtures import MIXTURES, get_mixture
from vla_jax.data.oxe.registry import SPECS, VARIANTS, get_spec

__all__ = ["MIXTURES", "SPECS", "VARIANTS", "get_mixture", "get_spec"]
