"""How long the second start of a training run and of a server takes beside the first.

    python bench/first_step.py --data runs/quickstart/data/tabletop/1.0.0 --rounds=3

The demo's training (configs/quickstart.py) until its first step is done, and the server of a
checkpoint of it until clients can connect, as a robot or an evaluation that starts a server again
waits for it. Every round has an empty folder for compiled programs, in which the first start leaves
what it compiled. Counted from the start of the process, with Python's own start and all imports:
wall time, and CPU time (user and system), on which the neighbors have less influence. The ratio is
the median of the rounds' own.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# What each start is waited for, as it prints it.
READY = {"train": "first step done", "serve": "listening on"}
_TICKS = os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Start each twice a round, print one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="demonstrations (launch/record_demos.py)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = run(args.data, args.rounds, Path(folder))
    for line in table(result):
        print(line)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


def run(data: str, rounds: int, folder: Path) -> dict[str, Any]:
    """Seconds of every start: {"load": ..., "train" and "serve": [[first, second], ...]}.

    Args:
        data: see `main`.
        rounds: of each.
        folder: an empty one for checkpoints and compiled programs.
    """
    trained, cache = folder / "trained", folder / "cache"
    train = [f"launch/train.py --config=configs/quickstart.py:{data} --config.train.steps=2"]
    train = [*train[0].split(), "--config.train.eval_every=0"]
    made = [sys.executable, *train, f"--workdir={trained}"]
    done = subprocess.run(made, cwd=ROOT, env=_env(cache), capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"first_step.py: training failed:\n{done.stderr[-2000:]}")
    serve = ["launch/serve.py", f"--checkpoint={trained}", "--port=0"]
    result: dict[str, Any] = {"load": os.getloadavg(), "train": [], "serve": []}
    for _ in range(rounds):
        for name, command in (("train", train), ("serve", serve)):
            shutil.rmtree(cache, ignore_errors=True)
            pair = []
            for _ in ("first", "second"):
                workdir = [f"--workdir={folder / 'run'}"] if name == "train" else []
                pair.append(_start([*command, *workdir], READY[name], cache))
                shutil.rmtree(folder / "run", ignore_errors=True)
            result[name].append(pair)
    return result


def _env(cache: Path) -> dict[str, str]:
    variables = {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(cache), "PYTHONUNBUFFERED": "1"}
    # Some containers turn Python's own cache off: every start would compile jax's source, too.
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    return {**inherited, **variables}


def _start(command: Sequence[str], ready: str, cache: Path) -> dict[str, float]:
    """Wall and CPU seconds until a line with `ready` is printed; the process is ended then."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=_env(cache),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    printed = []
    for line in process.stdout:
        printed.append(line)
        if ready in line:
            spent = {"wall_s": time.perf_counter() - began, "cpu_s": _cpu_seconds(process.pid)}
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return spent
    sys.exit(f"first_step.py: {command[0]} ended:\n{''.join(printed)[-2000:]}")


def _cpu_seconds(pid: int) -> float:
    # The command's name may hold spaces, and ends with the last bracket; see proc(5).
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def table(result: dict[str, Any]) -> Iterator[str]:
    """Medians as Markdown."""
    yield f"{len(result['train'])} rounds, load {result['load'][0]:.1f}"
    yield ""
    yield "| start of | first, wall and CPU s | second | second / first, wall | CPU |"
    yield "|---" * 5 + "|"
    for name in READY:
        seconds = [
            " and ".join(
                f"{statistics.median(pair[i][key] for pair in result[name]):.1f}"
                for key in ("wall_s", "cpu_s")
            )
            for i in range(2)
        ]
        ratios = [
            f"{statistics.median(second[key] / first[key] for first, second in result[name]):.2f}"
            for key in ("wall_s", "cpu_s")
        ]
        yield f"| {name} | {' | '.join([*seconds, *ratios])} |"


if __name__ == "__main__":
    main()
