"""Evaluate a policy server on the embedded tabletop world.

    python eval_servers/tabletop/rollout.py --server=ws://127.0.0.1:8000 --episodes=200 --out=DIR

Episodes go round-robin over the tasks, each with a seed of its own that no demonstration used.
`--swap-instructions` keeps every episode's task (its initial state and what counts as success) but
gives the policy another task's instruction: a policy that listens must fail.
Writes DIR/episodes.jsonl, DIR/score.json and DIR/videos; see `eval_servers/rollout.py`.
`launch/evaluate.py tabletop` also starts the server and writes the report.
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Set

import numpy as np
import PIL

if __package__ in (None, ""):  # run as a script: make the repository importable, uninstalled
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from eval_servers import cli, rollout
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
        self.gripper = {"closed": -1.0, "open": 1.0}
        self.arm_range = (-1.0, 1.0)
        self._env = TabletopEnv(image_size=image_size)
        self._task = ""
        self._start: Dict[str, Any] = {}

    def reset(self, episode: rollout.Episode) -> Dict[str, Any]:
        """Blocks, tool, slider and lamp of the episode's seed, made possible for its task."""
        obs = self._env.reset(episode.seed, episode.task)
        self._task, self._start = episode.task, self._env.get_info()
        return _observation(obs)

    def step(self, action: np.ndarray) -> None:
        """One control step; action float [7], gripper +1 = open, -1 = closed."""
        try:
            self._env.act(action)
        # The wrong shape or gripper command would recur at every step, so the run ends.
        except ValueError as error:
            raise rollout.ActionError(
                "the policy does not fit the tabletop: {}".format(error)
            ) from None

    def observe(self, keys: Optional[Set[str]] = None) -> Dict[str, Any]:
        """Both pictures and the state."""
        return _observation(self._env.get_obs())

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
    # Drawn only now, as most episodes never become a film.
    frames = [np.concatenate([render(i, view, FRAME) for view in views], axis=1) for i in infos]
    save_video(path, frames)


def make_episodes(
    names: Sequence[str], count: int, seed0: int, swap_instructions: bool
) -> List[rollout.Episode]:
    """`count` episodes round-robin over the tasks, seeds from `seed0` upwards.

    Raises:
        ValueError: if there is no such task, or too few to swap instructions among.
    """
    swapped = rollout.other_instructions(names) if swap_instructions else {}
    episodes = []
    for index in range(count):
        task = names[index % len(names)]
        instruction = tasks.instruction(swapped.get(task, task))
        episodes.append(rollout.Episode(index, seed0 + index, task, instruction))
    return episodes


def main(arguments: Sequence[str]) -> int:
    """Run the evaluation; returns the exit status."""
    return cli.main(_parse_flags(arguments), _prepare)


def _prepare(flags: argparse.Namespace) -> cli.Evaluation:
    names = flags.tasks or list(tasks.TASKS)
    episodes = make_episodes(names, flags.episodes, flags.seed0, flags.swap_instructions)
    cli.check_instructions(flags, episodes)
    protocol = {
        "environment": "tabletop",
        "profile": "default",
        "tasks": names,
        "swap_instructions": flags.swap_instructions,
        "image_size": flags.image_size,
        "simulator": {
            "renderer": "tabletop.render",
            "driver": "numpy and Pillow, on the CPU",
            "versions": {"numpy": np.__version__, "pillow": PIL.__version__},
        },
    }
    make_env = functools.partial(TabletopRollout, flags.image_size)
    return cli.Evaluation(make_env, episodes, protocol, _film)


def _parse_flags(arguments: Sequence[str]) -> argparse.Namespace:
    parser = cli.make_parser(__doc__, tasks.HORIZON)
    add = parser.add_argument
    add("--episodes", type=cli.positive, default=200, metavar="N", help="in all (default: 200)")
    add("--seed0", type=int, default=SEED0, metavar="N", help="first seed (default: %(default)s)")
    add(
        "--tasks",
        nargs="+",
        choices=tasks.TASKS,
        metavar="TASK",
        help="only these (default: all): " + ", ".join(tasks.TASKS),
    )
    add(
        "--image-size",
        type=cli.positive,
        default=64,
        metavar="PX",
        help="of both cameras, as in the training data (default: 64)",
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
