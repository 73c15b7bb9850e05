"""Evaluate a policy server on SimplerEnv: Google robot or WidowX, in one setting.

    python eval_servers/simpler/rollout.py --server=ws://127.0.0.1:8000 --out=DIR --workers=2
    python eval_servers/simpler/rollout.py ... --tasks widowx_spoon_on_towel widowx_carrot_on_plate
    python eval_servers/simpler/rollout.py ... --tasks google_robot_move_near --profile=official
    python eval_servers/simpler/rollout.py ... --setting=variant_aggregation

Run it with the Python that `setup.sh` made. Episodes are the published evaluation's: every variant
of the setting with every start, all control steps of the task, judged at the last one. A score is
of one setting and one robot; `python -m eval_servers.simpler.scores` sets runs beside each other
and beside the real robot.

Writes DIR/episodes.jsonl, DIR/score.json and DIR/videos; see `eval_servers/rollout.py`.
`launch/evaluate.py simpler` also starts the server and writes the report.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from pathlib import Path
from typing import Any, Dict, Sequence

if __package__ in (None, ""):  # run as a script: make the repository importable, uninstalled
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from eval_servers import cli, repeats, results
from eval_servers.simpler import simulator
from eval_servers.simpler.env import attempt, film, make_env
from eval_servers.simpler.probe import add_flags, probe, settings_of_flags
from eval_servers.simpler.profiles import PROFILES, Profile
from eval_servers.simpler.tasks import ENVIRONMENTS, TASKS, robot_of
from eval_servers.simpler.trials import trials
from eval_servers.simpler.worlds import SETTINGS, worlds

MAX_STEPS = 200  # of the longest task; every task has its own number below
TIMEOUT = 3600.0  # seconds for an episode, a ray-traced world to be built included


def main(arguments: Sequence[str]) -> int:
    """Run the evaluation; returns the exit status."""
    return cli.main(_parse_flags(arguments), _prepare, (simulator.SimulatorError,))


def _prepare(flags: argparse.Namespace) -> cli.Evaluation:
    settings, profile = settings_of_flags(flags), profile_of(flags)
    episodes = trials(flags.tasks, flags.setting, flags.episodes, flags.swap_instructions)
    parts = list(dict.fromkeys(episode.task for episode in episodes))
    used = {episode.variant: None for episode in episodes}
    needed = [
        world
        for part in parts
        for variant, world in worlds(part, flags.setting).items()
        if variant in used
    ]
    # Every needed file is checked now: the simulator would go on without it, with a wrong picture.
    simulator.check(settings, needed)
    cli.check_instructions(flags, episodes)
    robot = robot_of(parts[0])
    description = probe(settings, parts[0], flags.setting)
    protocol = {
        "environment": "simpler",
        "profile": profile.name if _is_published(flags, description) else "custom",
        "setting": flags.setting,
        "tasks": flags.tasks,
        "robot": robot,
        "action": dict(profile.to_json(), grippers={robot: profile.to_json()["grippers"][robot]}),
        "swap_instructions": flags.swap_instructions,
        "privileged": flags.privileged,
        "simulator": description,
    }
    make = functools.partial(make_env, settings, robot, profile, flags.privileged)
    varies = repeats.NOT_COMPARED
    return cli.Evaluation(make, episodes, protocol, film, attempt, varies, table)


def profile_of(flags: argparse.Namespace) -> Profile:
    """The profile with what flags change of it."""
    profile = PROFILES[flags.profile]
    return dataclasses.replace(
        profile,
        action_scale=flags.action_scale,
        stops=profile.stops or flags.stop_at_success,
    )


def _is_published(flags: argparse.Namespace, description: Dict[str, Any]) -> bool:
    """Whether a score may stand beside published ones of the profile's name."""
    return (
        flags.setting != "prepackaged"
        and flags.episodes is None
        and flags.max_steps >= MAX_STEPS
        and flags.drawn == "official"
        # Stand-in assets look different, so their scores compare only with each other.
        and not description["stand_ins"]
        and not (flags.swap_instructions or flags.privileged or flags.stop_at_success)
    )


def table(score: Dict[str, Any]) -> str:
    """A score as text: its setting, each published task, and under it its parts."""
    per_task = score["per_task"]
    lines = ["{} ({}), {}".format(*(score["protocol"][k] for k in ("setting", "profile", "robot")))]
    # Prepackaged environments bear the names of tasks.
    tasks = {} if score["protocol"]["setting"] == "prepackaged" else TASKS
    grouped = {name: [part for part in parts if part in per_task] for name, parts in tasks.items()}
    # A task of a single part would only repeat its line.
    grouped = {name: parts for name, parts in grouped.items() if len(parts) > 1}
    shown = set()
    for name, parts in grouped.items():
        solved, tried = (sum(per_task[p][k] for p in parts) for k in ("successes", "episodes"))
        lines.append(_line(name, {"successes": solved, "episodes": tried}))
        lines += [_line("  " + part, per_task[part]) for part in parts]
        shown.update(parts)
    lines += [_line(name, counts) for name, counts in per_task.items() if name not in shown]
    # The first part is the mean over all, which mixes tasks that are never published together.
    lost = [text for text in results.one_line(score).split("; ")[1:] if text]
    return "\n".join(lines + lost)


def _line(name: str, counts: Dict[str, Any]) -> str:
    rate = counts["successes"] / max(counts["episodes"], 1)
    return "{:48s} {:6.1%} ({successes}/{episodes})".format(name, rate, **counts)


def _parse_flags(arguments: Sequence[str]) -> argparse.Namespace:
    parser = cli.make_parser(__doc__, MAX_STEPS, TIMEOUT)
    add = parser.add_argument
    add(
        "--tasks",
        nargs="+",
        metavar="TASK",
        default=["widowx_stack_cube"],
        help="of one robot (default: %(default)s): {}; or single environments: {}".format(
            ", ".join(TASKS), ", ".join(name for name in ENVIRONMENTS if name not in TASKS)
        ),
    )
    add(
        "--setting",
        choices=SETTINGS,
        default="visual_matching",
        help="visual_matching (default) covers the background with a photograph of the real one;"
        " variant_aggregation varies tables, rooms, light and what else lies there;"
        " camera_variants turns the camera; prepackaged is what simpler_env.make gives, with starts"
        " by seed where it has no list",
    )
    add(
        "--profile",
        choices=sorted(PROFILES),
        default="robovlms",
        help="how actions reach the robot: official is SimplerEnv's own, robovlms (default) as"
        " RoboVLMs evaluates",
    )
    add("--action-scale", type=float, default=1.0, metavar="X", help="multiply arm motions")
    add(
        "--episodes",
        type=cli.positive,
        metavar="N",
        help="of each environment only so many, spread over variants and starts (default: all)",
    )
    add(
        "--stop-at-success",
        action="store_true",
        help="end an episode when it is first solved; published ones go on and may lose it again",
    )
    add_flags(parser)
    add(
        "--privileged",
        action="store_true",
        help="send where things are as well, for scripted experts; the score says so",
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
