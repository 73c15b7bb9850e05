"""Asks for the next chunk while the last one is executed, so that the robot never waits.

    chunks = AsyncChunks(client, execute_steps=8)
    action = chunks.act(observe)                       # at every control step

A request goes out every `execute_steps` control steps; until its answer is there the robot goes on
with the chunk it has, and then changes over to the action of the new chunk that is due. How the two
are made to meet:

    rtc     the server makes the new chunk agree with what is executed meanwhile (real-time
            chunking; `launch/serve.py --execute=rtc`). Of policies that cannot, and of servers that
            do not know of it, the two chunks are blended here.
    plain   nothing is done: the arm may jump at every change.

A simulator stands still while a policy computes, so there the delay is a number of steps that one
chooses; on a robot it is measured.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Callable, Deque, Dict, List, NamedTuple, Optional

import numpy as np

log = logging.getLogger(__name__)

MODES = ("rtc", "plain")
# Past delays of which the longest is expected next.
_REMEMBERED = 10


class Overlap(NamedTuple):
    """How an evaluation overlaps computing and executing; see `AsyncChunks`.

    Attributes:
        mode: of `MODES`.
        delay: control steps that every answer takes.
    """

    mode: str
    delay: int


class _Request(NamedTuple):
    """A request on its way: the actions that the robot goes on with, and the answer to come."""

    remaining: np.ndarray
    answer: "Future[Dict[str, Any]]"
    sent: float


class AsyncChunks:
    """In the place of `ActionChunks`, for chunks that are computed while others are executed.

    Attributes:
        round_trip_ms: milliseconds of every request, measured here.
        server_ms: of the same requests, the time inside the policy, as the server reports it.
        delays: of every change of chunks, control steps from the observation to the answer.
        waited: control steps at which there was no action left, and the robot had to wait.
        bounded: control steps at which an action was held back, because it would have made the arm
            jump.
    """

    def __init__(
        self,
        client: Any,
        execute_steps: int,
        mode: str = "rtc",
        delay: Optional[int] = None,
        max_step: Any = None,
    ) -> None:
        """Asks nothing yet.

        Args:
            client: `PolicyClient`.
            execute_steps: control steps from one request to the next; a chunk must last that long
                and its delay longer.
            mode: of `MODES`.
            delay: control steps that every answer takes; None measures it, for robots.
            max_step: robot units, of every number of an action; by how much an action may differ
                from the one before, where a new chunk does not meet the last one; 0 = without a
                bound. By default the server's own, if it states one.

        Raises:
            ValueError: if the mode is unknown, or the policy's chunk is too short.
        """
        chunk = client.metadata.get("chunk")
        problems = []
        if mode not in MODES:
            problems.append("mode {!r} is none of {}".format(mode, list(MODES)))
        if execute_steps < 1 or (chunk and execute_steps + (delay or 0) > chunk):
            problems.append(
                "execute steps {} and a delay of {} do not fit the policy's chunk of {}".format(
                    execute_steps, delay or 0, chunk
                )
            )
        if delay is not None and not 0 <= delay <= execute_steps:
            problems.append(
                "a delay of {} steps is not within 0..{}, the steps between two requests".format(
                    delay, execute_steps
                )
            )
        if problems:
            raise ValueError("asynchronous chunks: " + "; ".join(problems))
        self._client, self._execute_steps, self._delay = client, execute_steps, delay
        stated = client.metadata.get("rtc")
        self._server: Dict[str, Any] = stated if isinstance(stated, dict) else {}
        self._guides = mode == "rtc" and bool(self._server.get("guidance"))
        self._blends = mode == "rtc" and not self._guides
        bound = self._server.get("max_step") if max_step is None else max_step
        # The plain mode shows what happens without any smoothing, so no bound applies there.
        self._max_step = None if mode != "rtc" or bound is None else np.asarray(bound, float)
        # One thread: the connection takes one request at a time.
        self._thread = ThreadPoolExecutor(1, "next-chunk")
        self._past: Deque[int] = deque(maxlen=_REMEMBERED)
        self.round_trip_ms: List[float] = []
        self.server_ms: List[float] = []
        self.delays: List[int] = []
        self.waited = self.bounded = 0
        self._start()

    def _start(self) -> None:
        self._chunk: Optional[np.ndarray] = None
        self._next = 0  # of the chunk, the action that is due
        self._since = 0  # control steps since the last request's observation
        self._request: Optional[_Request] = None
        self._last: Optional[np.ndarray] = None  # the action before
        self._approaching = False  # whether a new chunk is being approached in bounded steps

    def reset(self) -> None:
        """Forget the episode so far; an answer that is still to come is waited for and dropped."""
        if self._request is not None:
            # Unlike `result` this does not raise: what went wrong with a dropped answer matters to
            # nobody.
            self._request.answer.exception()
        self._start()

    def act(self, observe: Callable[[], Dict[str, Any]]) -> np.ndarray:
        """The next action, float [a].

        Args:
            observe: gives the observation to send, with the prompt; called only when a request is
                due.

        Raises:
            SessionLostError, PolicyServerError: as `PolicyClient.infer`.
        """
        if self._chunk is None:
            # Nothing to go on with: an episode's first answer is waited for.
            self._ask(observe, np.zeros((0, 0)))
            self._change()
        elif self._request is None and self._since >= self._execute_steps:
            self._ask(observe, self._chunk[self._next :])
        if self._request is not None and self._has_come():
            self._change()
        assert self._chunk is not None
        if self._next >= len(self._chunk):
            self._wait()
        action = self._bounded(self._chunk[self._next])
        self._next += 1
        self._since += 1
        self._last = action
        return action

    def _ask(self, observe: Callable[[], Dict[str, Any]], remaining: np.ndarray) -> None:
        obs = observe()
        if self._guides and self._chunk is not None:
            # A copy, because the observation belongs to the caller.
            obs = dict(obs)
            obs[self._server["executed"]] = self._since
            obs[self._server["delay"]] = self._expected()
        self._since = 0
        self._request = _Request(
            remaining, self._thread.submit(self._client.infer, obs), time.perf_counter()
        )

    def _expected(self) -> int:
        """Control steps until the next answer: what was chosen, or the longest of late."""
        if self._delay is not None:
            return self._delay
        # The longest, since actions that are executed after the expected delay are none that the
        # server made the new chunk agree with.
        return max(self._past) if self._past else 0

    def _has_come(self) -> bool:
        assert self._request is not None
        if self._delay is None:
            return self._request.answer.done()
        # A simulator's clock is its control steps, so an answer that is there earlier is held back.
        return self._since >= self._delay

    def _wait(self) -> None:
        if self._request is None:
            raise ValueError(
                "asynchronous chunks: the policy's chunk ended before the next request was due"
            )
        self.waited += 1
        if self.waited == 1:
            log.warning(
                "the robot waits: an answer takes longer than the %d actions that are left of a"
                " chunk when it is asked for",
                len(self._request.remaining),
            )
        self._change()

    def _change(self) -> None:
        """Go on with the new chunk, from the action that is due now."""
        request = self._request
        assert request is not None
        reply = request.answer.result()
        self._request = None
        self.round_trip_ms.append((time.perf_counter() - request.sent) * 1e3)
        infer_ms = reply.get("server_timing", {}).get("infer_ms")
        if infer_ms is not None:
            self.server_ms.append(float(infer_ms))
        chunk = np.asarray(reply["actions"])
        # An answer that is later than its whole chunk still has one action that is nearest to being
        # due.
        delay = min(self._since, len(chunk) - 1)
        if self._chunk is not None:
            # An episode's first chunk stays out: it is waited for at a standstill, so its delay is
            # always 0.
            self.delays.append(self._since)
            self._past.append(self._since)
            self._approaching = True
        if self._blends and len(request.remaining):
            chunk = blend(request.remaining, chunk, delay, self._max_step)
        self._chunk, self._next = chunk, delay

    def _bounded(self, action: np.ndarray) -> np.ndarray:
        """The action, or a part of the way there where a new chunk does not meet the last one."""
        if self._max_step is None or self._last is None or not self._approaching:
            return action
        step = action - self._last
        # 0 marks a number without a bound, such as a gripper's command.
        limit = np.where(self._max_step > 0, self._max_step, np.inf)
        if (np.abs(step) <= limit).all():
            # Once met, the chunk is followed as it is: its own large steps are what the policy
            # wants.
            self._approaching = False
            return action
        self.bounded += 1
        if self.bounded == 1:
            log.warning(
                "the new chunk is up to %.3g away from the last one where it takes over, more than"
                " a step may be: the arm goes there in bounded steps",
                np.abs(step)[np.abs(step) > limit].max(),
            )
        return (self._last + np.clip(step, -limit, limit)).astype(action.dtype)

    def close(self) -> None:
        """Wait for an answer that is on its way, and drop it; the connection is free then."""
        self._thread.shutdown(wait=True)


def blend(
    remaining: np.ndarray, chunk: np.ndarray, delay: int, max_step: Optional[np.ndarray]
) -> np.ndarray:
    """A new chunk that leaves the last one gradually.

    Args:
        remaining: [n, a] of the last chunk, from the new one's observation on.
        chunk: [f, a] the new one.
        delay: actions that have been executed of `remaining`.
        max_step: 0 marks a command such as a gripper's, of which half is none: it changes in the
            middle of the way.

    Returns:
        [f, a]: `remaining` before the delay, the new chunk behind the end of `remaining`.
    """
    overlap = min(len(remaining), len(chunk))
    old = np.concatenate([remaining[:overlap], chunk[overlap:]])
    number = np.arange(len(chunk))
    # Falls in equal steps from 1 before the delay, and would be 0 at the end of the overlap.
    weight = np.clip(1.0 - (number - delay + 1) / (overlap - delay + 1.0), 0.0, 1.0)
    weight = np.where(number < overlap, weight, 0.0)[:, None]
    mixed = weight * old + (1.0 - weight) * chunk
    if max_step is not None:
        mixed = np.where(max_step > 0, mixed, np.where(weight > 0.5, old, chunk))
    return mixed.astype(chunk.dtype)
