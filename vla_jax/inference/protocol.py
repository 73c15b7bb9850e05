"""What the server asks of a policy, and the names both sides of the wire agree on.

An observation is a flat dict with openpi's keys; a policy states in its metadata which of them it
takes. `inference.policy.Policy` is the implementation; any object with these five members serves.
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

IMAGE_KEYS = {  # camera role (vla_jax.cameras.CAMERAS) -> observation key, uint8 [h, x, 3] RGB
    "primary": "observation/image",
    "secondary": "observation/image_secondary",
    "wrist": "observation/wrist_image",
}
STATE_KEY = "observation/state"  # float32 [p], robot units
PROMPT_KEY = "prompt"  # str, the instruction
ACTIONS_KEY = "actions"  # reply: float32 [f, a], robot units
TIMING_KEY = "server_timing"  # reply: {"infer_ms": float, ...}

# RoboArena's addition to openpi's wire: a request may carry an endpoint; none means "infer".
ENDPOINT_KEY = "endpoint"
ENDPOINTS = ("infer", "reset", "check")  # check is ours: which instructions the policy takes
INSTRUCTIONS_KEY = "instructions"  # of a request to check: a list of texts
UNFIT_KEY = "unfit"  # of its reply: instruction -> why the policy cannot be told it
RESET_REPLY = "reset successful"  # a text frame, as RoboArena's server answers


class ObservationError(ValueError):
    """An observation that cannot be used; the message lists every problem and the legal keys."""


@runtime_checkable
class Policy(Protocol):
    """Observation -> actions, with the history in an explicit session.

    All calls come from one thread, so a policy needs no locks.

    Attributes:
        metadata: sent to every client on connection; JSON-like values only (model, checkpoint,
            cameras -> observation key, chunk, action_dim, hz, dataset, needs_proprio, ...).
    """

    metadata: dict[str, Any]

    def warmup(self) -> None:
        """Compile everything `infer` needs; the port is bound only after this returns."""
        ...

    def new_session(self) -> Any:
        """An empty history; any object, held by the server and handed back to `infer`."""
        ...

    def check(self, obs: dict[str, Any]) -> None:
        """Raise `ObservationError`, naming all problems at once, if `obs` cannot be used."""
        ...

    def infer(self, session: Any, obs: dict[str, Any]) -> tuple[dict[str, Any], Any]:
        """One control step.

        Args:
            session: from `new_session` or the previous `infer`.
            obs: a checked observation.

        Returns:
            ({"actions": float32 [f, a] in robot units, ...}, the next session).
        """
        ...


@runtime_checkable
class BatchPolicy(Policy, Protocol):
    """A policy that answers several sessions in one pass; the server looks for it.

    Attributes:
        max_batch: sessions in one pass; `warmup` has compiled for all sizes up to it.
    """

    max_batch: int

    def infer_many(
        self, sessions: Sequence[Any], observations: Sequence[dict[str, Any]]
    ) -> list[tuple[dict[str, Any], Any]]:
        """`infer` for at most `max_batch` distinct sessions, each answered as if alone."""
        ...
