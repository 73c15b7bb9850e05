"""The VLM sees one step, the head the features of the window."""

from vla_jax.models.structures.base import Structure


class PolicyHead(Structure):
    """All is as in the base class: every step is read by itself, and the head has the memory."""

    description = "the VLM sees one step, the head the features of the window"
    robovlms_name = "post"
