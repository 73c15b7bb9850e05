"""The whole way in one command: demonstrations, training, serving, evaluation, report.

    python launch/demo.py          (or: make demo)

Leaves everything under runs/quickstart: the RLDS dataset, the checkpoints, three evaluations
(trained, untrained, and with every instruction swapped for another task's) and the report page
runs/quickstart/report/index.html beside score.json. What is there already is used again; --fresh
starts over. Flags after -- go to launch/train.py.
"""

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: make the repository importable, uninstalled
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eval_servers import local_server
from vla_jax import refusal
from vla_jax.commands import HelpFormatter, program
from vla_jax.shipped import install_hint

RUNS = ("trained", "untrained", "swapped")
SIZE = 32  # pixels of both cameras: what configs/quickstart.py's vision tower takes, unresized
BASELINE = 52  # episodes at most of the two runs that are expected to fail


def main() -> None:
    """Run the five stages."""
    refusal.quiet_interrupt()
    flags = _parse_flags()
    if importlib.util.find_spec("matplotlib") is None:
        # Said now, and not by the last stage a quarter of an hour later.
        sys.exit(f"{program()}: the report needs matplotlib; {install_hint('demo')}")
    start = time.monotonic()
    run = Path(flags.workdir)
    if flags.fresh:
        shutil.rmtree(run, ignore_errors=True)
    dataset = Path(flags.data) if flags.data else run / "data/tabletop/1.0.0"
    results, report = run / "results", run / "report"
    names = RUNS if flags.baselines else RUNS[:1]

    _say("1/5 record demonstrations")
    if not dataset.is_dir():
        _python("vla_jax.launch.record_demos", "--out", dataset, "--size", SIZE)

    _say("2/5 train")
    _python(
        "vla_jax.launch.train", f"--config={flags.config}:{dataset}", "--workdir", run, *flags.train
    )

    _say("3/5 serve and evaluate")
    # Episodes of an earlier run would be counted with these.
    shutil.rmtree(results, ignore_errors=True)
    # A baseline near zero is plain after fewer episodes.
    num_baseline = min(flags.episodes, BASELINE)
    with local_server.running(["--checkpoint", str(run)]) as server:
        _evaluate(server.uri, results / "trained", flags.episodes, "--sanity=warn")
        if flags.baselines:
            _evaluate(server.uri, results / "swapped", num_baseline, "--swap-instructions")
    if flags.baselines:
        _say("4/5 baseline: the same network, untrained")
        with local_server.running(["--checkpoint", str(run), "--untrained"]) as server:
            _evaluate(server.uri, results / "untrained", num_baseline)

    _say("5/5 report")
    runs = [f"--run={name}={results / name}" for name in names]
    log, title = run / "log.jsonl", "--title=Tabletop quickstart"
    _python("eval_servers.results", "report", *runs, "--loss-log", log, title, "--out", report)
    score = _score(results, names, (time.monotonic() - start) / 60)
    _write(report / "score.json", score)
    print(_table(score))
    print(f"report: {report / 'index.html'}")


def _parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--workdir", default="runs/quickstart", help="default: %(default)s")
    parser.add_argument("--config", default="quickstart", help="default: %(default)s")
    parser.add_argument("--episodes", type=int, default=130, help="evaluated (default: 130)")
    parser.add_argument("--data", default="", help="demonstrations; default: recorded anew")
    parser.add_argument(
        "--baselines",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also evaluate untrained and with swapped instructions (default: yes)",
    )
    parser.add_argument("--fresh", action="store_true", help="remove the workdir first")
    parser.add_argument("train", nargs="*", help="flags for launch/train.py, after --")
    return parser.parse_args()


def _python(module: str, *arguments: object) -> None:
    """Run one stage in its own process; stop the demo when it fails."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    # In the other process the package must be found even if it is not installed.
    code = subprocess.call(command, env={**os.environ, "PYTHONPATH": str(local_server.ROOT)})
    if code:
        sys.exit(f"{program()}: {module} failed with exit status {code}")


def _evaluate(uri: str, out: Path, episodes: int, *flags: str) -> None:
    # Random weights and swapped instructions are meant to look wrong: the suite is for "trained".
    settings = ["--server", uri, "--out", out, "--sanity=off", "--no-report"]
    rollout = ["--", "--episodes", episodes, "--image-size", SIZE, *flags]
    _python("vla_jax.launch.evaluate", "tabletop", *settings, *rollout)


def _score(results: Path, names: Sequence[str], minutes: float) -> dict[str, Any]:
    scores = {name: json.loads((results / name / "score.json").read_text()) for name in names}
    trained = scores["trained"]
    return {
        "success_rate": trained["success_rate"],
        "episodes": trained["episodes"],
        "per_task": trained["per_task"],
        **{f"{name}_success_rate": scores[name]["success_rate"] for name in names[1:]},
        "minutes": round(minutes, 2),
    }


def _write(path: Path, value: Any) -> None:
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, path)


def _table(score: dict[str, Any]) -> str:
    rows: list[Sequence[Any]] = [("task", "success", "95 % interval")]
    for task, counts in sorted(score["per_task"].items()):
        interval = f"{counts['wilson_low']:.2f} - {counts['wilson_high']:.2f}"
        rows.append((task, f"{counts['successes']}/{counts['episodes']}", interval))
    lines = [f"{task:<22}{success:>9}   {interval}" for task, success, interval in rows]
    rates = {"untrained": "untrained", "instructions swapped": "swapped"}
    rate_texts = [
        f"{label} {score[f'{name}_success_rate']:.1%}"
        for label, name in rates.items()
        if f"{name}_success_rate" in score
    ]
    lines.append(
        f"success {score['success_rate']:.1%} of {score['episodes']} episodes on unseen seeds; "
        + "".join(f"{part}; " for part in rate_texts)
        + f"{score['minutes']:.1f} minutes"
    )
    return "\n".join(lines)


def _say(stage: str) -> None:
    print(f"\n== {stage}", flush=True)


if __name__ == "__main__":
    main()
