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
import platform
import random
import sys
import time
from dataclasses import dataclass, replace
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from eval_servers import lock, pool, results, wanted_videos
from eval_servers.async_chunks import Overlap
from eval_servers.client import PolicyClient, PolicyServerError
from eval_servers.episode import (
    ActionError,
    Attempt,
    Env,
    Episode,
    control_steps,
    make_chunks,
    run_episode,
    select,
)
from eval_servers.progress import Progress
from eval_servers.row import Outcome, Row, Stage

__all__ = [
    "ActionError",
    "Attempt",
    "Env",
    "Episode",
    "Options",
    "Outcome",
    "Row",
    "Stage",
    "check_imports",
    "control_steps",
    "evaluate",
    "other_instructions",
    "run_episode",
    "select",
]

log = logging.getLogger(__name__)

HEAVY = ("jax", "tensorflow", "torch")

SaveVideo = Callable[[str, List[Any]], None]  # (path of a .webp, what `Env.frame` returned)


@dataclass(frozen=True)
class Options:
    """Settings of a run of episodes.

    Attributes:
        server: ws://host:port of the policy; of several, with commas between, which must serve the
            same policy: workers are spread over them.
        max_steps: actions before an episode counts as failed.
        execute_steps: actions of a chunk to execute before asking again; 1 = re-plan every step.
        overlap: ask for the next chunk while the last one is executed; None waits for each.
        workers: simulator processes.
        videos: at most this many per task: the first success and the first failure.
        episode_timeout: seconds before a worker counts as hung.
        connect_timeout: seconds to wait for the server, at the start and whenever it has gone.
        resume: go on with a run that was interrupted, if it was the same; episodes lost to crashes
            are tried again.
    """

    server: str
    max_steps: int
    execute_steps: int = 1
    overlap: Optional[Overlap] = None
    workers: int = 1
    videos: int = 2
    episode_timeout: float = 600.0
    connect_timeout: float = 60.0
    resume: bool = False

    @property
    def servers(self) -> Tuple[str, ...]:
        """The addresses in `server`."""
        return tuple(part.strip() for part in self.server.split(",") if part.strip())


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
    # Shuffled, since neighbors in a list of tasks are often alike.
    random.Random(seed).shuffle(order)
    # Index -1 closes the cycle, so no task keeps its own instruction.
    following = {task: order[i - 1] for i, task in enumerate(order)}
    return {task: following[task] for task in names}


def check_imports() -> None:
    """Raise ImportError if a training framework found its way into this process."""
    imported = [name for name in HEAVY if name in sys.modules]
    if imported:
        raise ImportError(
            "a rollout process imported {}: simulators run without them".format(", ".join(imported))
        )


def evaluate(
    make_env: Callable[[], Any],
    episodes: Sequence[Episode],
    out_dir: str,
    options: Options,
    protocol: Dict[str, Any],
    save_video: Optional[SaveVideo] = None,
    attempt: Optional[Attempt] = None,
    conditions: Optional[Dict[str, Any]] = None,
    shard: Tuple[int, int] = (0, 1),
) -> Dict[str, Any]:
    """Run all episodes, each counted once, and write DIR; returns the score.

    Args:
        make_env: picklable; called once in every worker; gives an adapter (`Env`).
        episodes: with distinct indices.
        out_dir: DIR; must not hold another run.
        options: see `Options`.
        protocol: what the simulator wants on record (its name, version, task list, ...).
        save_video: (path, list of what `Env.frame` returned) -> None, picklable; no videos without.
        attempt: see `run_episode`; picklable.
        conditions: more to record of this run that is no part of the protocol.
        shard: (i, n): only every n-th episode, from the i-th; `results.merge` puts n such runs
            together.

    Raises:
        PolicyServerError: the server is away.
        pool.PoolError: workers cannot go on: refused observations or actions, endless crashes.
        results.ResultsError: DIR holds other results, another evaluation writes there, or it was
            removed meanwhile.
    """
    metadata = common_metadata(options)
    record = results.plain(
        dict(
            protocol,
            server=metadata,
            max_steps=options.max_steps,
            execute_steps=options.execute_steps,
            episodes=len(episodes),
            seeds=results.ranges(episode.seed for episode in episodes),
        )
    )
    make_handler = functools.partial(_Handler, make_env, options, metadata, save_video, attempt)
    videos_per_task = options.videos if save_video else 0
    # Only where it was asked for: runs of earlier versions have no such key.
    if options.overlap:
        record["overlap"] = dict(options.overlap._asdict())
    with lock.held(out_dir, results.ResultsError):
        return _evaluate(
            make_handler, episodes, out_dir, options, record, videos_per_task, conditions, shard
        )


def _evaluate(
    make_handler: Callable[[int], Any],
    episodes: Sequence[Episode],
    out_dir: str,
    options: Options,
    record: Dict[str, Any],
    videos_per_task: int,
    conditions: Optional[Dict[str, Any]],
    shard: Tuple[int, int],
) -> Dict[str, Any]:
    """`evaluate` in a folder that is ours."""
    earlier = results.open_run(out_dir, record, options.resume)
    # Crashed episodes are dropped, so a resumed run tries them again.
    rows = [row for row in earlier if not row.error]
    done = {row.index for row in rows}
    assigned = episodes[shard[0] :: shard[1]]
    todo = [episode for episode in assigned if episode.index not in done]
    # The file must hold one row an episode before new rows are appended.
    results.replace_rows(os.path.join(out_dir, results.EPISODES), rows)
    wanted = wanted_videos.WantedVideos(out_dir, videos_per_task, rows)
    progress = Progress(len(assigned), len(rows), sum(row.success for row in rows))
    started = _utc()

    def prepare(episode: Episode) -> _Job:
        kinds = wanted.wanted(episode.task)
        return _Job(episode, kinds, wanted.path(episode.index, episode.task))

    with open(os.path.join(out_dir, results.EPISODES), "a", encoding="utf-8") as log_file, progress:
        for episode, outcome in pool.run(
            make_handler,
            todo,
            prepare,
            options.workers,
            # An episode may have to wait for a server that is coming up again.
            options.episode_timeout + options.connect_timeout,
            fatal=(PolicyServerError, ActionError, ImportError),
        ):
            if isinstance(outcome, pool.Crash):
                died = "the simulator's process died on {} tries: {}"
                outcome = Row.crashed(episode, died.format(pool.MAX_TRIES, outcome.reason))
            row = wanted.settle(outcome)
            log_file.write(json.dumps(row.to_json()) + "\n")
            # A killed run then loses the episodes in flight, not those that are done.
            log_file.flush()
            # Rows in a file that has no name any more are lost: better to stop than to go on.
            if not os.fstat(log_file.fileno()).st_nlink:
                raise results.ResultsError(
                    "{} was removed while the evaluation was writing there; {} of {} episodes were "
                    "done".format(out_dir, len(rows) + 1, len(assigned))
                )
            rows.append(row)
            progress.add(row.success, bool(row.error))
    ours = dict(_machine(), workers=options.workers, started=started, finished=_utc())
    if shard[1] > 1:
        ours["shard"] = "{}/{}".format(*shard)
    score = results.summarize(rows, record, {**ours, **(conditions or {})})
    results.write_score(os.path.join(out_dir, results.SCORE), score)
    return score


def common_metadata(options: Options) -> Dict[str, Any]:
    """Return the metadata of the policy, which all servers of the options must share.

    Raises:
        PolicyServerError: one is away, or they differ.
        ValueError: `execute_steps` is beyond the chunk.
    """
    common: Dict[str, Any] = {}
    for uri in options.servers:
        with PolicyClient(uri, options.connect_timeout) as client:
            # Built only for its check of `execute_steps` against the chunk, before workers start.
            make_chunks(client, options.execute_steps, options.overlap)
            metadata = results.plain(client.metadata)
        if common and metadata != common:
            raise PolicyServerError(
                "{} and {} serve different policies".format(options.servers[0], uri)
            )
        common = metadata
    if not options.servers:
        raise PolicyServerError("no server was named; write it as ws://host:port")
    return common


def unfit_instructions(options: Options, episodes: Sequence[Episode]) -> Dict[str, str]:
    """Return the instructions of these episodes that do not fit the policy, each with the reason.

    What a simulator alone knows before its episode begins cannot be checked.

    Raises:
        PolicyServerError: as `common_metadata`.
    """
    common_metadata(options)
    instructions = {
        text for e in episodes for text in (e.instruction, *getattr(e, "instructions", ()))
    }
    with PolicyClient(options.servers[0], options.connect_timeout) as client:
        return client.unfit(instructions - {""})


def _utc() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _machine() -> Dict[str, Any]:
    return {
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "numpy": np.__version__,
    }


class _Job(NamedTuple):
    """Message to a worker: the episode, which outcomes are worth a video, and its path."""

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
        attempt: Optional[Attempt],
        number: int,
    ) -> None:
        self._options, self._save_video, self._attempt = options, save_video, attempt
        uri = options.servers[number % len(options.servers)]
        self._client = PolicyClient(uri, options.connect_timeout)
        # A worker may start hours after the first one did.
        if results.plain(self._client.metadata) != metadata:
            raise PolicyServerError("{} changed its policy during the evaluation".format(uri))
        self._env = make_env()

    def __call__(self, job: _Job) -> Row:
        options = self._options
        # Frames take memory and time, so they are kept only where a film is still wanted.
        frames: Optional[List[Any]] = [] if job.wanted else None
        row = run_episode(
            self._env,
            self._client,
            job.episode,
            options.max_steps,
            options.execute_steps,
            frames,
            self._attempt,
            options.overlap,
        )
        if self._save_video and frames and row.result in job.wanted:
            try:
                os.makedirs(os.path.dirname(job.video_path), exist_ok=True)
                self._save_video(job.video_path, frames)
                row = replace(row, video=job.video_path)
            except OSError as error:  # a film is no reason to lose the episode
                log.warning("no video of episode %d: %s", job.episode.index, error)
        return row

    def close(self) -> None:
        self._client.close()
        self._env.close()
        check_imports()
