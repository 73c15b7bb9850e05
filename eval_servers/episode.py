"""One episode: what a simulator's adapter offers, and the loop between it and the policy."""

from __future__ import annotations

import abc
import contextlib
import hashlib
import logging
import time
from dataclasses import dataclass
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Set, Tuple, Union

import numpy as np

from eval_servers.async_chunks import AsyncChunks, Overlap
from eval_servers.client import ActionChunks, PolicyServerError, SessionLostError
from eval_servers.row import Outcome, Row

log = logging.getLogger(__name__)

MAX_RESTARTS = 3  # of one episode whose connection dropped

# What replays a policy's chunks.
Chunks = Union[ActionChunks, AsyncChunks]
# (env, client, chunks, episode, max_steps, frames) -> how it ended; the env is reset already.
Attempt = Callable[[Any, Any, Chunks, Any, int, Optional[List[Any]]], Outcome]


class ActionError(ValueError):
    """The policy's actions do not fit the robot; trying again would not help."""


@dataclass(frozen=True)
class Episode:
    """One trial: where it starts (seed), what counts as success (task), what the policy is told."""

    index: int
    seed: int
    task: str
    instruction: str


class Env(abc.ABC):
    """The interface that a simulator's adapter provides.

    Attributes:
        gripper: the commands it takes, {"closed": -1, "open": 1}; None where it does not say.
        arm_range: (lowest, highest) number it takes for an arm dimension, None likewise.
    """

    gripper: Optional[Dict[str, float]] = None
    arm_range: Optional[Tuple[float, float]] = None

    @abc.abstractmethod
    def reset(self, episode: Episode) -> Dict[str, Any]:
        """Set the episode up; returns the observation, with openpi's keys, without the prompt."""

    def told(self, episode: Any) -> str:
        """Return the first instruction; some simulators alone know it, after `reset`."""
        return episode.instruction

    @abc.abstractmethod
    def step(self, action: np.ndarray) -> None:
        """Apply one action, float [a] in robot units.

        Raises:
            ActionError: if the robot cannot take such an action; ends the evaluation.
        """

    @abc.abstractmethod
    def observe(self, keys: Optional[Set[str]] = None) -> Dict[str, Any]:
        """The observation after the last step, as `reset` returns it.

        Only asked for when the policy is: drawing may cost many times what a step does.

        Args:
            keys: what the policy takes, None if it does not say; others need not be there.
        """

    @abc.abstractmethod
    def success(self) -> bool:
        """Whether the task is solved now."""

    @abc.abstractmethod
    def frame(self) -> Any:
        """What `save_video` makes a picture of: uint8 [h, w, 3], or a state to draw later."""

    def close(self) -> None:  # noqa: B027 - not every simulator holds something
        """Let go of the simulator."""


def run_episode(
    env: Any,
    client: Any,
    episode: Episode,
    max_steps: int,
    execute_steps: int = 1,
    frames: Optional[List[Any]] = None,
    attempt: Optional[Attempt] = None,
    overlap: Optional[Overlap] = None,
) -> Row:
    """Run one episode to success or `max_steps`; starts over if the connection drops.

    Args:
        env: adapter, see `Env`.
        client: `PolicyClient`.
        episode: what to run.
        max_steps: actions before it counts as failed.
        execute_steps: actions of a chunk to execute before asking again.
        frames: filled with `env.frame()` of every step, if given.
        attempt: one try at the episode, of simulators whose episodes are more than one task.
        overlap: ask for the next chunk while the last one is executed, `execute_steps` actions
            after the request before.

    Raises:
        PolicyServerError: the server refuses the observation or stays away.
    """
    watched = _Watched(env)
    start, restarts = time.monotonic(), 0
    while True:
        # Made anew at every try, so that actions and timings of a broken one do not count.
        chunks = make_chunks(client, execute_steps, overlap)
        watched.reset(episode)
        if frames is not None:
            # Replaced in place: the caller holds the list, and a restart must not keep old frames.
            frames[:] = [watched.frame()]
        try:
            # Closed before the connection is used again: an answer may still be on its way.
            with contextlib.closing(chunks):
                outcome = (attempt or _attempt)(watched, client, chunks, episode, max_steps, frames)
            break
        # A policy with a history cannot go on in the middle of an episode, so it starts over.
        except SessionLostError as error:
            restarts += 1
            if restarts > MAX_RESTARTS:
                raise PolicyServerError(
                    "episode {} lost its connection {} times: {}".format(
                        episode.index, restarts, error
                    )
                ) from None
            log.warning("episode %d starts over: %s", episode.index, error)
    return Row.of(
        episode,
        outcome,
        seconds=round(time.monotonic() - start, 3),
        first_frame=watched.first_frame,
        # Microseconds are enough, and full floats would bloat the rows' file.
        round_trip_ms=[round(ms, 3) for ms in chunks.round_trip_ms],
        server_ms=[round(ms, 3) for ms in chunks.server_ms],
        jerk=jerk(watched.commands, bool(client.metadata.get("gripper"))),
        restarts=restarts,
    )


def make_chunks(client: Any, execute_steps: int, overlap: Optional[Overlap] = None) -> Chunks:
    """What replays a policy's chunks in an evaluation.

    Raises:
        ValueError: the settings do not fit the policy's chunk, see `AsyncChunks`.
    """
    if overlap is None:
        return ActionChunks(client, execute_steps)
    return AsyncChunks(client, execute_steps, overlap.mode, overlap.delay)


def jerk(commands: Sequence[np.ndarray], gripper: bool) -> Optional[float]:
    """Mean length of the second difference of commands [a]; None of fewer than three.

    Args:
        commands: of an episode, in order.
        gripper: whether the last number is a gripper's, which may jump.
    """
    if len(commands) < 3:
        return None
    arm = np.asarray(commands, np.float64)[:, : -1 if gripper else None]
    return float(np.linalg.norm(np.diff(arm, n=2, axis=0), axis=1).mean().round(6))


def control_steps(
    env: Any,
    client: Any,
    chunks: Chunks,
    instruction: str,
    max_steps: int,
    frames: Optional[List[Any]] = None,
) -> Iterator[int]:
    """Let the policy act, in a session of its own, from where the simulator stands.

    Every simulator's episodes are made of this loop; the caller looks after each step whether to
    go on. The simulator draws only for the steps at which the policy is asked.

    Args:
        env: adapter, see `Env`.
        client: `PolicyClient`.
        chunks: of this client; what is left of an earlier instruction's chunk is dropped.
        instruction: what the policy is told at every request.
        max_steps: actions after which it ends.
        frames: `env.frame()` of every step is appended, if given.

    Yields:
        The number of each step that was taken, from 1.

    Raises:
        SessionLostError, PolicyServerError: as `PolicyClient.infer`.
        ActionError: as `Env.step`.
    """
    chunks.reset()
    # Setting an episode up may keep this process from answering pings for a minute. A session that
    # was lost then is no loss: the new one's history is empty as well.
    with contextlib.suppress(SessionLostError):
        client.reset()

    def request() -> Dict[str, Any]:
        obs = env.observe(_keys(client.metadata))
        return dict(select(obs, client.metadata), prompt=instruction)

    for step in range(1, max_steps + 1):
        env.step(chunks.act(request))
        if frames is not None:
            frames.append(env.frame())
        yield step


def _attempt(
    env: Any,
    client: Any,
    chunks: Chunks,
    episode: Episode,
    max_steps: int,
    frames: Optional[List[Any]],
) -> Outcome:
    """One task, judged after every step."""
    for step in control_steps(env, client, chunks, env.told(episode), max_steps, frames):
        if env.success():
            return Outcome(success=True, steps=step)
    return Outcome(success=False, steps=max_steps)


class _Watched:
    """An adapter whose first observation leaves a hash behind, and is not drawn twice."""

    def __init__(self, env: Any) -> None:
        self._env, self.first_frame = env, ""
        self.commands: List[np.ndarray] = []
        self._first: Optional[Dict[str, Any]] = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._env, name)

    def reset(self, episode: Episode) -> Dict[str, Any]:
        obs = self._env.reset(episode)
        self.first_frame, self._first = hash_images(obs), obs
        self.commands = []
        return obs

    def observe(self, keys: Optional[Set[str]] = None) -> Dict[str, Any]:
        # Drawing may cost more than a step, and nothing has moved since the reset.
        return self._env.observe(keys) if self._first is None else self._first

    def step(self, action: np.ndarray) -> None:
        self._first = None
        self._env.step(action)
        self.commands.append(np.array(action))


def hash_images(obs: Dict[str, Any]) -> str:
    """16 hex digits of the SHA-256 of all images [h, w, 3] of an observation, names and shapes."""
    digest = hashlib.sha256()
    for key in sorted(obs):
        value = obs[key]
        # Only what was drawn is hashed: the robot's state may differ in its last bits.
        if isinstance(value, np.ndarray) and value.ndim == 3:
            # Names and shapes are hashed too: equal bytes of another layout are another picture.
            digest.update("{} {} {};".format(key, value.dtype.str, value.shape).encode())
            digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()[:16]


def select(obs: Dict[str, Any], metadata: Dict[str, Any]) -> Dict[str, Any]:
    """The part of an observation that the policy says it takes; all of it if it does not say."""
    keys = _keys(metadata)
    return obs if keys is None else {key: value for key, value in obs.items() if key in keys}


def _keys(metadata: Dict[str, Any]) -> Optional[Set[str]]:
    """Return the observation keys that the policy says it takes, None if it does not say."""
    cameras = metadata.get("cameras")
    # Other servers of this wire need not name their cameras, so they get everything.
    if not isinstance(cameras, dict):
        return None
    return {*cameras.values(), *(["observation/state"] if metadata.get("needs_proprio") else [])}
