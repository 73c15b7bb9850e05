"""Evaluate a checkpoint, or a running server, in a simulator.

    python launch/evaluate.py tabletop --checkpoint=runs/quickstart --out=OUT -- --image-size=32
    python launch/evaluate.py calvin --checkpoint=runs/kosmos --out=OUT --python=CALVIN/bin/python
    python launch/evaluate.py simpler --checkpoint=runs/oxe --out=OUT --python=SIMPLER/bin/python
    python launch/evaluate.py tabletop --server=ws://gpu:8000 --out=OUT --resume

Starts the policy server and starts it again should it die, checks that the policy sees, listens and
speaks the robot's units (--sanity), runs the episodes over worker processes, and leaves in OUT the
rows, the score with its protocol, videos and a report page. A run that was interrupted goes on with
--resume. Flags after -- go to the simulator's rollout: `launch/evaluate.py tabletop -- --help`.
"""

import argparse
import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

if __package__ in (None, ""):  # run as a script: make the repository importable, uninstalled
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eval_servers import local_server, results
from vla_jax import refusal
from vla_jax.commands import HelpFormatter
from vla_jax.train import checkpoint_folder

ROOT = local_server.ROOT
# Simulator -> the script that evaluates in it, with that simulator's own Python.
ROLLOUTS = {path.parent.name: path for path in sorted((ROOT / "eval_servers").glob("*/rollout.py"))}
RESTART_SECONDS = 600.0  # for a server that died to load and compile again


def main() -> int:
    """Serve, evaluate, report; returns the exit status."""
    refusal.quiet_interrupt()
    flags = _parse_flags()
    signal.signal(signal.SIGTERM, _ended)  # so that the server is stopped then, too
    try:
        # Before a server has been started for it.
        if shutil.which(flags.python) is None:
            raise refusal.FlagError(f"--python={flags.python}: no such program")
        if flags.checkpoint and not _wants_help(flags):
            with refusal.naming("--checkpoint"):
                checkpoint_folder.locate(flags.checkpoint, read_only=True)
        with _server(flags) as uri:
            status = _rollout(flags, uri)
    except (local_server.ServerError, refusal.FlagError, OSError) as error:
        return refusal.tell(error, flags.debug)
    except KeyboardInterrupt:
        return 130
    if status == 0 and flags.report and (Path(flags.out) / results.SCORE).exists():
        _report(flags)
    return status


@contextlib.contextmanager
def _server(flags: argparse.Namespace) -> Iterator[str]:
    if flags.server:
        yield flags.server
        return
    if _wants_help(flags):
        yield "ws://127.0.0.1:0"  # nobody will connect
        return
    debug = ["--debug"] * flags.debug
    serve = ["--checkpoint", flags.checkpoint, *debug, *shlex.split(flags.serve)]
    with local_server.running(serve) as server:
        yield server.uri


def _wants_help(flags: argparse.Namespace) -> bool:
    return "--help" in flags.rollout or "-h" in flags.rollout


def _rollout(flags: argparse.Namespace, uri: str) -> int:
    # A process of its own: the simulator's Python may be older, and has no jax.
    command = [flags.python, str(ROLLOUTS[flags.simulator]), "--server", uri, "--out", flags.out]
    command += ["--workers", str(flags.workers), "--sanity", flags.sanity]
    if not flags.server:
        # A server of ours that dies is started again, and the rollout has to outwait that.
        command += ["--connect-timeout", str(RESTART_SECONDS)]
    command += ["--resume"] * flags.resume + flags.rollout
    process = subprocess.Popen(command)
    try:
        return process.wait()
    except KeyboardInterrupt:
        return process.wait()  # Ctrl-C reached it as well; it says how to go on
    except SystemExit:
        # SIGTERM has reached this process alone.
        process.terminate()
        process.wait()
        raise


def _report(flags: argparse.Namespace) -> None:
    name = flags.name or Path(flags.out).name
    command = [sys.executable, "-m", "eval_servers.results", "report"]
    for run in [*flags.against, f"{name}={flags.out}"]:  # the first is what others are set against
        command += ["--run", run]
    # An imported checkpoint was not trained here and has no log.
    log = Path(flags.checkpoint or "") / "log.jsonl"
    if flags.checkpoint and log.is_file():
        command += ["--loss-log", str(log)]
    command += ["--title", f"{flags.simulator}: {name}", "--out", str(Path(flags.out) / "report")]
    subprocess.call(command, env={**os.environ, "PYTHONPATH": str(ROOT)})


def _parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=HelpFormatter,
        usage="%(prog)s SIMULATOR (--checkpoint=DIR | --server=URI) --out=DIR [FLAGS] [-- FLAGS]",
    )
    add = parser.add_argument
    add("simulator", choices=ROLLOUTS, help="a folder of eval_servers/: " + ", ".join(ROLLOUTS))
    add("--checkpoint", metavar="DIR", help="serve this one: a folder launch/train.py wrote")
    add("--server", metavar="URI", help="use this running one; several with commas between")
    add("--out", required=True, metavar="DIR", help="folder for the results")
    add(
        "--python",
        default=sys.executable,
        metavar="PATH",
        help="interpreter of the simulator's environment (default: this one)",
    )
    add("--serve", default="", metavar="FLAGS", help="for launch/serve.py, as '--dataset=bridge'")
    add("--workers", type=int, default=os.cpu_count() or 1, help="simulators (default: all cores)")
    add(
        "--sanity",
        default="auto",
        choices=("auto", "on", "warn", "only", "off"),
        help="see the rollout's --help (default: auto, before long evaluations)",
    )
    add("--resume", action="store_true", help="finish what an interrupted run has left")
    add(
        "--against",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="an earlier run to compare with in the report; repeat for more",
    )
    add("--name", default="", help="of this run in the report (default: the name of OUT)")
    add("--report", action=argparse.BooleanOptionalAction, default=True, help="write OUT/report")
    refusal.add_flag(parser)
    arguments = sys.argv[1:]
    # Cut here, because argparse would read the rollout's flags as its own.
    end = arguments.index("--") if "--" in arguments else len(arguments)
    flags = parser.parse_args(arguments[:end])
    flags.rollout = arguments[end + 1 :]
    # Both would leave open which of the two the score is of.
    if bool(flags.checkpoint) == bool(flags.server):
        parser.error("name either --checkpoint, which is then served, or --server")
    # The report comes last, and must not fail then.
    for item in flags.against:
        name, _, folder = item.partition("=")
        if not name or not (Path(folder) / results.SCORE).is_file():
            parser.error(f"--against={item}: write NAME=DIR, of a folder with {results.SCORE}")
    return flags


def _ended(*_: Any) -> NoReturn:
    sys.exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
