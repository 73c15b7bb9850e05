"""Watch the scripted expert: write one episode as an animated GIF.

    python -m eval_servers.tabletop.demo --seed 0 --task place_red_left --out place.gif
    python -m eval_servers.tabletop.demo --list

The left half is the static camera, the right half the gripper's.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np

from eval_servers.tabletop import tasks
from eval_servers.tabletop.env import TabletopEnv
from eval_servers.tabletop.expert import Expert
from eval_servers.video import save_video


def film(seed: int, task: str, size: int) -> tuple[list[np.ndarray], bool]:
    """Frames uint8 [size, 2 * size, 3] of one expert episode, and whether it succeeded."""
    env, expert = TabletopEnv(size), Expert(task)
    obs = env.reset(seed, task)
    start = env.get_info()
    frames = [_frame(obs)]
    for _ in range(tasks.HORIZON):
        obs = env.step(expert.act(env))
        frames.append(_frame(obs))
        # Compared with the start, because an oracle judges the change and not the state.
        if tasks.solved(task, start, env.get_info()):
            return frames, True
    return frames, False


def _frame(obs):
    return np.concatenate([obs["rgb_static"], obs["rgb_gripper"]], axis=1)


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status (1 if the expert failed)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--task", default=tasks.TASKS[0], choices=tasks.TASKS, metavar="TASK")
    parser.add_argument("--out", default="tabletop.gif", help="file to write")
    parser.add_argument("--size", type=int, default=256, help="pixels a camera")
    parser.add_argument("--list", action="store_true", help="print the tasks and stop")
    args = parser.parse_args(argv)
    if args.list:
        for task in tasks.TASKS:
            print(f"{task:20s} {tasks.instruction(task)}")
        return 0
    frames, solved = film(args.seed, args.task, args.size)
    # Slower than other videos, so that the hand can be followed.
    save_video(args.out, frames, fps=8.0)
    outcome = "solved" if solved else "NOT solved"
    print(f"{args.out}: {tasks.instruction(args.task)!r}, {len(frames) - 1} steps, {outcome}")
    return 0 if solved else 1


if __name__ == "__main__":
    sys.exit(main())
