"""Chunks that are computed while others are executed: does a delay cost success, and does it jerk?

    python bench/overlap.py --checkpoint=runs/flow --out=runs/bench/overlap --delays 0 2 4

Evaluates a policy that draws samples (heads flow, diffusion, expert_flow) in the same episodes:
once waiting for every chunk, and for every delay with plain asynchronous chunks and with real-time
chunking in both forms. The delay is a number of control steps, as a simulator stands still while
the policy computes. Prints a Markdown table and writes it to OUT/table.md; what OUT holds already
is not run again.
"""

import argparse
import subprocess
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: make the repository importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eval_servers import results

ROOT = Path(__file__).resolve().parents[1]
# name -> flags of launch/serve.py, of the rollout
FORMS = {
    "plain": ("--execute=chunk", "--overlap=plain"),
    "rtc, with the Jacobian": ("--execute=rtc --rtc=jacobian", "--overlap=rtc"),
    "rtc, direct": ("--execute=rtc --rtc=direct", "--overlap=rtc"),
}


def main() -> None:
    """Command line."""
    flags = _parse_flags()
    out = Path(flags.out)
    lines = [
        "| chunks | delay, control steps | success (95 %) | mean jerk | control steps |",
        "|---|---|---|---|---|",
        _row("waiting", "–", _run(flags, out / "waiting", "--execute=chunk", [])),
    ]
    for delay in flags.delays:
        for name, (serve, overlap) in FORMS.items():
            folder = out / f"{overlap.split('=')[1]}-{serve.split('=')[-1]}-{delay}"
            run = _run(flags, folder, serve, [overlap, f"--delay={delay}"])
            lines.append(_row(name, str(delay), run))
    table = "\n".join(lines) + "\n"
    (out / "table.md").write_text(table)
    print(table)


def _run(flags: argparse.Namespace, folder: Path, serve: str, overlap: list[str]) -> Path:
    if not (folder / results.SCORE).is_file():
        command = [sys.executable, "launch/evaluate.py", flags.simulator]
        command += [f"--checkpoint={flags.checkpoint}", f"--out={folder}", f"--serve={serve}"]
        command += ["--sanity=off", "--no-report", f"--workers={flags.workers}"]
        command += [f"--python={flags.python}", "--", "--videos=0"]
        command += [f"--execute-steps={flags.execute_steps}", *overlap, *flags.rollout]
        subprocess.run(command, cwd=ROOT, check=True)
    return folder


def _row(name: str, delay: str, folder: Path) -> str:
    score, rows = results.load_run(str(folder))
    jerks = [row.jerk for row in rows if row.jerk is not None]
    low, high = score["wilson_low"], score["wilson_high"]
    steps = sum(row.steps for row in rows) / len(rows)
    count = f"{score['successes']} of {score['episodes']}"
    rate = f"{count}, {score['success_rate']:.0%} ({low:.0%} to {high:.0%})"
    return f"| {name} | {delay} | {rate} | {sum(jerks) / len(jerks):.3f} | {steps:.1f} |"


def _parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR")
    add("--out", default="runs/bench/overlap", metavar="DIR", help="default: %(default)s")
    add("--simulator", default="tabletop", help="a folder of eval_servers/ (default: tabletop)")
    add("--python", default=sys.executable, metavar="PATH", help="of the simulator")
    add("--delays", type=int, nargs="+", default=[0, 2, 4], metavar="K")
    add("--execute-steps", type=int, default=5, metavar="K", help="from request to request")
    add("--workers", type=int, default=2, metavar="N")
    add("rollout", nargs="*", help="further flags of the rollout, behind --")
    return parser.parse_args()


if __name__ == "__main__":
    main()
