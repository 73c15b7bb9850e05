"""CALVIN's download."""

from vla_jax.moved import names_of

__getattr__ = names_of(__name__)
