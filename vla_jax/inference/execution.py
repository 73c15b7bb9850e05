"""What of the predicted chunks is executed, and when the next one is asked for. numpy only.

Legend: f chunk · a action dimension · n actions of one reply
"""

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from vla_jax.inference.realtime import FORMS, Last

MODES = ("chunk", "first", "ensemble", "receding", "rtc")
LOST = ("error", "zero", "last")


@dataclass(frozen=True)
class Plan:
    """What an episode has left over from earlier chunks.

    Attributes:
        chunks: ensemble: those that still reach the present, oldest first.
        pending: receding: actions of the current chunk that are still to come.
        last: rtc: the last chunk.
    """

    chunks: tuple[Float[np.ndarray, "f a"], ...] = ()
    pending: Float[np.ndarray, "n a"] | None = None
    last: Last | None = None


@dataclass(frozen=True)
class Execution:
    """How a policy answers.

    Attributes:
        mode: chunk: the first `horizon` actions at once, which the client replays before it asks
            again. The others answer every control step with one action: first: the newest chunk's
            first, as RoboVLMs does; ensemble: the mean of what all chunks so far say of this step,
            the chunk of age i (oldest 0) weighing exp(-decay i) (temporal ensembling, Zhao et al.
            2023); receding: the first `horizon` of a chunk one after another, then a new chunk.
            rtc: whole chunks, each made to agree with what the client says it still executes of
            the last one (real-time chunking).
        horizon: actions used of a chunk; 0 = all.
        decay: see above; 0 = plain mean.
        guidance: rtc: how chunks are made to agree, a key of `realtime.FORMS`.
        lost: what is done when a model that writes its actions has written no chunk. error:
            nothing is sent; else the robot holds for a reply: zero: the arm's numbers are 0, right
            for actions that are motions; last: the last action again, right for positions.

    Raises:
        ValueError: listing what is illegal.
    """

    mode: str = "chunk"
    horizon: int = 0
    decay: float = 0.01
    guidance: str = "jacobian"
    lost: str = "error"

    def __post_init__(self):
        problems = []
        if self.mode not in MODES:
            problems.append(f"mode {self.mode!r} is none of {list(MODES)}")
        if self.lost not in LOST:
            problems.append(f"lost {self.lost!r} is none of {list(LOST)}")
        if self.horizon < 0:
            problems.append(f"horizon must not be negative, {self.horizon} is")
        if self.guidance not in FORMS:
            problems.append(f"guidance {self.guidance!r} is none of {list(FORMS)}")
        if self.horizon and self.mode in ("first", "ensemble", "rtc"):
            problems.append(f"horizon {self.horizon} has no meaning with {self.mode!r}")
        if self.decay < 0:
            problems.append(f"decay must not be negative, {self.decay} is")
        if problems:
            raise ValueError("execution: " + "; ".join(problems))

    def used(self, chunk: int) -> int:
        """Actions used of each chunk of that length.

        Raises:
            ValueError: the horizon is longer than the chunk.
        """
        if self.horizon > chunk:
            raise ValueError(f"execution: horizon {self.horizon} exceeds the chunk of {chunk}")
        return self.horizon or chunk

    def reply_length(self, chunk: int) -> int:
        """Actions of one reply; raises like `used`."""
        used = self.used(chunk)
        return used if self.mode in ("chunk", "rtc") else 1

    def hold(
        self,
        chunk: Float[np.ndarray, "f a"] | None,
        last: Float[np.ndarray, "a"] | None,
        length: int,
        gripper: bool,
    ) -> Float[np.ndarray, "n a"] | None:
        """Actions in place of a chunk that was lost; None where it was not, or is an error.

        Args:
            chunk: predicted at this step, NaN where the model has written none.
            last: action that was sent, in the robot's units.
            length: n.
            gripper: whether its last number is a gripper, which stays as it was told.
        """
        # Ahead of the first action there is nothing to hold, so that a loss is an error then too.
        if self.lost == "error" or last is None or chunk is None or not np.isnan(chunk).any():
            return None
        held = np.repeat(last[None], length, axis=0)
        if self.lost == "zero":
            # A gripper has no number that means standing still, so it is told the same again.
            held[:, : len(last) - gripper] = 0
        return held

    def needs_chunk(self, plan: Plan) -> bool:
        """Whether the next step cannot be answered from what is left."""
        return self.mode != "receding" or plan.pending is None or not len(plan.pending)

    def select(
        self, chunk: Float[np.ndarray, "f a"] | None, plan: Plan
    ) -> tuple[Float[np.ndarray, "n a"], Plan]:
        """The actions to execute now.

        Args:
            chunk: predicted at this step; not looked at unless `needs_chunk`.
            plan: of the episode.
        """
        if not self.needs_chunk(plan):
            left = np.asarray(plan.pending)
            return left[:1], replace(plan, pending=left[1:])
        if chunk is None:
            raise ValueError("execution: a new chunk is needed")
        used = self.used(len(chunk))
        if self.mode in ("chunk", "rtc"):
            return chunk[:used], plan
        if self.mode == "first":
            return chunk[:1], plan
        if self.mode == "receding":
            return chunk[:1], replace(plan, pending=chunk[1:used])
        # A chunk older than its own length says nothing of this step.
        chunks = (*plan.chunks, chunk)[-len(chunk) :]
        # The newest chunk speaks of this step first, the one before second, and so on.
        votes = np.stack([predicted[age] for age, predicted in enumerate(reversed(chunks))])[::-1]
        # The oldest vote comes first and weighs most.
        weights = np.exp(-self.decay * np.arange(len(votes)))
        mean = np.einsum("n,na->a", weights / weights.sum(), votes)[None]
        # The weights made float64 of it.
        return mean.astype(chunk.dtype), replace(plan, chunks=chunks)
