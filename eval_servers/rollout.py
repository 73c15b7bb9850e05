"""The one episode loop, whatever the simulator: a policy server on one side, an env on the other.

A simulator brings an adapter (`Env`) and a list of episodes; `evaluate` shards them over processes,
survives crashes, keeps videos, and writes what `results.py` reads:

    DIR/protocol.json    what was evaluated and how
    DIR/episodes.jsonl   one row per episode, appended as it ends
    DIR/score.json       success rates with intervals
    DIR/videos/          the first success and the first failure of every task

No process of an evaluation may import jax, torch or tensorflow: simulators need Python and numpy
versions of their own. Every worker checks it before it leaves.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import random
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from eval_servers import pool, results
from eval_servers.client import ActionChunks, PolicyClient, PolicyServerError, SessionLostError
from eval_servers.progress import Progress

log = logging.getLogger(__name__)

HEAVY = ("jax", "tensorflow", "torch")
MAX_RESTARTS = 3  # of one episode whose connection dropped

SaveVideo = Callable[[str, List[Any]], None]  # (path of a .webp, what `Env.frame` returned)


class ActionError(ValueError):
    """The policy's actions do not fit the robot; trying again would not help."""


@dataclass(frozen=True)
class Episode:
    """One trial: where it starts (seed), what counts as success (task), what the policy is told."""

    index: int
    seed: int
    task: str
    instruction: str


class Env:
    """What a simulator's adapter provides; subclassing is optional, the names matter."""

    def reset(self, episode: Episode) -> Dict[str, Any]:
        """Set the episode up; returns the observation, with openpi's keys, without the prompt."""
        raise NotImplementedError

    def step(self, action: np.ndarray) -> Dict[str, Any]:
        """Apply one action, float [a] in robot units; returns the next observation.

        Raises:
            ActionError: if the robot cannot take such an action; ends the evaluation.
        """
        raise NotImplementedError

    def success(self) -> bool:
        """Whether the task is solved now."""
        raise NotImplementedError

    def frame(self) -> Any:
        """What `save_video` makes a picture of: uint8 [h, w, 3], or a state to draw later."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go of the simulator."""


@dataclass(frozen=True)
class Options:
    """How to run episodes.

    Attributes:
        server: ws://host:port of the policy.
        max_steps: actions before an episode counts as failed.
        execute_steps: actions of a chunk to execute before asking again; 1 = re-plan every step.
        workers: simulator processes.
        videos: at most this many per task: the first success and the first failure.
        episode_timeout: seconds before a worker counts as hung.
        connect_timeout: seconds to wait for the server.
        resume: go on with a run that was interrupted, if it was the same.
    """

    server: str
    max_steps: int
    execute_steps: int = 1
    workers: int = 1
    videos: int = 2
    episode_timeout: float = 600.0
    connect_timeout: float = 60.0
    resume: bool = False


def run_episode(
    env: Any,
    client: Any,
    episode: Episode,
    max_steps: int,
    execute_steps: int = 1,
    frames: Optional[List[Any]] = None,
) -> Dict[str, Any]:
    """Run one episode to success or `max_steps`; starts over if the connection drops.

    Args:
        env: adapter, see `Env`.
        client: `PolicyClient`.
        episode: what to run.
        max_steps: actions before it counts as failed.
        execute_steps: actions of a chunk to execute before asking again.
        frames: filled with `env.frame()` of every step, if given.

    Returns:
        Row: index, seed, task, instruction, success, steps, seconds, round_trip_ms, server_ms
        (one per request), restarts, error (None).

    Raises:
        PolicyServerError: the server refuses the observation or stays away.
    """
    chunks = ActionChunks(client, execute_steps)
    start, restarts = time.monotonic(), 0
    while True:
        try:
            success, steps = _attempt(env, client, chunks, episode, max_steps, frames)
            break
        except SessionLostError as error:
            restarts += 1
            if restarts > MAX_RESTARTS:
                raise PolicyServerError(
                    "episode {} lost its connection {} times: {}".format(
                        episode.index, restarts, error
                    )
                ) from None
            log.warning("episode %d starts over: %s", episode.index, error)
    return dict(
        asdict(episode),
        success=success,
        steps=steps,
        seconds=round(time.monotonic() - start, 3),
        round_trip_ms=[round(ms, 3) for ms in chunks.round_trip_ms],
        server_ms=[round(ms, 3) for ms in chunks.server_ms],
        restarts=restarts,
        error=None,
    )


def _attempt(
    env: Any,
    client: Any,
    chunks: ActionChunks,
    episode: Episode,
    max_steps: int,
    frames: Optional[List[Any]],
) -> Tuple[bool, int]:
    chunks.reset()
    client.reset()
    obs = env.reset(episode)
    if frames is not None:
        frames[:] = [env.frame()]
    for step in range(1, max_steps + 1):
        request = dict(select(obs, client.metadata), prompt=episode.instruction)
        obs = env.step(chunks.act(request))
        if frames is not None:
            frames.append(env.frame())
        if env.success():
            return True, step
    return False, max_steps


def select(obs: Dict[str, Any], metadata: Dict[str, Any]) -> Dict[str, Any]:
    """The part of an observation that the policy says it takes; all of it if it does not say."""
    cameras = metadata.get("cameras")
    if not isinstance(cameras, dict):
        return obs
    keep = set(cameras.values())
    if metadata.get("needs_proprio"):
        keep.add("observation/state")
    return {key: value for key, value in obs.items() if key in keep}


def other_instructions(tasks: Sequence[str], seed: int = 0) -> Dict[str, str]:
    """Task -> another task whose instruction it is given: a fixed cycle through all of `tasks`.

    A policy that reads its instruction must fail here; one that ignores it scores as before.

    Raises:
        ValueError: for fewer than two tasks.
    """
    names = list(dict.fromkeys(tasks))
    if len(names) < 2:
        raise ValueError("swapping instructions takes at least two tasks, not {}".format(names))
    order = list(names)
    random.Random(seed).shuffle(order)
    following = {task: order[i - 1] for i, task in enumerate(order)}
    return {task: following[task] for task in names}


def check_imports() -> None:
    """Raise ImportError if a training framework found its way into this process."""
    found = [name for name in HEAVY if name in sys.modules]
    if found:
        raise ImportError(
            "a rollout process imported {}: simulators run without them".format(", ".join(found))
        )


def evaluate(
    make_env: Callable[[], Any],
    episodes: Sequence[Episode],
    out_dir: str,
    options: Options,
    protocol: Dict[str, Any],
    save_video: Optional[SaveVideo] = None,
) -> Dict[str, Any]:
    """Run all episodes, each counted once, and write DIR; returns the score.

    Args:
        make_env: picklable; called once in every worker; gives an adapter (`Env`).
        episodes: with distinct indices.
        out_dir: DIR; must not hold another run.
        options: see `Options`.
        protocol: what the simulator wants on record (its name, version, task list, ...).
        save_video: (path, list of what `Env.frame` returned) -> None, picklable; no videos without.

    Raises:
        PolicyServerError: the server is away.
        pool.PoolError: workers cannot go on: refused observations or actions, endless crashes.
        results.ResultsError: DIR holds other results.
    """
    with PolicyClient(options.server, options.connect_timeout) as client:
        metadata = results.plain(client.metadata)
        ActionChunks(client, options.execute_steps)  # refuses a k beyond the chunk before spawning
    record = dict(
        protocol,
        server=metadata,
        max_steps=options.max_steps,
        execute_steps=options.execute_steps,
        episodes=len(episodes),
        seeds=[min(e.seed for e in episodes), max(e.seed for e in episodes)],
    )
    rows = results.open_run(out_dir, record, options.resume)
    done = {row["index"] for row in rows}
    todo = [episode for episode in episodes if episode.index not in done]
    films = _Films(out_dir, options.videos if save_video else 0, rows)
    make_handler = functools.partial(_Handler, make_env, options, metadata, save_video)
    progress = Progress(len(episodes), len(rows), sum(row["success"] for row in rows))
    with open(os.path.join(out_dir, results.EPISODES), "a", encoding="utf-8") as log_file, progress:
        for episode, outcome in pool.run(
            make_handler,
            todo,
            films.order,
            options.workers,
            options.episode_timeout,
            fatal=(PolicyServerError, ActionError, ImportError),
        ):
            if isinstance(outcome, pool.Crash):
                outcome = _crashed_row(episode, outcome.reason)
            row = films.settle(outcome)
            log_file.write(json.dumps(row) + "\n")
            log_file.flush()
            rows.append(row)
            progress.add(row["success"])
    score = results.summarize(rows, dict(record, workers=options.workers))
    results.write_score(os.path.join(out_dir, results.SCORE), score)
    return score


class _Job(NamedTuple):
    """What a worker is told: the episode, and which outcomes are worth a video, where."""

    episode: Episode
    wanted: Tuple[str, ...]
    video_path: str


class _Handler:
    """One worker's simulator and connection."""

    def __init__(
        self,
        make_env: Callable[[], Any],
        options: Options,
        metadata: Dict[str, Any],
        save_video: Optional[SaveVideo],
    ) -> None:
        self._options, self._save_video = options, save_video
        self._client = PolicyClient(options.server, options.connect_timeout)
        if results.plain(self._client.metadata) != metadata:
            raise PolicyServerError(
                "{} changed its policy during the evaluation".format(options.server)
            )
        self._env = make_env()

    def __call__(self, job: _Job) -> Dict[str, Any]:
        options = self._options
        frames: Optional[List[Any]] = [] if job.wanted else None
        row = run_episode(
            self._env, self._client, job.episode, options.max_steps, options.execute_steps, frames
        )
        if self._save_video and frames and _outcome(row) in job.wanted:
            os.makedirs(os.path.dirname(job.video_path), exist_ok=True)
            self._save_video(job.video_path, frames)
            row["video"] = job.video_path
        return row

    def close(self) -> None:
        self._client.close()
        self._env.close()
        check_imports()


class _Films:
    """Which videos are still wanted; a second one of a kind, from a parallel worker, is removed."""

    def __init__(self, out_dir: str, per_task: int, rows: List[Dict[str, Any]]) -> None:
        self._out_dir, self._per_task = out_dir, per_task
        self._have = {(row["task"], _outcome(row)) for row in rows if row.get("video")}

    def order(self, episode: Episode) -> _Job:
        have = [outcome for task, outcome in self._have if task == episode.task]
        missing = tuple(o for o in ("success", "failure") if o not in have)
        name = "{:04d}_{}.webp".format(episode.index, episode.task.replace(os.sep, "_"))
        path = os.path.join(self._out_dir, "videos", name)
        return _Job(episode, missing if len(have) < self._per_task else (), path)

    def settle(self, row: Dict[str, Any]) -> Dict[str, Any]:
        path = row.get("video")
        kind = (row["task"], _outcome(row))
        if path is None:
            return row
        count = sum(1 for task, _ in self._have if task == row["task"])
        if kind in self._have or count >= self._per_task:
            os.remove(path)
            return dict(row, video=None)
        self._have.add(kind)
        return dict(row, video=os.path.relpath(path, self._out_dir))


def _outcome(row: Dict[str, Any]) -> str:
    return "success" if row["success"] else "failure"


def _crashed_row(episode: Episode, reason: str) -> Dict[str, Any]:
    error = "the simulator's process died on {} tries: {}".format(pool.MAX_TRIES, reason)
    return dict(
        asdict(episode),
        success=False,
        steps=0,
        seconds=0.0,
        round_trip_ms=[],
        server_ms=[],
        restarts=0,
        error=error,
    )
