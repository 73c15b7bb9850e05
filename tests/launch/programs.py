"""Runs of one program in processes that share its imports, which take seconds."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# The program's own imports, then a copy of the process for each run, one after another.
_RUNS = """
import ast, importlib, json, os, runpy, sys, traceback

script, folder, runs = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
for node in ast.parse(open(script).read()).body:
    names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
    names += [node.module] if isinstance(node, ast.ImportFrom) else []
    for name in names:
        importlib.import_module(name)
for number, flags in enumerate(runs):
    child = os.fork()
    if not child:
        for stream in (1, 2):
            os.dup2(os.open(f"{folder}/{number}.{stream}", os.O_CREAT | os.O_WRONLY), stream)
        sys.argv = [script, *flags]
        code = 0
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    _, status = os.waitpid(child, 0)
    with open(f"{folder}/{number}.code", "w") as file:
        file.write(str(os.waitstatus_to_exitcode(status)))
"""


@dataclass(frozen=True)
class Done:
    """How a run ended and what it printed."""

    returncode: int
    stdout: str
    stderr: str


def runs(
    script: str, folder: Path, environment: dict[str, str], *flags: Sequence[str]
) -> list[Done]:
    """Run a program of launch/ in `folder` once for each of `flags`.

    Of what ends before a device is asked for: a copy of a process with threads may hang.
    """
    printed = folder / "printed"
    printed.mkdir()
    command = [sys.executable, "-c", _RUNS, str(ROOT / "launch" / script), str(printed)]
    env = {**environment, "PYTHONPATH": str(ROOT)}
    command.append(json.dumps([list(each) for each in flags]))
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    files = [[printed / f"{i}.{end}" for end in ("code", "1", "2")] for i in range(len(flags))]
    texts = [[file.read_text() for file in each] for each in files]
    return [Done(int(code), out, errors) for code, out, errors in texts]
