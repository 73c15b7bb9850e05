"""Evaluate a policy server on CALVIN: chains of five instructions, 360 steps for each.

    python eval_servers/calvin/rollout.py --server=ws://127.0.0.1:8000 --out=DIR --workers=2
    python eval_servers/calvin/rollout.py ... --chains=0:100                # the first hundred
    python eval_servers/calvin/rollout.py ... --tasks turn_on_led --episodes=40
    python eval_servers/calvin/rollout.py ... --redraw=1                    # blocks lie elsewhere

Run it with the Python that `setup.sh` made. The protocol is CALVIN's: 1000 fixed chains in scene D,
each from its own initial state; for every task the policy starts afresh and gets the validation
split's instruction; the first failure ends the chain. `--tasks` gives single tasks instead, from
initial states of the same list. `--redraw` lays the blocks of every start anew on the surfaces that
CALVIN's data had them on: the official starts know two places on the table and one in each half of
the slider. Such a score is of the profile "redrawn" and stands beside the official one.

Writes DIR/episodes.jsonl, DIR/score.json and DIR/videos; see `eval_servers/rollout.py`. The score
of chains has the rates of 1 to 5 tasks solved in a row, their average, and a table per task.
`launch/evaluate.py calvin` also starts the server and writes the report.
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

if __package__ in (None, ""):  # run as a script: make the repository importable, uninstalled
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from eval_servers import cli, results
from eval_servers.calvin import chains
from eval_servers.calvin.env import attempt, film, make_env
from eval_servers.calvin.probe import add_flags, probe, settings_of
from eval_servers.calvin.simulator import SimulatorError

MAX_STEPS = 360  # of a task, CALVIN's protocol
TIMEOUT = 3600.0  # seconds for a chain of 1800 steps


def main(arguments: Sequence[str]) -> int:
    """Run the evaluation; returns the exit status."""
    return cli.main(_parse_flags(arguments), _prepare, (SimulatorError,))


def _prepare(flags: argparse.Namespace) -> cli.Evaluation:
    settings = settings_of(flags)
    episodes = _episodes(flags)
    cli.check_instructions(flags, episodes)
    protocol = {
        "environment": "calvin",
        "profile": _profile(flags),
        "tasks": flags.tasks or "chains {}:{}".format(*flags.chains),
        "swap_instructions": flags.swap_instructions,
        "privileged": flags.privileged,
        "simulator": probe(settings),
    }
    # Only where it was asked for: protocols of earlier runs have no such key.
    if flags.redraw:
        protocol["redraw"] = flags.redraw
    make = functools.partial(make_env, settings, flags.privileged)
    return cli.Evaluation(make, episodes, protocol, film, attempt, table=table)


def _profile(flags: argparse.Namespace) -> str:
    """official: may stand beside published scores; redrawn: so but for the blocks' places."""
    if not _is_as_published(flags):
        return "custom"
    return "redrawn" if flags.redraw else "official"


def _is_as_published(flags: argparse.Namespace) -> bool:
    """Whether all chains are run as CALVIN's are."""
    return (
        not (flags.tasks or flags.swap_instructions or flags.privileged)
        and flags.chains == (0, 1000)
        and flags.max_steps == MAX_STEPS
        and flags.renderer == "egl"
        # A dataset's own configuration names its scene, so the flag does not decide then.
        and (flags.scene == "D" or bool(flags.dataset))
    )


def table(score: Dict[str, Any]) -> str:
    """A score as text: CALVIN's numbers first, then one line per task."""
    lines = []
    if "chains" in score:
        in_a_row = score["chains"]["solved_in_a_row"].items()
        lines = ["in a row  " + "  ".join("{}: {:.1%}".format(k, c["rate"]) for k, c in in_a_row)]
        lines += ["average   {average_solved:.3f}".format(**score["chains"])]
    lines += [results.one_line(score)]
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
        episodes = chains.episodes_of_tasks(protocol, flags.tasks, count, flags.swap_instructions)
    else:
        first, last = flags.chains
        episodes = chains.episodes_of_chains(protocol, first, last, flags.swap_instructions)
    return chains.redraw(episodes, flags.scene, flags.redraw) if flags.redraw else episodes


def _parse_flags(arguments: Sequence[str]) -> argparse.Namespace:
    parser = cli.make_parser(__doc__, MAX_STEPS, TIMEOUT)
    add = parser.add_argument
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
    add("--episodes", type=cli.positive, metavar="N", help="with --tasks (default: 10 a task)")
    add(
        "--redraw",
        type=cli.positive,
        default=0,
        metavar="SEED",
        help="lay the blocks of every start anew, anywhere they lay in CALVIN's data (--scene says"
        " in which scene); other seeds give other places",
    )
    add_flags(parser)
    add(
        "--privileged",
        action="store_true",
        help="send where everything is as well, for scripted experts; the score says so",
    )
    flags = parser.parse_args(arguments)
    # Silently ignored, it would leave the user waiting for all 1000 chains.
    if flags.episodes and not flags.tasks:
        parser.error("--episodes goes with --tasks; a number of chains is --chains=0:N")
    return flags


def _range(text: str) -> Tuple[int, int]:
    first, separator, last = text.partition(":")
    if not separator:
        raise argparse.ArgumentTypeError("write FIRST:LAST, as 0:100")
    return int(first or 0), int(last or 1000)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
