"""Speed of the tabletop world and how well its expert does, on one core.

    python bench/tabletop.py --seeds 200

Prints frames (static and gripper count separately) and control steps a CPU-second, then success,
mean and longest episode of the expert for every task, without and with exploration noise.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from eval_servers.tabletop import tasks
from eval_servers.tabletop.expert import Expert, demonstrations
from eval_servers.tabletop.world import World


def frames_per_second(episodes: int, size: int) -> float:
    """Frames a CPU-second while recording demonstrations, physics and expert included."""
    begin = time.process_time()
    steps = sum(len(e["steps"]["action"]) for e in demonstrations(range(episodes), image_size=size))
    return 2 * steps / (time.process_time() - begin)


def attempt(task: str, seed: int, noise: float) -> int | None:
    """Control steps the expert needs, None if it does not finish in time."""
    rng = np.random.RandomState(seed)
    world, expert = World(tasks.initial_conditions(task, rng)), Expert(task)
    start = world.get_info()
    for step in range(1, tasks.HORIZON + 1):
        action = expert.act(world)
        action[[0, 1, 2, 5]] += noise * rng.normal(size=4)
        world.step(action)
        if tasks.solved(task, start, world.get_info()):
            return step
    return None


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=50, help="episodes a task")
    parser.add_argument("--noise", type=float, default=0.25, help="std in action units")
    args = parser.parse_args()
    for size in (64, 128, 224):
        print(f"{size:4d} px: {frames_per_second(26, size):6.0f} frames a CPU-second")
    begin, total = time.process_time(), 0
    print(f"{'task':20s} {'expert':>22s} {f'with noise {args.noise}':>22s}")
    for task in tasks.TASKS:
        cells = []
        for noise in (0.0, args.noise):
            lengths = [attempt(task, seed, noise) for seed in range(args.seeds)]
            done = [n for n in lengths if n is not None]
            total += sum(done) + tasks.HORIZON * (len(lengths) - len(done))
            mean = np.mean(done) if done else float("nan")
            cells.append(f"{len(done)}/{len(lengths)}, {mean:.1f} (<= {max(done, default=0)})")
        print(f"{task:20s} {cells[0]:>22s} {cells[1]:>22s}")
    print(f"{total / (time.process_time() - begin):.0f} control steps a CPU-second without pixels")


if __name__ == "__main__":
    main()
