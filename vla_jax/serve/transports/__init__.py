"""The wires the server speaks, one file each; a new one is its file and its line here."""

from vla_jax.serve.transports.base import Wire
from vla_jax.serve.transports.openpi import OpenpiWire
from vla_jax.serve.transports.openvla import OpenVLAWire
from vla_jax.serve.transports.roboarena import RoboArenaWire
from vla_jax.serve.transports.vla_eval import VlaEvalWire

WIRES: tuple[type[Wire], ...] = (
    OpenpiWire,
    OpenVLAWire,
    RoboArenaWire,
    VlaEvalWire,
)
