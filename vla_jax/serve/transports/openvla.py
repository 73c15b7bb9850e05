"""`POST /act` as OpenVLA's server answers it, for clients written for that one.

    requests.post("http://127.0.0.1:8000/act", json={"image": image, "instruction": "..."}).json()

with json_numpy patched in. The reply is one action, float32 [a] in robot units: the first of the
chunk, since the client asks at every step. {"encoded": TEXT} with the request as text inside gets
its reply as text inside, as there. What cannot be answered is an HTTP error with {"error": WHY}
(OpenVLA's server sends the word "error" and status 200).

OpenVLA-OFT's server has the same address: a request with "full_image" is for it and gets the whole
chunk, a list of actions, which its clients replay. Its images are full_image, wrist_image (or, with
two arms, left_wrist_image and right_wrist_image), its numbers state.

These requests have no history. "session_id" (a string of the client's choice) gives them one:
it goes on with the same prompt and starts over with "reset": true.
"""

from typing import Any

from vla_jax.config.observation import ObservationConfig
from vla_jax.inference.protocol import ACTIONS_KEY, ObservationError
from vla_jax.inference.robot_keys import RobotKeys
from vla_jax.serve import json_numpy
from vla_jax.serve.transports.base import (
    MAX_NAME,
    Message,
    PostWire,
    Request,
    RequestError,
    brief,
    episode_name,
)

# What OpenVLA's releases call datasets that go by another name elsewhere.
_OPENVLA_NAMES = {"bridge_orig": "bridge_dataset", "rt_1": "fractal20220817_data"}
_KEYS = RobotKeys(ObservationConfig("openvla"))


class OpenVLAWire(PostWire):
    """See the module."""

    name, path = "rest", "/act"

    def read(self, message: Message) -> Request:
        """See `Wire`."""
        request = json_numpy.unpack(message)
        # OpenVLA's clients may send a JSON text inside JSON.
        encoded = isinstance(request, dict) and set(request) == {"encoded"}
        if encoded and isinstance(request["encoded"], str):
            request = json_numpy.unpack(request["encoded"])
        if not isinstance(request, dict):
            raise RequestError(f"expected a JSON object, got a {type(request).__name__}")
        self._check_dataset(request.pop("unnorm_key", None))
        session, reset = request.pop("session_id", None), request.pop("reset", False)
        named = session is None or (isinstance(session, str) and 0 < len(session) <= MAX_NAME)
        if not named or not isinstance(reset, bool):
            raise RequestError(
                f"session_id: expected a string of 1 to {MAX_NAME} characters; reset: true or false"
            )
        episode = episode_name(request, "episode_id")
        chunked = "full_image" in request
        # A robot's own keys are still there, for the policy's own profile.
        return Request(_KEYS.standardize(request), reset, episode, session, note=(encoded, chunked))

    def write(self, request: Request, reply: dict[str, Any]) -> Message:
        """The first action for OpenVLA's clients, the list of all for OpenVLA-OFT's."""
        encoded, chunked = request.note
        actions = reply[ACTIONS_KEY]
        packed = json_numpy.pack(list(actions) if chunked else actions[0])
        return json_numpy.pack(packed.decode()) if encoded else packed

    def refuse(self, request: Request | None, error: Exception) -> Message:
        """See `Wire`."""
        # A key that is missing under our name is known to the client under another.
        named = request is not None and isinstance(error, ObservationError)
        names = f". Names of POST {self.path}: {_KEYS.to_json()}" if named else ""
        return json_numpy.pack({"error": brief(f"{error}{names}")})

    def _check_dataset(self, key: Any) -> None:
        """Refuse to answer in the units of another dataset than the client asks for."""
        served = self.metadata.get("dataset")
        if key is None or served is None:
            return
        names = [served, *self.metadata.get("observation", {}).get("aliases", ())]
        # OpenVLA's own client appends the ending where the bare name is not there.
        asked = str(key)
        if not {asked, asked + "_no_noops", _OPENVLA_NAMES.get(asked)} & set(names):
            text = f"unnorm_key {asked[:80]!r}: this server's actions are those of {served!r}"
            aliases = f" (also known as {names[1:]})" if names[1:] else ""
            raise ObservationError(f"{text}{aliases}; --unnorm-keys adds names")
