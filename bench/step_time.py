"""Time of a training step beside that of another checkout, interleaved in one run.

    git worktree add ../before COMMIT
    python bench/step_time.py --against=../before --config=quickstart:DATA --rounds=15

Starts launch/train.py in both checkouts, waits until both have compiled and warmed up, then lets
them run in turn, the other stopped by a signal meanwhile: what the machine does otherwise falls on
both. Turns are in the order ABBA. A round's ratio is that of the two turns next to each other; the
median of all rounds is the result, with the quarter and three quarters of them. The whole step
counts, with loading, logging and all that the loop does. Flags after -- go to both runs.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
EVERY = 5  # steps a row of the log
WARM = 6  # rows until a run counts as warmed up
PASSED_OVER = 2  # rows after a stop: the first holds the stop, the second what was ready by then


class Run:
    """A training run that can be stopped and let go.

    Args:
        checkout: whose code is run.
        folder: for the workdir and what it prints.
        config: as for `launch/train.py`, by name.
        flags: further ones.
    """

    def __init__(self, checkout: Path, folder: Path, config: str, flags: list[str]):
        self._log, self._printed = folder / "run" / "log.jsonl", folder / "printed.txt"
        name, colon, argument = config.partition(":")
        command = [
            sys.executable, "launch/train.py", f"--config=configs/{name}.py{colon}{argument}",
            f"--workdir={folder / 'run'}", f"--config.train.log_every={EVERY}",
            "--config.train.steps=1000000", "--config.train.save_every=1000000",
            "--config.train.eval_every=0", *flags,
        ]  # fmt: skip
        with self._printed.open("wb") as printed:
            self._process = subprocess.Popen(
                command, cwd=checkout, stdout=printed, stderr=printed, start_new_session=True,
                env={**os.environ, "PYTHONPATH": str(checkout)},
            )  # fmt: skip

    def warm_up(self) -> None:
        """Return, stopped, once enough rows are logged."""
        while len(self._rows()) < WARM:
            if self._process.poll() is not None:
                sys.exit(f"a run ended:\n{self._printed.read_text()[-3000:]}")
            time.sleep(0.2)
        self._send(signal.SIGSTOP)

    def turn(self, seconds: float) -> float:
        """Let it go for a while; returns seconds a step."""
        before = len(self._rows())
        self._send(signal.SIGCONT)
        time.sleep(seconds)
        self._send(signal.SIGSTOP)
        times = [row["step_s"] for row in self._rows()[before + PASSED_OVER :]]
        if not times:
            sys.exit(f"no {(1 + PASSED_OVER) * EVERY} steps in {seconds} s: raise --seconds")
        return statistics.mean(times)

    def end(self) -> None:
        """End it, whatever it is doing."""
        if self._process.poll() is None:
            self._send(signal.SIGKILL)
        self._process.wait()

    def _rows(self) -> list[dict[str, Any]]:
        if not self._log.exists():
            return []
        # The last line may be half written when the run is stopped.
        lines = self._log.read_text().split("\n")[:-1]
        return [row for row in map(json.loads, lines) if row["kind"] == "train"]

    def _send(self, number: int) -> None:
        os.killpg(self._process.pid, number)


def main() -> None:
    """Run, print, write."""
    flags = _parse_flags()
    with tempfile.TemporaryDirectory() as folder:
        runs = []
        try:
            for name, checkout in (("here", ROOT), ("other", flags.against)):
                (Path(folder) / name).mkdir()
                runs.append(Run(checkout, Path(folder) / name, flags.config, flags.train))
                # One after the other: compiling beside a run would only slow both.
                runs[-1].warm_up()
            first, other = runs
            rounds = [_round(first, other, flags.seconds, i % 2 == 1) for i in range(flags.rounds)]
        finally:
            for run in runs:
                run.end()
    own_times, other_times = ([pair[i] for pair in rounds] for i in (0, 1))
    ratios = sorted(a / b for a, b in rounds)
    quarter, half, three_quarters = (
        statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    )
    result = {
        "config": flags.config, "rounds": len(rounds), "seconds": flags.seconds,
        "step_s": statistics.median(own_times), "other_step_s": statistics.median(other_times),
        "ratio": half, "quarter": quarter, "three_quarters": three_quarters, "ratios": ratios,
    }  # fmt: skip
    print(
        f"{flags.config}: {1e3 * result['step_s']:.1f} ms a step here, "
        f"{1e3 * result['other_step_s']:.1f} ms there; ratio {half:.3f} "
        f"({quarter:.3f} to {three_quarters:.3f}, the middle half of {len(ratios)} rounds)"
    )
    if flags.json:
        Path(flags.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _round(own: Run, other: Run, seconds: float, swapped: bool) -> tuple[float, float]:
    if swapped:
        later, first = other.turn(seconds), own.turn(seconds)
        return first, later
    return own.turn(seconds), other.turn(seconds)


def _parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--against", required=True, type=Path, metavar="DIR", help="the other checkout")
    add("--config", default="quickstart", metavar="NAME[:ARG]", help="default: %(default)s")
    add("--rounds", type=int, default=15, help="two turns each (default: %(default)s)")
    add("--seconds", type=float, default=10.0, help="of a turn (default: %(default)s)")
    add("--json", metavar="FILE", help="also write the numbers there")
    add("train", nargs="*", help="flags for both runs, after --")
    flags = parser.parse_args()
    flags.against = flags.against.resolve()
    if not (flags.against / "launch" / "train.py").is_file():
        parser.error(f"--against: {flags.against} is no checkout of vla_jax (launch/train.py)")
    return flags


if __name__ == "__main__":
    main()
