"""What client and server cost an evaluation: CALVIN's steps a second with them and without.

    python bench/rollout.py --python=VENV/bin/python --calvin-env=DIR --workers 1 2

VENV is what eval_servers/calvin/setup.sh made, DIR its calvin_env. Without them means a loop around
the simulator's own `step`, in as many processes at once; with them the same actions come from a
policy that computes nothing, over the websocket, through eval_servers/calvin/rollout.py. Both draw
both cameras at every step, and take turns; building the simulator and resetting it is not counted.
"waiting" is the share of an episode between sending an observation and having the action, as the
client clocks it; "cost" compares two runs and so also holds what the machine did meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # runs without installing

STILL = (0.0,) * 6 + (1.0,)  # what StillPolicy answers
TASK = "turn_on_led"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--calvin-env", required=True, metavar="DIR")
    add("--python", default=sys.executable, help="interpreter of the simulator's environment")
    add("--renderer", default="tiny", choices=("tiny", "egl"), help="default: %(default)s")
    add("--workers", type=int, nargs="+", default=[1, 2], help="default: 1 2")
    add("--steps", type=int, default=300, help="a worker and repeat (default: %(default)s)")
    add("--repeats", type=int, default=5, help="default: %(default)s")
    add("--bare", action="store_true", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.bare:
        print(_step_alone(flags))
        return
    print("| workers | bare, steps/s | with client and server | cost | waiting |")
    print("|---|---|---|---|---|")
    for workers in flags.workers:
        runs = [(_bare(flags, workers), *_served(flags, workers)) for _ in range(flags.repeats)]
        bare, served, waiting = (statistics.median(column) for column in zip(*runs, strict=True))
        cost = statistics.median(1 - with_them / without for without, with_them, _ in runs)
        print(f"| {workers} | {bare:.1f} | {served:.1f} | {cost:.1%} | {waiting:.1%} |", flush=True)


def _bare(flags: argparse.Namespace, workers: int) -> float:
    """Steps a second of all workers together."""
    command = [flags.python, __file__, "--bare", *_simulator(flags), f"--steps={flags.steps}"]
    running = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for _ in range(workers)
    ]
    printed = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        sys.exit("bench: the bare simulator failed; see above")
    return sum(float(text.split()[-1]) for text in printed)


def _step_alone(flags: argparse.Namespace) -> float:
    """One worker's loop; runs in the simulator's environment."""
    from eval_servers.calvin.chains import load
    from eval_servers.calvin.initial import initial_state
    from eval_servers.calvin.simulator import Settings, Simulator

    world = Simulator(Settings(flags.calvin_env, flags.renderer))
    world.reset(*initial_state(load().states[0]))
    start = time.perf_counter()
    for _ in range(flags.steps):
        world.step(np.array(STILL, np.float32))
    seconds = time.perf_counter() - start
    world.close()
    return flags.steps / seconds


def _served(flags: argparse.Namespace, workers: int) -> tuple[float, float]:
    """Steps a second of all workers together; share of the time that they wait for actions."""
    from tests.eval_servers.simpler_expert_policy import StillPolicy
    from vla_jax.serve import server

    script = ROOT / "eval_servers/calvin/rollout.py"
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "run"
        with server.background(StillPolicy(), server.ServerOptions(port=0)) as uri:
            command = [flags.python, str(script), f"--server={uri}", f"--out={out}"]
            command += [*_simulator(flags), f"--workers={workers}", "--tasks", TASK]
            command += [f"--episodes={workers}", f"--max-steps={flags.steps}"]
            command += ["--videos=0", "--sanity=off"]
            subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        rows = [json.loads(line) for line in (out / "episodes.jsonl").read_text().splitlines()]
    if any(row["error"] or row["steps"] != flags.steps for row in rows):
        sys.exit(f"bench: episodes ended early: {[row['steps'] for row in rows]}")
    seconds = [sum(stage["seconds"] for stage in row["stages"]) for row in rows]
    rate = sum(row["steps"] / took for row, took in zip(rows, seconds, strict=True))
    return rate, sum(sum(row["round_trip_ms"]) for row in rows) / 1000 / sum(seconds)


def _simulator(flags: argparse.Namespace) -> list[str]:
    return [f"--calvin-env={os.path.abspath(flags.calvin_env)}", f"--renderer={flags.renderer}"]


if __name__ == "__main__":
    main()
