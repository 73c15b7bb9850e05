"""Requests of many sessions -> batches of one policy -> each session's own reply.

The device is one, so the policy runs in one worker thread and the event loop stays free. While a
batch is computed, requests pile up and form the next one. Beyond that a request waits, `max_wait`
at most, only for sessions that are due: those whose habit (the pause between their last reply and
the request after it) says that they ask within that time. A lone client, and one among others that
are idle or slow, waits for nobody.
"""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vla_jax.inference.protocol import (
    ACTIONS_KEY,
    TIMING_KEY,
    BatchPolicy,
    ObservationError,
    Policy,
)
from vla_jax.inference.robot_keys import RobotKeys
from vla_jax.serve.episodes import AUTO, Course, Episodes
from vla_jax.serve.metrics import Metrics

log = logging.getLogger(__name__)


class PolicyFailedError(RuntimeError):
    """The policy raised, or its actions cannot be sent; the message goes to the client."""


class ShuttingDownError(RuntimeError):
    """The server ends before the request could be answered."""


@dataclass(eq=False)
class Seat:
    """One client's episode, and its habit."""

    session: Any = None  # None: the policy is asked for a new one
    course: Course = field(default_factory=Course)
    replied: float = -math.inf  # perf_counter() seconds
    pause: float = math.inf  # seconds between the last reply and the request after it
    waiting: bool = False

    def reset(self) -> None:
        """Forget the episode, as the client asks."""
        self.session, self.course.says = None, True
        self.course.begin()

    def due(self, earliest: float, latest: float) -> bool:
        """Whether its next request is expected between these times."""
        return not self.waiting and earliest < self.replied + self.pause < latest


@dataclass(eq=False)
class _Ticket:
    seat: Seat
    obs: dict[str, Any]
    arrived: float
    outcome: asyncio.Future[dict[str, Any]]


class Engine:
    """One policy and the queue before it; all methods belong to one event loop.

    Attributes:
        episodes: says when one begins.
        metrics: counted here and by the transports.
        seats: of the clients that hold a history.
    """

    def __init__(self, policy: Policy, max_wait: float, new_episode: str = AUTO) -> None:
        """Serve `policy`.

        Args:
            policy: to ask.
            max_wait: seconds, see the module.
            new_episode: the rule for clients that do not say so, see `episodes.Episodes`.
        """
        self._keys = getattr(policy, "keys", None) or RobotKeys()
        self.episodes = Episodes(new_episode, _remembers(policy.metadata))
        self.metrics = Metrics()
        self.seats: set[Seat] = set()
        self._policy, self._max_wait = policy, max_wait
        self._batched = policy if isinstance(policy, BatchPolicy) else None
        self._limit = self._batched.max_batch if self._batched else 1
        self._queue: list[_Ticket] = []
        self._batch: list[_Ticket] = []  # being computed
        self._arrival = asyncio.Event()
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="policy")

    @property
    def metadata(self) -> dict[str, Any]:
        """The policy's metadata."""
        return self._policy.metadata

    @property
    def waiting(self) -> int:
        """Requests that are in no batch yet."""
        return len(self._queue)

    async def warmup(self) -> None:
        """Compile; raises whatever the policy raises."""
        await self._call(self._policy.warmup)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Answers requests for the length of the block."""
        dispatcher = asyncio.create_task(self._dispatch(), name="dispatcher")
        try:
            yield
        finally:
            dispatcher.cancel()
            # The dispatcher must have ended before those that wait are told so.
            await asyncio.gather(dispatcher, return_exceptions=True)
            self.abandon()

    def abandon(self) -> None:
        """Tell every request that waits that it will not be answered any more."""
        for ticket in [*self._batch, *self._queue]:
            if not ticket.outcome.done():
                ticket.outcome.set_exception(ShuttingDownError("the server is shutting down"))
        self._queue = []

    def close(self) -> None:
        """Let go of the worker thread; what it computes is not waited for."""
        self._worker.shutdown(wait=False, cancel_futures=True)

    async def act(
        self, seat: Seat, obs: dict[str, Any], episode: str | None = None
    ) -> dict[str, Any]:
        """The policy's reply to one observation of this seat, which has no other one waiting.

        Args:
            seat: of the client.
            obs: as the client sends it.
            episode: name of the episode, where the client gives one.

        Raises:
            ObservationError: the policy does not take it; the seat keeps its history.
            PolicyFailedError: the policy failed on it.
            ShuttingDownError: the server ends before that.
        """
        arrived = time.perf_counter()
        seat.pause, seat.waiting = arrived - seat.replied, True
        # State is looked at even where the policy takes none: it says where the robot is.
        shown = self._keys.standardize(obs, state_dim=1)
        if self.episodes.begins(seat.course, shown, episode, seat.pause):
            seat.session = None
        ticket = _Ticket(seat, obs, arrived, asyncio.get_running_loop().create_future())
        self._queue.append(ticket)
        self._arrival.set()
        try:
            reply = await ticket.outcome
        finally:
            # Also after a failure: a seat that stays waiting is never due and never given back.
            seat.replied, seat.waiting = time.perf_counter(), False
        self.metrics.request_seconds.observe(seat.replied - arrived)
        return reply

    async def unfit(self, instructions: Sequence[str]) -> dict[str, str]:
        """Those of some instructions that the policy cannot be told, each with the reason."""
        check = getattr(self._policy, "check_instruction", None)
        # A policy that cannot say so takes any, or refuses at its first request.
        if check is None:
            return {}
        reasons = await self._call(lambda: [check(text) for text in instructions])
        return {text: why for text, why in zip(instructions, reasons, strict=True) if why}

    async def _dispatch(self) -> None:
        while True:
            await self._arrival.wait()
            await self._gather()
            batch, self._queue = self._queue[: self._limit], self._queue[self._limit :]
            # `abandon` must reach the requests that are being computed, too.
            self._batch = batch
            # Those beyond the limit must not wait for one more arrival.
            if not self._queue:
                self._arrival.clear()
            else:
                self._arrival.set()
            asked = [(ticket.seat.session, ticket.obs) for ticket in batch]
            begin = time.perf_counter()
            outcomes = await self._call(self._run, asked)
            seconds = time.perf_counter() - begin
            self.metrics.batch_size.observe(float(len(batch)))
            self.metrics.infer_seconds.observe(seconds)
            for ticket, outcome in zip(batch, outcomes, strict=True):
                timing = {
                    "infer_ms": seconds * 1e3,
                    "queue_ms": (begin - ticket.arrived) * 1e3,
                    "batch": len(batch),
                }
                self._settle(ticket, outcome, timing)

    async def _gather(self) -> None:
        """Return when the batch is full, nobody else is due, or the first has waited enough."""
        deadline = self._queue[0].arrived + self._max_wait
        while len(self._queue) < self._limit:
            clock = time.perf_counter()
            # One that is late is given as long again as it may be early.
            if clock >= deadline or not any(
                seat.due(clock - self._max_wait, deadline) for seat in self.seats
            ):
                return
            self._arrival.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._arrival.wait(), deadline - clock)

    def _settle(self, ticket: _Ticket, outcome: Any, timing: dict[str, Any]) -> None:
        if ticket.outcome.done():  # the client's task was cancelled
            return
        if isinstance(outcome, Exception):
            ticket.outcome.set_exception(outcome)
            return
        # Only an answer moves the episode on; after an error the client may ask again.
        reply, ticket.seat.session = outcome
        ticket.outcome.set_result({**reply, TIMING_KEY: timing})

    def _run(self, asked: list[tuple[Any, dict[str, Any]]]) -> list[Any]:
        """In the worker thread: for each request (reply, next session), or what went wrong."""
        outcomes: list[Any] = [None] * len(asked)
        ready: list[tuple[int, Any, dict[str, Any]]] = []
        for i, (session, obs) in enumerate(asked):
            try:
                # A bad observation is refused here, before it can spoil the others' batch.
                self._policy.check(obs)
                ready.append((i, self._policy.new_session() if session is None else session, obs))
            except Exception as error:
                outcomes[i] = _explained(error)
        if len(ready) > 1 and self._batched is not None:
            _, sessions, observations = zip(*ready, strict=True)
            try:
                results = self._batched.infer_many(sessions, observations)
                for (i, _, _), result in zip(ready, results, strict=True):
                    outcomes[i] = _checked(result)
                return outcomes
            except Exception:  # one of them may be to blame: the others get their answers
                log.exception("a batch of %d failed; answering one at a time", len(ready))
        for i, session, obs in ready:
            try:
                outcomes[i] = _checked(self._policy.infer(session, obs))
            except Exception as error:
                outcomes[i] = _explained(error)
        return outcomes

    async def _call(self, function: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._worker, function, *args)


def _remembers(metadata: Mapping[str, Any]) -> bool:
    """Whether actions depend on earlier requests: those of another episode would spoil them."""
    return metadata.get("window", 1) > 1 or metadata.get("execution") in (
        "ensemble",
        "receding",
        "rtc",
    )


def _checked(result: tuple[dict[str, Any], Any]) -> Any:
    reply, session = result
    actions = np.asarray(reply[ACTIONS_KEY])
    # What a robot's driver makes of a NaN is anyone's guess.
    if not np.isfinite(actions).all():
        return PolicyFailedError("the actions are not finite; nothing was sent to the robot")
    return {**reply, ACTIONS_KEY: actions}, session


def _explained(error: Exception) -> Exception:
    if isinstance(error, ObservationError):
        return error
    # The client gets one line, the traceback stays here.
    log.error("inference failed", exc_info=error)
    kind = type(error).__name__
    return PolicyFailedError(f"the policy failed: {kind}: {error} (see the server's log)")
