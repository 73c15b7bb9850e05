"""RoboArena's wire: openpi's, with the server's wishes in place of the policy's metadata.

Its clients build their settings from the greeting, with these keys and no others. Observations come
under DROID's names with the exterior cameras counted from zero, and with a "session_id" that names
the episode: serve with --observation=roboarena. What the numbers of an action are, only their owner
knows: --action-space says it, and without it nobody is served here.
"""

from collections.abc import Mapping
from typing import Any

from vla_jax.serve import msgpack_numpy
from vla_jax.serve.transports.base import Message, RequestError
from vla_jax.serve.transports.openpi import OpenpiWire

EXTERIOR = ("primary", "secondary")


class RoboArenaWire(OpenpiWire):
    """See the module."""

    name, path = "roboarena", "/roboarena"

    def greet(self) -> Message:
        """What the client shall send."""
        observation: Mapping[str, Any] = self.metadata.get("observation", {})
        space = observation.get("action_space")
        if not space:
            raise RequestError("RoboArena's clients ask for the action space: --action-space=NAME")
        cameras = self.metadata.get("cameras", {})
        return msgpack_numpy.pack(
            {
                # Its clients would pad what they shrink; the model may fit pictures otherwise.
                "image_resolution": None,
                "needs_wrist_camera": "wrist" in cameras,
                "n_external_cameras": sum(role in cameras for role in EXTERIOR),
                "needs_stereo_camera": False,
                # On a connection that lasts, a new name is all that tells one episode from the
                # next.
                "needs_session_id": True,
                "action_space": space,
            }
        )
