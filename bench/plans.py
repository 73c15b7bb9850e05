"""What the benches that plan share: one plan in a process of its own, and a table on its page."""

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run_plan(file: Path, *flags: str) -> None:
    """`launch/plan.py` with these flags and --json=FILE; what it says goes beside, into a .log.

    A plan that fails is told in a line, and leaves no file.
    """
    print(file.stem, file=sys.stderr, flush=True)
    command = [sys.executable, str(ROOT / "launch" / "plan.py"), *flags, f"--json={file}"]
    done = subprocess.run(command, capture_output=True, text=True)
    file.with_suffix(".log").write_text(done.stdout + done.stderr)
    if done.returncode:
        print("".join(done.stderr.strip().splitlines()[-1:]), file=sys.stderr)


def show_table(lines: Iterable[str], page: str | None, marks: tuple[str, str]) -> None:
    """Prints a Markdown table and, if a page is named, puts it between two marks there."""
    table = "\n".join(lines)
    print(table)
    if page:
        path = Path(page)
        before, remaining = path.read_text().split(marks[0])
        after = remaining.partition(marks[1])[2]
        path.write_text(f"{before}{marks[0]}\n{table}\n{marks[1]}{after}")
