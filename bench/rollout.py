"""What client and server cost an evaluation: CALVIN's steps a second with them and without.

    python bench/rollout.py --python=VENV/bin/python --calvin-env=DIR --workers 1 2

VENV is what eval_servers/calvin/setup.sh made, DIR its calvin_env. Without them means a loop around
the simulator's own `step`; with them the same actions come from a policy that computes nothing,
over the websocket, through the episode loop of eval_servers/calvin/rollout.py. Every worker is a
process with one simulator, in which the two take turns from the same start, all workers at once;
both draw both cameras at every step. Resets are not counted.

"waiting" is the share of an episode between sending an observation and having the action, as the
client clocks it: the part of the cost that does not move with the machine's speed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # runs without installing

STILL = (0.0,) * 6 + (1.0,)  # what StillPolicy answers
TASK = "turn_on_led"
KINDS = ("bare", "served")


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
    add("--steps", type=int, default=25, help="of a turn (default: %(default)s)")
    add("--repeats", type=int, default=20, help="turns of each kind (default: %(default)s)")
    add("--server", help=argparse.SUPPRESS)  # marks a worker
    flags = parser.parse_args()
    if flags.server:
        _work(flags)
        return
    from tests.eval_servers.simpler_expert_policy import StillPolicy
    from vla_jax.serve import server

    print("| workers | bare, steps/s | with client and server | cost | waiting |")
    print("|---|---|---|---|---|")
    with server.background(StillPolicy(), server.ServerOptions(port=0)) as uri:
        for workers in flags.workers:
            _compare(flags, uri, workers)


def _compare(flags: argparse.Namespace, uri: str, workers: int) -> None:
    """Prints one line of the table."""
    command = [flags.python, __file__, f"--server={uri}", f"--steps={flags.steps}"]
    command += [f"--calvin-env={os.path.abspath(flags.calvin_env)}", f"--renderer={flags.renderer}"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    running = [subprocess.Popen(command, cwd=ROOT, **pipes) for _ in range(workers)]
    for kind in KINDS:  # warm up
        _take_turn(running, kind)
    rates: dict[str, list[float]] = {kind: [] for kind in KINDS}
    waiting = []
    for turn in range(flags.repeats):
        for kind in KINDS if turn % 2 else KINDS[::-1]:  # neither is always the first
            replies = _take_turn(running, kind)
            rates[kind].append(sum(flags.steps / reply["seconds"] for reply in replies))
            waiting += [r["waiting"] / r["seconds"] for r in replies if kind == "served"]
    for process in running:
        process.communicate()
    bare, served = (statistics.median(rates[kind]) for kind in KINDS)
    pairs = zip(*rates.values(), strict=True)
    cost = statistics.median(1 - with_them / without for without, with_them in pairs)
    wait = statistics.median(waiting)
    print(f"| {workers} | {bare:.1f} | {served:.1f} | {cost:.1%} | {wait:.1%} |", flush=True)


def _take_turn(running: list[subprocess.Popen], kind: str) -> list[dict[str, float]]:
    """Lets all workers do the same at once; what each of them says of it."""
    for process in running:
        assert process.stdin is not None
        print(kind, file=process.stdin, flush=True)
    replies = []
    for process in running:
        assert process.stdout is not None
        line = next((text for text in process.stdout if text.startswith("{")), "")
        if not line:
            sys.exit("bench: a worker failed; see above")
        replies.append(json.loads(line))
    return replies


def _work(flags: argparse.Namespace) -> None:
    """One worker; runs in the simulator's environment and takes turns as its stdin says."""
    from eval_servers.calvin.chains import episodes_of_tasks, load
    from eval_servers.calvin.env import CalvinEnv, attempt
    from eval_servers.calvin.initial import initial_state
    from eval_servers.calvin.simulator import Settings, Simulator
    from eval_servers.client import PolicyClient
    from eval_servers.episode import run_episode

    world = Simulator(Settings(flags.calvin_env, flags.renderer))
    env, client = CalvinEnv(world), PolicyClient(flags.server)
    # One start for both: what touches what decides how long the physics takes.
    (episode,) = episodes_of_tasks(load(), [TASK], 1)
    for line in sys.stdin:
        if line.strip() == "bare":
            world.reset(*initial_state(episode.state))
            start = time.perf_counter()
            for _ in range(flags.steps):
                world.step(np.array(STILL, np.float32))
            seconds, waiting = time.perf_counter() - start, 0.0
        else:
            row = run_episode(env, client, episode, flags.steps, attempt=attempt)
            if row.steps != flags.steps:
                sys.exit(f"bench: the episode ended after {row.steps} steps")
            seconds = sum(stage.seconds for stage in row.stages)
            waiting = sum(row.round_trip_ms) / 1000
        print(json.dumps({"seconds": seconds, "waiting": waiting}), flush=True)
    client.close()
    env.close()


if __name__ == "__main__":
    main()
