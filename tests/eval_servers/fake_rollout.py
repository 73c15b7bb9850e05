"""A simulator's rollout script around the fake world."""

import functools
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from eval_servers import cli, rollout
from tests.eval_servers.fake_env import TASKS, FakeEnv, save_text


def prepare(flags):
    episodes = [
        rollout.Episode(i, 100 + i, TASKS[i % len(TASKS)], f"do {TASKS[i % len(TASKS)]}")
        for i in range(flags.episodes)
    ]
    protocol = {"environment": "fake", "profile": "default"}
    make_env = functools.partial(FakeEnv, pace=flags.pace)
    return cli.Evaluation(make_env, episodes, protocol, save_text)


def main(arguments):
    parser = cli.make_parser(__doc__, max_steps=6)
    parser.add_argument("--episodes", type=cli.positive, default=12)
    parser.add_argument("--pace", type=float, default=0.0)
    return cli.main(parser.parse_args(arguments), prepare)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
