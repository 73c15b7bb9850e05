"""Record demonstrations of the scripted expert, one .npz file an episode.

    python eval_servers/libero/record.py --out=DIR --suite=object --tasks 0 1 2 --episodes=50
    python launch/convert_data.py libero DIR data/libero_object_no_noops/1.0.0

Things start where LIBERO draws them, with seeds from 1000 upwards: not in the initial states that
evaluations use, which came from the same draws. What is recorded at a step is what an evaluation
would send then, and the expert's action without what is added to the one that is executed: noise,
and with --pushes a push now and then, so that there are ways back from further off.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import io
import json
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
from PIL import Image

if __package__ in (None, ""):  # run as a script: make the repository importable, uninstalled
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from eval_servers.libero import suites
from eval_servers.libero.expert import Expert, scripted
from eval_servers.libero.probe import add_flags, probe, settings_of
from eval_servers.libero.profiles import PROFILES
from eval_servers.libero.simulator import CAMERAS, Settings, Simulator, SimulatorError
from eval_servers.progress import Progress

SEED0 = 1000  # evaluations seed with less
RECORDING = "recording.json"  # written last: without it a folder is not whole
_SETTLE = PROFILES["openpi"].settle
_QUALITY = 95  # of JPEG, without chroma subsampling
_PUSH, _PUSHED = 1.5, 4  # the largest push in action units, and how many steps it takes


def demonstrate(
    world: Any, suite: str, number: int, seed: int, noise: float, pushes: float = 0.0
) -> Optional[Dict[str, Any]]:
    """One demonstration, or None if the expert failed.

    Args:
        world: a `Simulator`, to act in.
        suite: a plain one.
        number: of a task that `expert.scripted` lists.
        seed: of where everything starts, and of the noise.
        noise: standard deviation added to the executed motion, in action units.
        pushes: probability that a push begins at a step.

    Returns:
        state float32 [t, 8], joints [t, 7], action [t, 7] and for each camera a list of t JPEGs.
    """
    task, rng = suites.tasks(suite)[number], np.random.RandomState(seed)
    # Not from the shipped states: those are what evaluations start from.
    world.reset(suite, task.name, seed, 0, _SETTLE, shipped=False)
    script = Expert(task.instruction)
    rows: Dict[str, List[Any]] = {name: [] for name in ("state", "joints", "action", *CAMERAS)}
    push, pushed = np.zeros(3), _PUSHED
    for _ in range(suites.MAX_STEPS[suite]):
        action = script.act(world.scene())
        rows["state"].append(world.state())
        rows["joints"].append(world.joints())
        rows["action"].append(action)
        for camera in CAMERAS:
            rows[camera].append(_jpeg(world.draw(camera)))
        executed, pushed = action.copy(), pushed + 1
        # Nothing is drawn without pushes, so that a seed gives the same noise as it always did.
        if pushes and pushed >= _PUSHED and rng.uniform() < pushes:
            push, pushed = rng.uniform(-_PUSH, _PUSH, 3), 0
        moved = executed[:3] + rng.normal(0, noise, 3) + push * (pushed < _PUSHED)
        executed[:3] = np.clip(moved, -1, 1)
        world.step(executed)
        if world.solved():
            numbers = ("state", "joints", "action")
            return {**rows, **{name: np.array(rows[name], np.float32) for name in numbers}}
    return None


def record(
    settings: Settings, out: str, suite: str, numbers: Sequence[int], count: int, **how: Any
) -> Dict[str, int]:
    """Write `count` attempts at each task; returns how many demonstrations and steps there are.

    Args:
        settings: how to draw.
        out: a new folder.
        suite: a plain one.
        numbers: of its tasks.
        count: attempts at each.
        how: noise and pushes (see `demonstrate`), seed (of the first attempt at each task), workers
            (processes).

    Raises:
        SimulatorError: the simulator cannot be built, or the expert fails at most of its tasks.
        FileExistsError: `out` exists.
        ValueError: there is no script for a task.
    """
    unscripted = sorted(set(numbers) - set(scripted(suite)))
    if unscripted:
        with_script = scripted(suite)
        raise ValueError(
            "no script for tasks {} of {}, only {}".format(unscripted, suite, with_script)
        )
    work = os.path.abspath(out) + ".partial"
    for path in (out, work):
        if os.path.exists(path):
            raise FileExistsError("{} exists: name a new folder, or remove it".format(path))
    simulator = probe(settings, PROFILES["openpi"], suite, numbers[0])
    os.makedirs(work)
    counts = {"demonstrations": 0, "failed": 0, "steps": 0}
    seeds = range(how["seed"], how["seed"] + count)
    jobs = [(settings, suite, number, seed) for number in numbers for seed in seeds]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(how["workers"], mp_context=context) as pool:
        futures = [pool.submit(_job, *job, how["noise"], how["pushes"], work) for job in jobs]
        progress = Progress(len(jobs))
        try:
            for future in concurrent.futures.as_completed(futures):
                steps = future.result()
                progress.add(bool(steps))
                counts["demonstrations" if steps else "failed"] += 1
                counts["steps"] += steps
                # The 5 lets a short run survive an unlucky beginning.
                if counts["failed"] > 5 + counts["demonstrations"]:
                    raise SimulatorError("the expert fails at most of its tasks in this world")
        except BaseException:
            # On leaving, the pool would do all that waits. A job answers with a number alone, so
            # ending a process cannot leave half a message behind.
            for process in multiprocessing.active_children():
                process.terminate()
            raise
    header = {"suite": suite, "noise": how["noise"], "pushes": how["pushes"]}
    header.update(size=settings.size, simulator=simulator)
    with open(os.path.join(work, RECORDING), "w", encoding="utf-8") as file:
        json.dump(dict(header, **counts), file, indent=1)
    # The rename comes last, so that a folder of this name is always complete.
    os.replace(work, out)
    return counts


_worlds: List[Any] = []  # of this worker process: at most one


def _job(
    settings: Settings,
    suite: str,
    number: int,
    seed: int,
    noise: float,
    pushes: float,
    folder: str,
) -> int:
    """Steps of one demonstration, which is written into `folder`; 0 if the expert failed."""
    # Importing LIBERO takes seconds, so each process keeps one world for all its jobs.
    if not _worlds:
        _worlds.append(Simulator(settings))
    demonstration = demonstrate(_worlds[0], suite, number, seed, noise, pushes)
    if demonstration is None:
        return 0
    task = suites.tasks(suite)[number]
    values = {name: demonstration[name] for name in ("state", "joints", "action")}
    for camera in CAMERAS:
        values[camera], values[camera + "_ends"] = _joined(demonstration[camera])
    path = os.path.join(folder, "{:02d}_{:05d}.npz".format(number, seed))
    np.savez(path, task=task.name, instruction=task.instruction, seed=seed, **values)
    return len(demonstration["action"])


def _jpeg(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=_QUALITY, subsampling=0)
    return buffer.getvalue()


def _joined(parts: List[bytes]) -> Tuple[np.ndarray, np.ndarray]:
    """All bytes, uint8 [n], and where each part ends, int64 [t]."""
    return np.frombuffer(b"".join(parts), np.uint8), np.cumsum([len(part) for part in parts])


def main(arguments: Sequence[str]) -> int:
    """Parse flags and record; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", required=True, metavar="DIR", help="a new folder")
    add_flags(parser)
    add("--tasks", nargs="+", type=int, metavar="N", help="default: all there is a script for")
    add("--episodes", type=int, default=50, metavar="N", help="attempts a task (default: 50)")
    add("--noise", type=float, default=0.15, help="of the executed motion, in action units")
    add("--pushes", type=float, default=0.0, help="probability of one at a step (default: none)")
    add("--seed", type=int, default=SEED0, metavar="N", help="of the first attempt at each task")
    add("--workers", type=int, default=2, metavar="N", help="processes (default: 2)")
    flags = parser.parse_args(arguments)
    try:
        if flags.seed < SEED0:
            raise ValueError("--seed: {} is left to evaluations".format(flags.seed))
        if suites.perturbation(flags.suite):
            raise ValueError("demonstrations are of plain suites, not of {}".format(flags.suite))
        numbers = scripted(flags.suite) if flags.tasks is None else flags.tasks
        counts = record(
            settings_of(flags), flags.out, flags.suite, numbers, flags.episodes,
            noise=flags.noise, pushes=flags.pushes, seed=flags.seed, workers=flags.workers,
        )  # fmt: skip
    except (SimulatorError, OSError, ValueError) as error:
        print("record: {}".format(error), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("record: interrupted", file=sys.stderr)
        return 130
    print(
        "{}: {demonstrations} demonstrations, {steps} steps, {failed} failed".format(
            flags.out, **counts
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
