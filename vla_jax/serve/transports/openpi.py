"""openpi's wire, this project's native one: a websocket with msgpack, arrays included.

The server speaks first, with the policy's metadata; after that every observation gets its actions.
A problem is a text frame, since actions always come as bytes. RoboArena's clients add an
"endpoint": "infer", which is also what none means, or "reset", which begins an episode; some forks
of openpi's client send {"__ctrl__": "episode_start"} instead and get an empty map. An "episode_id"
(RoboArena says "session_id") beside an observation begins an episode when it changes. "check" is
this project's own: it asks which of some instructions the policy can be told, see `Engine.unfit`.
"""

from typing import Any

from vla_jax.inference import protocol
from vla_jax.serve import msgpack_numpy
from vla_jax.serve.transports.base import (
    Message,
    Request,
    RequestError,
    WebsocketWire,
    brief,
    episode_name,
)

CONTROL_KEY = "__ctrl__"
CONTROLS = ["episode_start", "episode_end", "reset"]  # the end of one is the beginning of another


class OpenpiWire(WebsocketWire):
    """See the module."""

    name, path = "websocket", "/openpi"

    def greet(self) -> Message:
        """The policy's metadata."""
        return msgpack_numpy.pack(dict(self.metadata))

    def read(self, message: Message) -> Request:
        """See `Wire`."""
        if isinstance(message, str):
            raise RequestError("expected a binary frame holding msgpack, got a text frame")
        obs = msgpack_numpy.unpack(message)
        if not isinstance(obs, dict) or not all(isinstance(key, str) for key in obs):
            raise RequestError(
                f"expected a map with string keys, as {protocol.PROMPT_KEY!r}, got "
                + (f"the keys {list(obs)[:8]}" if isinstance(obs, dict) else type(obs).__name__)
            )
        if CONTROL_KEY in obs:
            word = obs[CONTROL_KEY]
            # The type comes first: an array that is compared with a text has no truth value.
            if not isinstance(word, str) or word not in CONTROLS:
                raise RequestError(f"{CONTROL_KEY} {brief(repr(word), 40)}: legal: {CONTROLS}")
            return Request(reset=True, answer=msgpack_numpy.pack({}))
        endpoint = obs.pop(protocol.ENDPOINT_KEY, "infer")
        if not isinstance(endpoint, str) or endpoint not in protocol.ENDPOINTS:
            legal = list(protocol.ENDPOINTS)
            raise RequestError(f"endpoint {str(endpoint)[:40]!r} does not exist; legal: {legal}")
        if endpoint == "check":
            texts = obs.get(protocol.INSTRUCTIONS_KEY)
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise RequestError(f"{protocol.INSTRUCTIONS_KEY}: expected a list of texts")
            return Request(instructions=tuple(texts))
        if endpoint == "reset":
            return Request(reset=True, answer=protocol.RESET_REPLY)
        return Request(obs, episode=episode_name(obs, "episode_id", "session_id"))

    def write(self, request: Request, reply: dict[str, Any]) -> Message:
        """See `Wire`."""
        return msgpack_numpy.pack(reply)

    def refuse(self, request: Request | None, error: Exception) -> Message:
        """Every client of this wire takes text for an error and shows it."""
        return brief(error)
