"""The command line that every simulator's rollout.py has, and what it does with it.

A simulator adds its own flags to `make_parser` and hands `main` a function that turns the parsed
flags into an `Evaluation`. Exit status: 0 done, 1 an error, 3 the sanity suite found something,
130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import logging
import os
import signal
import sys
import time
from dataclasses import dataclass
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple, Type

import numpy as np
from PIL import Image

from eval_servers import findings, pool, repeats, results, rollout, sanity
from eval_servers.async_chunks import MODES, Overlap
from eval_servers.client import PolicyClient, PolicyServerError

LONG = 50  # episodes before which the sanity suite runs by itself
UNWELL = 3  # exit status when it finds something
_BLANK = 2.0  # standard deviation in gray levels below which a picture shows nothing
_CHECK_SECONDS = 900.0


@dataclass(frozen=True)
class Evaluation:
    """The evaluation that a simulator is asked to run.

    Attributes:
        make_env: see `rollout.evaluate`, as are the others.
        episodes: all of them, whatever the shard.
        protocol: starts with "environment" and "profile", and holds "simulator" with the renderer
            and its driver.
        save_video: None for a simulator without pictures.
        attempt: None for one task an episode.
        varies: why the simulator alone may give other results in another run of the same; "" where
            runs were seen to be equal to the bit.
        table: score -> text to print at the end; by default one line.
    """

    make_env: Callable[[], Any]
    episodes: Sequence[rollout.Episode]
    protocol: Dict[str, Any]
    save_video: Optional[rollout.SaveVideo] = None
    attempt: Optional[rollout.Attempt] = None
    varies: str = ""
    table: Callable[[Dict[str, Any]], str] = results.one_line


def make_parser(
    description: Optional[str], max_steps: Optional[int], episode_timeout: float = 600.0
) -> argparse.ArgumentParser:
    """The common flags, with this simulator's defaults; `max_steps` is None where tasks differ."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument_group("every simulator").add_argument
    add(
        "--server",
        metavar="URI",
        help="ws://host:port of launch/serve.py; several of the same policy with commas between",
    )
    add("--out", metavar="DIR", help="folder for the results; must not hold others")
    add("--workers", type=positive, default=2, metavar="N", help="processes (default: 2)")
    add(
        "--max-steps",
        type=positive,
        default=max_steps,
        metavar="N",
        help="actions before a task has failed (default: {})".format(max_steps or "the task's own"),
    )
    add(
        "--execute-steps",
        type=positive,
        default=1,
        metavar="K",
        help="actions of a chunk to execute before asking again (default: 1, re-plan every step)",
    )
    add(
        "--overlap",
        choices=MODES,
        help="ask for the next chunk while the last one is executed, --execute-steps actions after"
        " the request before: rtc makes the two meet (launch/serve.py --execute=rtc, else they are"
        " blended), plain does not (default: the simulator waits for every chunk)",
    )
    add(
        "--delay",
        type=int,
        metavar="K",
        help="with --overlap, control steps from an observation to its chunk, of a simulator that"
        " stands still while the policy computes (default: 0)",
    )
    add(
        "--videos",
        type=int,
        choices=(0, 1, 2),
        default=2,
        help="videos a task at most: its first success and its first failure (default: 2)",
    )
    add(
        "--sanity",
        choices=("auto", "on", "warn", "only", "off"),
        default="auto",
        help="check first that the policy sees, listens and speaks the robot's units; auto: before"
        " {} episodes or more; on: always; warn: always, and go on whatever it finds; only: then"
        " stop; off (default: auto)".format(LONG),
    )
    add("--resume", action="store_true", help="finish an interrupted run of the same settings")
    add(
        "--shard",
        type=_shard,
        default=(0, 1),
        metavar="I/N",
        help="every N-th episode only, from the I-th (from 0), in OUT/shard-I-of-N; whoever ends"
        " last puts all of them together in OUT",
    )
    add(
        "--episode-timeout",
        type=float,
        default=episode_timeout,
        metavar="S",
        help="seconds an episode may take before its simulator counts as hung"
        " (default: %(default)g)",
    )
    add(
        "--connect-timeout",
        type=float,
        default=60.0,
        metavar="S",
        help="seconds to wait for the server, also when it has gone (default: %(default)g)",
    )
    add(
        "--frame",
        metavar="FILE",
        help="only draw the first episode's first observation to this PNG and say what drew it;"
        " needs no server",
    )
    add(
        "--swap-instructions",
        action="store_true",
        help="tell the policy another task's instruction; success still counts on the own task",
    )
    return parser


def main(
    flags: argparse.Namespace,
    prepare: Callable[[argparse.Namespace], Evaluation],
    errors: Tuple[Type[Exception], ...] = (),
) -> int:
    """Run the evaluation; returns the exit status.

    Args:
        flags: of `make_parser`.
        prepare: flags -> what to do; called once. It may raise ValueError, or one of `errors`.
        errors: further exceptions whose message is for the user.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    with _ended_like_ctrl_c():
        return _main(flags, prepare, errors)


@contextlib.contextmanager
def _ended_like_ctrl_c() -> Iterator[None]:
    """Let SIGTERM do what Ctrl-C does: else the workers would go on, and wait for the server."""

    def end(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _main(
    flags: argparse.Namespace,
    prepare: Callable[[argparse.Namespace], Evaluation],
    errors: Tuple[Type[Exception], ...],
) -> int:
    try:
        if flags.frame:
            return _frame(prepare(flags), flags.frame)
        missing = [flag for flag in ("server", "out") if not getattr(flags, flag)]
        # The sanity suite alone writes no folder.
        if missing and not (missing == ["out"] and flags.sanity == "only"):
            raise ValueError("name " + " and ".join("--" + flag for flag in missing))
        # Before a server is waited for.
        if flags.out and os.path.isfile(flags.out):
            raise ValueError("--out: {} is a file, not a folder".format(flags.out))
        return _evaluate(prepare(flags), flags, _options(flags))
    except (PolicyServerError, pool.PoolError, ImportError, OSError, ValueError, *errors) as error:
        hint = ""
        # A ResultsError is about the folder itself, which --resume would not cure.
        if _rows(flags) and not isinstance(error, results.ResultsError):
            hint = " (what is done is kept; --resume goes on from here)"
        print("rollout: {}{}".format(error, hint), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nrollout: interrupted; --resume goes on from here", file=sys.stderr)
        # What shells report for a process ended by Ctrl-C: 128 + SIGINT.
        return 130


def check_instructions(flags: argparse.Namespace, episodes: Sequence[rollout.Episode]) -> None:
    """Ask the policy whether it can be told all that the episodes will tell it.

    Every rollout asks this before it starts its simulator, even for a look at the driver.

    Raises:
        ValueError: naming every instruction that does not fit, with the reason.
        PolicyServerError: the server is away.
    """
    # A picture of the first frame needs no server.
    if flags.frame or not flags.server:
        return
    unfit = rollout.unfit_instructions(_options(flags), episodes)
    if unfit:
        lines = ["  {!r}: {}".format(text, why) for text, why in sorted(unfit.items())]
        raise ValueError(
            "{} instruction(s) do not fit the policy, so nothing was started:\n{}".format(
                len(unfit), "\n".join(lines)
            )
        )


def _options(flags: argparse.Namespace) -> rollout.Options:
    if flags.delay is not None and not flags.overlap:
        raise ValueError("--delay goes with --overlap; without it the simulator waits")
    return rollout.Options(
        server=flags.server,
        max_steps=flags.max_steps,
        execute_steps=flags.execute_steps,
        overlap=Overlap(flags.overlap, flags.delay or 0) if flags.overlap else None,
        workers=flags.workers,
        videos=flags.videos,
        episode_timeout=flags.episode_timeout,
        connect_timeout=flags.connect_timeout,
        resume=flags.resume,
    )


def _evaluate(evaluation: Evaluation, flags: argparse.Namespace, options: rollout.Options) -> int:
    checks: List[findings.Finding] = []
    # An absent server, or a wrong one, is found before anything is spawned.
    metadata = rollout.common_metadata(options)
    wanted = flags.sanity in ("on", "warn", "only")
    if wanted or (flags.sanity == "auto" and len(evaluation.episodes) >= LONG):
        checks = check(evaluation, options)
        report_lines = findings.lines(checks, colour=sys.stderr.isatty())
        print("\n".join(["sanity suite:", *report_lines]), file=sys.stderr, flush=True)
        # Warnings never stop a run: a policy may be weak without being wired wrongly.
        unwell = findings.worst(checks) == "fail"
        if flags.sanity == "only" or (unwell and flags.sanity != "warn"):
            if unwell:
                print(
                    "rollout: the sanity suite failed, so a score would mislead; --sanity=warn"
                    " goes on all the same",
                    file=sys.stderr,
                )
            return UNWELL if unwell else 0
    shards, folder = flags.shard[1], _folder(flags)
    score = rollout.evaluate(
        evaluation.make_env,
        evaluation.episodes,
        folder,
        options,
        evaluation.protocol,
        evaluation.save_video,
        evaluation.attempt,
        {
            "sanity": [finding.to_json() for finding in checks],
            "repeats": repeats.statement(metadata, options, evaluation.varies),
        },
        flags.shard,
    )
    # Workers check themselves as they leave; this checks the parent.
    rollout.check_imports()
    if shards > 1:
        folders = [os.path.join(flags.out, _name(i, shards)) for i in range(shards)]
        # Shards may run on several machines, so nobody waits: the last to end merges.
        if not all(os.path.exists(os.path.join(each, results.SCORE)) for each in folders):
            print("{}: done; the other shards are not yet".format(folder))
            return 0
        score = results.merge(folders, flags.out)
    print(evaluation.table(score))
    return 0


def check(evaluation: Evaluation, options: rollout.Options) -> List[findings.Finding]:
    """The sanity suite, in a process of its own: a simulator may crash, or hold a GL context.

    Raises:
        pool.PoolError, PolicyServerError: as `rollout.evaluate`.
    """
    handler = functools.partial(_Checker, evaluation.make_env, options)
    fatal = (PolicyServerError, ImportError)
    timeout = _CHECK_SECONDS + options.connect_timeout
    jobs = [list(evaluation.episodes)]
    for _, outcome in pool.run(handler, jobs, lambda job: job, 1, timeout, fatal):
        if not isinstance(outcome, pool.Crash):
            return outcome
        return [
            findings.Finding(
                "simulator",
                "fail",
                "its process died: {}".format(outcome.reason),
                "vla doctor looks at drivers and versions",
            )
        ]
    raise ValueError("an evaluation of no episodes")


class _Checker:
    """A worker that runs the sanity suite."""

    def __init__(self, make_env: Callable[[], Any], options: rollout.Options, number: int) -> None:
        # Workers are spread evenly over the servers.
        uri = options.servers[number % len(options.servers)]
        self._client = PolicyClient(uri, options.connect_timeout)
        self._env = make_env()

    def __call__(self, episodes: Sequence[rollout.Episode]) -> List[findings.Finding]:
        return sanity.check(self._env, self._client, episodes)

    def close(self) -> None:
        self._client.close()
        self._env.close()


def _frame(evaluation: Evaluation, path: str) -> int:
    """Draw one observation, say in JSON what it shows; 1 if a picture is blank."""
    start = time.monotonic()
    env = evaluation.make_env()
    obs = env.reset(evaluation.episodes[0])
    seconds = time.monotonic() - start
    pictures = {key: value for key, value in obs.items() if getattr(value, "ndim", 0) == 3}
    env.close()
    # Cameras may differ in size, and pictures side by side need one height.
    height = max(picture.shape[0] for picture in pictures.values())
    padded = [
        np.pad(picture, ((0, height - picture.shape[0]), (0, 0), (0, 0)))
        for picture in pictures.values()
    ]
    Image.fromarray(np.concatenate(padded, axis=1)).save(path, format="PNG")
    blank = sorted(key for key, picture in pictures.items() if picture.std() < _BLANK)
    summary = {
        "simulator": evaluation.protocol.get("simulator", {}),
        "seconds": round(seconds, 3),
        "pictures": {key: list(picture.shape) for key, picture in pictures.items()},
        "blank": blank,
    }
    print(json.dumps(results.plain(summary)))
    return 1 if blank else 0


def _rows(flags: argparse.Namespace) -> bool:
    """Whether this run has written rows, which --resume would go on from."""
    path = os.path.join(_folder(flags), results.EPISODES) if flags.out else ""
    return not flags.resume and os.path.exists(path) and os.path.getsize(path) > 0


def _folder(flags: argparse.Namespace) -> str:
    number, shards = flags.shard
    return os.path.join(flags.out, _name(number, shards)) if shards > 1 else flags.out


def _name(number: int, shards: int) -> str:
    return "shard-{}-of-{}".format(number, shards)


def _shard(text: str) -> Tuple[int, int]:
    number, _, count = text.partition("/")
    try:
        shard = int(number), int(count)
    except ValueError:
        raise argparse.ArgumentTypeError("write I/N, as 0/4") from None
    if not 0 <= shard[0] < shard[1]:
        raise argparse.ArgumentTypeError("{}: I counts from 0 to N - 1".format(text))
    return shard


def positive(text: str) -> int:
    """A flag's type: a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value
