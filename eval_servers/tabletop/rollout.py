"""Evaluate a policy server on the embedded tabletop world.

    python eval_servers/tabletop/rollout.py --server=ws://127.0.0.1:8000 --episodes=200 --out=DIR

Episodes go round-robin over the tasks, each with a seed of its own that no demonstration used.
`--swap-instructions` keeps every episode's task (its initial state and what counts as success) but
gives the policy another task's instruction: a policy that listens must fail.
Writes DIR/episodes.jsonl, DIR/score.json and DIR/videos; see `eval_servers/rollout.py`.
"""

from __future__ import annotations

import argparse
import functools
import logging
import sys
from pathlib import Path
from typing import Any, Dict, List, Sequence

import numpy as np

if __package__ in (None, ""):  # run as a script: make the repository importable, uninstalled
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from eval_servers import pool, rollout
from eval_servers.client import PolicyServerError
from eval_servers.tabletop import tasks
from eval_servers.tabletop.env import TabletopEnv
from eval_servers.tabletop.render import render
from eval_servers.video import save_video

SEED0 = 10000  # demonstrations are made from seeds below
FRAME = 128  # pixels of each view in a video


class TabletopRollout(rollout.Env):
    """The world behind the interface of `eval_servers.rollout`, with openpi's observation keys."""

    def __init__(self, image_size: int) -> None:
        """Render both cameras at `image_size` pixels, which should be the training data's."""
        self._env = TabletopEnv(image_size=image_size)
        self._task = ""
        self._start: Dict[str, Any] = {}

    def reset(self, episode: rollout.Episode) -> Dict[str, Any]:
        """Blocks, tool, slider and lamp of the episode's seed, made possible for its task."""
        obs = self._env.reset(episode.seed, episode.task)
        self._task, self._start = episode.task, self._env.get_info()
        return _observation(obs)

    def step(self, action: np.ndarray) -> Dict[str, Any]:
        """One control step; action float [7], gripper +1 = open, -1 = closed."""
        try:
            return _observation(self._env.step(action))
        except ValueError as error:
            raise rollout.ActionError(
                "the policy does not fit the tabletop: {}".format(error)
            ) from None

    def success(self) -> bool:
        """Whether the oracle sees the episode's task done since its start."""
        return tasks.solved(self._task, self._start, self._env.get_info())

    def frame(self) -> Dict[str, Any]:
        """The state; `_film` draws it if the episode turns out to be worth a video."""
        return self._env.get_info()


def _observation(obs: Dict[str, Any]) -> Dict[str, Any]:
    return {
        "observation/image": obs["rgb_static"],
        "observation/wrist_image": obs["rgb_gripper"],
        "observation/state": np.asarray(obs["robot_obs"], np.float32),
    }


def _film(path: str, infos: List[Dict[str, Any]]) -> None:
    """Both views side by side at `FRAME` pixels, whatever size the policy sees."""
    views = ("static", "gripper")
    frames = [np.concatenate([render(i, view, FRAME) for view in views], axis=1) for i in infos]
    save_video(path, frames)


def make_episodes(
    names: Sequence[str], count: int, seed0: int, swap_instructions: bool
) -> List[rollout.Episode]:
    """`count` episodes round-robin over the tasks, seeds from `seed0` upwards.

    Raises:
        ValueError: if there is no such task, or too few to swap instructions among.
    """
    told = rollout.other_instructions(names) if swap_instructions else {}
    episodes = []
    for index in range(count):
        task = names[index % len(names)]
        instruction = tasks.instruction(told.get(task, task))
        episodes.append(rollout.Episode(index, seed0 + index, task, instruction))
    return episodes


def main(arguments: Sequence[str]) -> int:
    """Run the evaluation; returns the exit status."""
    flags = _parse_flags(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    options = rollout.Options(
        server=flags.server,
        max_steps=flags.max_steps,
        execute_steps=flags.execute_steps,
        workers=flags.workers,
        videos=flags.videos,
        connect_timeout=flags.connect_timeout,
        resume=flags.resume,
    )
    names = flags.tasks or list(tasks.TASKS)
    protocol = {
        "environment": "tabletop",
        "tasks": names,
        "swap_instructions": flags.swap_instructions,
        "image_size": flags.image_size,
    }
    try:
        score = rollout.evaluate(
            functools.partial(TabletopRollout, flags.image_size),
            make_episodes(names, flags.episodes, flags.seed0, flags.swap_instructions),
            flags.out,
            options,
            protocol,
            _film,
        )
        rollout.check_imports()
    except (PolicyServerError, pool.PoolError, OSError, ValueError) as error:
        print("rollout: {}".format(error), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nrollout: interrupted; --resume goes on from here", file=sys.stderr)
        return 130
    print(
        "success {success_rate:.1%} ({successes}/{episodes}, 95 % interval {wilson_low:.1%} to"
        " {wilson_high:.1%})".format(**score)
    )
    return 0


def _parse_flags(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--server", required=True, metavar="URI", help="ws://host:port of launch/serve.py")
    add("--out", required=True, metavar="DIR", help="folder for the results; must not hold others")
    add("--episodes", type=_positive, default=200, metavar="N", help="in all (default: 200)")
    add("--workers", type=_positive, default=2, metavar="N", help="processes (default: 2)")
    add("--seed0", type=int, default=SEED0, metavar="N", help="first seed (default: %(default)s)")
    add(
        "--tasks",
        nargs="+",
        choices=tasks.TASKS,
        metavar="TASK",
        help="only these (default: all): " + ", ".join(tasks.TASKS),
    )
    add(
        "--swap-instructions",
        action="store_true",
        help="tell the policy another task's instruction; success still counts on the own task",
    )
    add(
        "--max-steps",
        type=_positive,
        default=tasks.HORIZON,
        metavar="N",
        help="actions before an episode has failed (default: %(default)s)",
    )
    add(
        "--execute-steps",
        type=_positive,
        default=1,
        metavar="K",
        help="actions of a chunk to execute before asking again (default: 1, re-plan every step)",
    )
    add(
        "--image-size",
        type=_positive,
        default=64,
        metavar="PX",
        help="of both cameras, as in the training data (default: 64)",
    )
    add(
        "--videos",
        type=int,
        choices=(0, 1, 2),
        default=2,
        help="videos a task at most: its first success and its first failure (default: 2)",
    )
    add(
        "--connect-timeout",
        type=float,
        default=60.0,
        metavar="S",
        help="seconds to wait for the server (default: 60)",
    )
    add("--resume", action="store_true", help="finish an interrupted run of the same settings")
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
