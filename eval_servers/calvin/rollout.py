"""Evaluate a policy server on CALVIN: chains of five instructions, 360 steps for each.

    python eval_servers/calvin/rollout.py --server=ws://127.0.0.1:8000 --out=DIR --workers=2
    python eval_servers/calvin/rollout.py ... --chains=0:100                # the first hundred
    python eval_servers/calvin/rollout.py ... --tasks turn_on_led --episodes=40

Run it with the Python that `setup.sh` made. The protocol is CALVIN's: 1000 fixed chains in scene D,
each from its own initial state; for every task the policy starts afresh and gets the validation
split's instruction; the first failure ends the chain. `--tasks` gives single tasks instead, from
initial states of the same list. Shards (`--chains`) of one protocol are put together by
`python -m eval_servers.results merge`.

Writes DIR/episodes.jsonl, DIR/score.json and DIR/videos; see `eval_servers/rollout.py`. The score
of chains has the rates of 1 to 5 tasks solved in a row, their average, and a table per task.
"""

from __future__ import annotations

import argparse
import functools
import logging
import sys
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

if __package__ in (None, ""):  # run as a script: make the repository importable, uninstalled
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from eval_servers import pool, rollout
from eval_servers.calvin import chains
from eval_servers.calvin.env import attempt, film, make_env
from eval_servers.calvin.probe import add_flags, probe, settings_of
from eval_servers.calvin.simulator import SimulatorError
from eval_servers.client import PolicyServerError

MAX_STEPS = 360  # of a task, CALVIN's protocol


def main(arguments: Sequence[str]) -> int:
    """Run the evaluation; returns the exit status."""
    flags = _parse_flags(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    settings = settings_of(flags)
    options = rollout.Options(
        server=flags.server,
        max_steps=flags.max_steps,
        execute_steps=flags.execute_steps,
        workers=flags.workers,
        videos=flags.videos,
        episode_timeout=flags.episode_timeout,
        connect_timeout=flags.connect_timeout,
        resume=flags.resume,
    )
    try:
        episodes = _episodes(flags)
        protocol = {
            "environment": "calvin",
            "tasks": flags.tasks or "chains",
            "swap_instructions": flags.swap_instructions,
            "privileged": flags.privileged,
            "simulator": probe(settings),
        }
        score = rollout.evaluate(
            functools.partial(make_env, settings, flags.privileged),
            episodes,
            flags.out,
            options,
            protocol,
            film,
            attempt,
        )
        rollout.check_imports()
    except (SimulatorError, PolicyServerError, pool.PoolError, OSError, ValueError) as error:
        print("rollout: {}".format(error), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nrollout: interrupted; --resume goes on from here", file=sys.stderr)
        return 130
    print(table(score))
    return 0


def table(score: Dict[str, Any]) -> str:
    """A score as text: CALVIN's numbers first, then one line per task."""
    lines = []
    if "chains" in score:
        in_a_row = score["chains"]["solved_in_a_row"].items()
        lines = ["in a row  " + "  ".join("{}: {:.1%}".format(k, c["rate"]) for k, c in in_a_row)]
        lines += ["average   {:.3f}".format(score["chains"]["average_solved"])]
    lines += [
        "success   {success_rate:.1%} ({successes}/{episodes}, 95 % interval {wilson_low:.1%} to"
        " {wilson_high:.1%})".format(**score)
    ]
    return "\n".join(
        lines
        + [
            "{:24s} {:6.1%} ({successes}/{episodes})".format(task, counts["rate"], **counts)
            for task, counts in score["per_task"].items()
        ]
    )


def _episodes(flags: argparse.Namespace) -> List[chains.Chain]:
    protocol = chains.load()
    if flags.tasks:
        count = flags.episodes or 10 * len(flags.tasks)
        return chains.episodes_of_tasks(protocol, flags.tasks, count, flags.swap_instructions)
    return chains.episodes_of_chains(protocol, *flags.chains, flags.swap_instructions)


def _parse_flags(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--server", required=True, metavar="URI", help="ws://host:port of launch/serve.py")
    add("--out", required=True, metavar="DIR", help="folder for the results; must not hold others")
    add("--workers", type=_positive, default=2, metavar="N", help="processes (default: 2)")
    add(
        "--chains",
        type=_range,
        default=(0, 1000),
        metavar="FIRST:LAST",
        help="of the list of 1000, LAST excluded (default: all)",
    )
    add(
        "--tasks",
        nargs="+",
        metavar="TASK",
        help="single tasks instead of chains: " + ", ".join(chains.load().instructions),
    )
    add("--episodes", type=_positive, metavar="N", help="with --tasks (default: 10 a task)")
    add_flags(parser)
    add(
        "--swap-instructions",
        action="store_true",
        help="tell the policy another task's instruction; success still counts on the own task",
    )
    add(
        "--privileged",
        action="store_true",
        help="send where everything is as well, for scripted experts; the score says so",
    )
    add(
        "--max-steps",
        type=_positive,
        default=MAX_STEPS,
        metavar="N",
        help="actions before a task has failed (default: %(default)s, CALVIN's)",
    )
    add(
        "--execute-steps",
        type=_positive,
        default=1,
        metavar="K",
        help="actions of a chunk to execute before asking again (default: 1, re-plan every step)",
    )
    add(
        "--videos",
        type=int,
        choices=(0, 1, 2),
        default=2,
        help="videos at most, of chains or of each of --tasks: the first success, the first failure"
        " (default: 2)",
    )
    add(
        "--episode-timeout",
        type=float,
        default=3600.0,
        metavar="S",
        help="seconds a chain may take before its simulator counts as hung (default: 3600)",
    )
    add(
        "--connect-timeout",
        type=float,
        default=60.0,
        metavar="S",
        help="seconds to wait for the server (default: 60)",
    )
    add("--resume", action="store_true", help="finish an interrupted run of the same settings")
    flags = parser.parse_args(arguments)
    if flags.episodes and not flags.tasks:
        parser.error("--episodes goes with --tasks; a number of chains is --chains=0:N")
    return flags


def _range(text: str) -> Tuple[int, int]:
    first, separator, last = text.partition(":")
    if not separator:
        raise argparse.ArgumentTypeError("write FIRST:LAST, as 0:100")
    return int(first or 0), int(last or 1000)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
