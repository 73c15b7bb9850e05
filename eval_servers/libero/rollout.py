"""Evaluate a policy server on one suite of LIBERO or LIBERO-PRO.

    python eval_servers/libero/rollout.py --server=ws://127.0.0.1:8000 --out=DIR --suite=spatial
    python eval_servers/libero/rollout.py ... --suite=object --tasks 0 1 2 --episodes=10
    python eval_servers/libero/rollout.py ... --suite=object_swap         # LIBERO-PRO
    python eval_servers/libero/rollout.py ... --profile=openvla

Run it with the Python that `setup.sh` made. Episodes are the published evaluation's: every task
with each of its 50 initial states, fixtures where openpi's or openvla's script has them. A score is
of one suite: a perturbed one stands beside the plain one and is never averaged with it.

Writes DIR/episodes.jsonl, DIR/score.json and DIR/videos; see `eval_servers/rollout.py`.
`launch/evaluate.py libero` also starts the server and writes the report.
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path
from typing import Sequence

if __package__ in (None, ""):  # run as a script: make the repository importable, uninstalled
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from eval_servers import cli
from eval_servers.libero import suites
from eval_servers.libero.env import film, make_env
from eval_servers.libero.probe import add_flags, probe, settings_of
from eval_servers.libero.profiles import PROFILES
from eval_servers.libero.simulator import SimulatorError

TIMEOUT = 1800.0  # seconds for an episode of 520 steps, another task's world to be built included


def main(arguments: Sequence[str]) -> int:
    """Run the evaluation; returns the exit status."""
    return cli.main(_parse_flags(arguments), _prepare, (SimulatorError,))


def _prepare(flags: argparse.Namespace) -> cli.Evaluation:
    settings, profile = settings_of(flags), PROFILES[flags.profile]
    episodes = suites.trials(flags.suite, flags.tasks, flags.episodes, flags.swap_instructions)
    cli.check_instructions(flags, episodes)
    protocol = {
        "environment": "libero",
        "profile": flags.profile if _is_published(flags) else "custom",
        "suite": flags.suite,
        "perturbation": suites.perturbation(flags.suite) or None,
        "tasks": flags.tasks or "all",
        "fixtures_seed": profile.seed,
        "settling_steps": profile.settle,
        "swap_instructions": flags.swap_instructions,
        "privileged": flags.privileged,
        "simulator": probe(settings, profile, flags.suite, episodes[0].number),
    }
    make = functools.partial(make_env, settings, profile, flags.privileged)
    return cli.Evaluation(make, episodes, protocol, film)


def _is_published(flags: argparse.Namespace) -> bool:
    """Whether a score may stand beside published ones of the profile's name."""
    profile = PROFILES[flags.profile]
    return (
        flags.tasks is None
        and flags.episodes == suites.STATES
        # Fewer steps would cost successes and more would add some, so either is custom.
        and flags.max_steps == suites.MAX_STEPS[suites.plain(flags.suite)]
        and flags.execute_steps == profile.execute_steps
        and flags.size == profile.size
        and not (flags.swap_instructions or flags.privileged)
    )


def _parse_flags(arguments: Sequence[str]) -> argparse.Namespace:
    # No common limit of steps, as every suite has its own.
    parser = cli.make_parser(__doc__, None, TIMEOUT)
    add = parser.add_argument
    add_flags(parser)
    add(
        "--tasks",
        nargs="+",
        type=int,
        metavar="N",
        help="numbers of tasks, from 0 (default: all of the suite)",
    )
    add(
        "--episodes",
        type=cli.positive,
        default=suites.STATES,
        metavar="N",
        help="initial states of each task, from the first (default: all %(default)s)",
    )
    add(
        "--profile",
        choices=sorted(PROFILES),
        default="openpi",
        help="whose evaluation it is: openpi (default) executes 5 actions of a chunk, openvla 1;"
        " fixtures stand where that script has them",
    )
    add(
        "--privileged",
        action="store_true",
        help="send where things are as well, for scripted experts; the score says so",
    )
    # None tells a flag that was not given from one that equals the common default.
    parser.set_defaults(execute_steps=None)
    flags = parser.parse_args(arguments)
    if flags.max_steps is None:
        flags.max_steps = suites.MAX_STEPS[suites.plain(flags.suite)]
    if flags.execute_steps is None:
        flags.execute_steps = PROFILES[flags.profile].execute_steps
    return flags


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
