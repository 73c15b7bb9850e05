"""`POST /act` as OpenVLA's server answers it, for clients written for that one.

    requests.post("http://127.0.0.1:8000/act", json={"image": image, "instruction": "..."}).json()

with json_numpy patched in. The reply is one action, float32 [a] in robot units: the first of the
chunk, since the client asks at every step. {"encoded": TEXT} with the request as text inside gets
its reply as text inside, as there. What cannot be answered is an HTTP error with {"error": WHY}
(OpenVLA's server sends the word "error" and status 200).

OpenVLA's requests have no history. "session_id" (a string of the client's choice) gives them one:
it goes on with the same prompt and starts over with "reset": true.
"""

from typing import Any

from vla_jax.inference.protocol import (
    ACTIONS_KEY,
    IMAGE_KEYS,
    PROMPT_KEY,
    STATE_KEY,
    ObservationError,
)
from vla_jax.serve import json_numpy
from vla_jax.serve.transports.base import (
    Message,
    PostWire,
    Request,
    RequestError,
    brief,
)

# OpenVLA's and OpenVLA-OFT's names -> ours; our own names are taken as well.
NAMES = {
    "image": IMAGE_KEYS["primary"],
    "full_image": IMAGE_KEYS["primary"],
    "image_secondary": IMAGE_KEYS["secondary"],
    "wrist_image": IMAGE_KEYS["wrist"],
    "state": STATE_KEY,
    "instruction": PROMPT_KEY,
}
MAX_NAME = 200  # characters of a session's name


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
        obs = {NAMES[key] if key in NAMES else key: x for key, x in request.items()}  # noqa: SIM401
        return Request(obs, reset, session, note=encoded)

    def write(self, request: Request, reply: dict[str, Any]) -> Message:
        """The first action: OpenVLA's clients expect one, not a chunk."""
        action = json_numpy.pack(reply[ACTIONS_KEY][0])
        return json_numpy.pack(action.decode()) if request.note else action

    def refuse(self, request: Request | None, error: Exception) -> Message:
        """See `Wire`."""
        # A key that is missing under our name is known to the client under another.
        named = request is not None and isinstance(error, ObservationError)
        names = f". Names of POST {self.path}: {NAMES}" if named else ""
        return json_numpy.pack({"error": brief(f"{error}{names}")})

    def _check_dataset(self, key: Any) -> None:
        """Refuse to answer in the units of another dataset than the client asks for."""
        served = self.metadata.get("dataset")
        if key is not None and served is not None and str(key) != served:
            text = f"unnorm_key {str(key)[:80]!r}: this server's actions are those of {served!r}"
            raise ObservationError(text)
