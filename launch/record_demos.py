"""Record demonstrations of the scripted tabletop expert as an RLDS dataset.

    python launch/record_demos.py --out=runs/quickstart/data/tabletop/1.0.0 --episodes=1560

The dataset has CALVIN's features (spec `calvin`), so it trains with `data.datasets = ({"spec":
"calvin", "dir": OUT},)` and reads with plain TFDS (`tfds.builder_from_directory(OUT)`). Seeds
count up from 0; evaluation starts at 10000, so no evaluated scene was demonstrated.
"""

import argparse
import contextlib
import functools
import logging
import os
import sys
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: make the repository importable, uninstalled
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eval_servers.tabletop import tasks
from eval_servers.tabletop.expert import demonstrations
from vla_jax import progress, refusal
from vla_jax.commands import HelpFormatter
from vla_jax.data import features
from vla_jax.data.rlds.writer import RLDSWriter
from vla_jax.workers import in_order

VAL_EVERY = 25  # one episode in so many is held out
SHARE = 26  # episodes a worker makes at a time: every task twice


def record(out: str | Path, episodes: int, size: int, noise: float, workers: int) -> dict[str, int]:
    """Write a dataset; returns the episodes and steps of each split.

    Args:
        out: version folder to make.
        episodes: attempts; the rare one the expert fails is left out.
        size: pixels, height = width of both cameras.
        noise: of the executed actions, in action units; labels stay clean.
        workers: processes.

    Raises:
        FlagError: the folder is not empty, or cannot be made.
    """
    counts = {"train": 0, "val": 0, "steps": 0}
    with refusal.naming("--out"):
        dataset = RLDSWriter(out, "tabletop", _features(size), description=__doc__ or "")
    with (
        dataset as writer,
        contextlib.closing(_episodes(episodes, size, noise, workers)) as recorded,
    ):
        for number, episode in enumerate(recorded):
            split = "val" if number % VAL_EVERY == VAL_EVERY - 1 else "train"
            writer.write(split, episode)
            counts[split] += 1
            counts["steps"] += len(episode["steps"]["action"])
    return counts


def _features(size: int) -> dict[str, Any]:
    scalar = {"is_first": "bool", "is_last": "bool", "is_terminal": "bool"}
    scalar |= {"reward": "float32", "discount": "float32"}
    return {
        "steps": {
            "observation": {
                "rgb_static": features.image(size, size),
                "rgb_gripper": features.image(size, size),
                "robot_obs": features.tensor((15,)),
            },
            "action": features.tensor((7,)),
            "language_instruction": features.text(),
            **{name: features.tensor((), dtype) for name, dtype in scalar.items()},
        },
        "episode_metadata": {"task": features.text(), "seed": features.tensor((), "int32")},
    }


def _episodes(
    episodes: int, size: int, noise: float, workers: int
) -> Generator[dict[str, Any], None, None]:
    """Episodes in the order of their seeds, whatever the number of workers."""
    shares = [range(i, min(i + SHARE, episodes)) for i in range(0, episodes, SHARE)]
    work = functools.partial(_share, size=size, noise=noise)
    with (
        in_order(work, shares, workers) as results,
        progress.bar(total=episodes, desc="demonstrations", unit="episode") as bar,
    ):
        for seeds, recorded in zip(shares, results, strict=True):
            yield from recorded
            bar.update(len(seeds))


def _share(seeds: Sequence[int], size: int, noise: float) -> list[dict[str, Any]]:
    # Shares start at multiples of the number of tasks, so each goes through them in order.
    return list(demonstrations(seeds, tasks.TASKS, noise, image_size=size))


def main() -> None:
    """Parse flags and record."""
    refusal.quiet_interrupt()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "--out", required=True, help="version folder to make, e.g. data/tabletop/1.0.0"
    )
    parser.add_argument("--episodes", type=int, default=1560, help="default: %(default)s")
    parser.add_argument("--size", type=int, default=64, help="image side in pixels (default: 64)")
    parser.add_argument(
        "--noise", type=float, default=0.25, help="of the executed actions, in action units"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    refusal.add_flag(parser)
    flags = parser.parse_args()
    if min(flags.episodes, flags.size, flags.workers) < 1 or flags.noise < 0:
        parser.error("--episodes, --size and --workers: at least 1; --noise: not below 0")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        counts = record(flags.out, flags.episodes, flags.size, flags.noise, flags.workers)
    except refusal.CAUSED as error:
        sys.exit(refusal.tell(error, flags.debug))
    print(
        f"{flags.out}: {counts['train']} train and {counts['val']} val episodes, "
        f"{counts['steps']} steps"
    )


if __name__ == "__main__":
    main()
