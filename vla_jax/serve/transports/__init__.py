"""The wires the server speaks, one file each; a new one is its file and its line here."""

from vla_jax.serve.transports.base import Wire
from vla_jax.serve.transports.openpi import OpenpiWire
from vla_jax.serve.transports.openvla import OpenVLAWire

# Websocket clients that ask for another path than any of these get the first websocket wire.
WIRES: tuple[type[Wire], ...] = (
    OpenpiWire,
    OpenVLAWire,
)
