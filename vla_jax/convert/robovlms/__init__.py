"""RoboVLMs' checkpoints and configs."""

from vla_jax.moved import names_of

__getattr__ = names_of(__name__)
