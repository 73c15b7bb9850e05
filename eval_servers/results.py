"""Episode rows -> score: success rates with Wilson 95 % intervals, latencies, and the protocol.

    python -m eval_servers.results report --run trained=DIR --run untrained=DIR --out DIR
    python -m eval_servers.results merge DIR DIR ... --out DIR

Rows are written by `rollout.py`; a run's folder is described there.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from typing import Any, Dict, Iterable, List, Sequence, Tuple

import numpy as np

EPISODES, SCORE, PROTOCOL = "episodes.jsonl", "score.json", "protocol.json"
FORMAT = 1  # of score.json


class ResultsError(ValueError):
    """Results that cannot be read, merged or written over."""


def wilson(successes: int, episodes: int, z: float = 1.959963984540054) -> Tuple[float, float]:
    """Wilson score interval of a proportion; the default z is 95 % (Wilson 1927, JASA 22:209).

    Returns:
        (low, high) in [0, 1]; (0, 1) for no episodes.
    """
    if not 0 <= successes <= episodes:
        raise ValueError("{} successes of {} episodes".format(successes, episodes))
    if episodes == 0:
        return 0.0, 1.0
    rate, z2 = successes / episodes, z * z
    centre = rate + z2 / (2 * episodes)
    spread = z * math.sqrt(rate * (1 - rate) / episodes + z2 / (4 * episodes * episodes))
    scale = 1 + z2 / episodes
    # The bounds touch 0 and 1 exactly there; rounding must not push them past.
    low = 0.0 if successes == 0 else (centre - spread) / scale
    high = 1.0 if successes == episodes else (centre + spread) / scale
    return low, high


def summarize(rows: Sequence[Dict[str, Any]], protocol: Dict[str, Any]) -> Dict[str, Any]:
    """The score of a run: what goes into score.json."""
    tasks: Dict[str, List[Dict[str, Any]]] = {}
    for row in rows:
        tasks.setdefault(row["task"], []).append(row)
    per_task = {task: _counts(tasks[task]) for task in sorted(tasks)}
    total = _counts(rows)
    return {
        "format": FORMAT,
        "success_rate": total["rate"],
        "successes": total["successes"],
        "episodes": total["episodes"],
        "wilson_low": total["wilson_low"],
        "wilson_high": total["wilson_high"],
        "per_task": per_task,
        "errors": sum(1 for row in rows if row.get("error")),
        "restarts": sum(row.get("restarts", 0) for row in rows),
        "steps_of_successes": _mean([row["steps"] for row in rows if row["success"]]),
        "seconds": round(sum(row.get("seconds", 0.0) for row in rows), 3),
        "latency_ms": {
            "round_trip": _percentiles(rows, "round_trip_ms"),
            "server": _percentiles(rows, "server_ms"),
        },
        "protocol": protocol,
    }


def write_score(path: str, score: Dict[str, Any]) -> None:
    """Write JSON beside `path`, then rename: a reader never sees half a file."""
    beside = "{}.{}.tmp".format(path, os.getpid())
    try:
        with open(beside, "w", encoding="utf-8") as file:
            json.dump(score, file, indent=2, sort_keys=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        if os.path.exists(beside):
            os.remove(beside)


def load_rows(path: str) -> List[Dict[str, Any]]:
    """Rows of an episodes.jsonl; half a last line, left by a killed run, is ignored.

    Raises:
        ResultsError: naming the line that is not a row.
    """
    rows = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith("\n"):
                break
            try:
                row = json.loads(line)
                missing = {"index", "task", "seed", "instruction", "success", "steps"} - set(row)
            except (ValueError, TypeError) as error:
                raise ResultsError("{} line {}: {}".format(path, number, error)) from None
            if missing:
                raise ResultsError(
                    "{} line {}: no {}".format(path, number, ", ".join(sorted(missing)))
                )
            rows.append(row)
    return rows


def merge_rows(shards: Iterable[Sequence[Dict[str, Any]]]) -> List[Dict[str, Any]]:
    """Rows of all shards by index, each episode once: one without an error before one with.

    Raises:
        ResultsError: listing indices that stand for different episodes.
    """
    merged: Dict[int, Dict[str, Any]] = {}
    conflicts = set()
    for row in (row for shard in shards for row in shard):
        known = merged.setdefault(row["index"], row)
        if any(known[key] != row[key] for key in ("seed", "task", "instruction")):
            conflicts.add(row["index"])
        elif known.get("error") and not row.get("error"):
            merged[row["index"]] = row
    if conflicts:
        raise ResultsError(
            "these shards are not of one run: episodes {} differ in seed, task or"
            " instruction".format(sorted(conflicts)[:20])
        )
    return [merged[index] for index in sorted(merged)]


def open_run(out_dir: str, protocol: Dict[str, Any], resume: bool) -> List[Dict[str, Any]]:
    """Make `out_dir` ready for a run; returns the rows of an interrupted one.

    Raises:
        ResultsError: the folder holds results and `resume` is off, or they are of another protocol.
    """
    os.makedirs(out_dir, exist_ok=True)
    protocol = plain(protocol)
    episodes, record = os.path.join(out_dir, EPISODES), os.path.join(out_dir, PROTOCOL)
    rows = merge_rows([load_rows(episodes)]) if os.path.exists(episodes) else []
    if not rows:
        write_score(record, protocol)
        with open(episodes, "w", encoding="utf-8"):
            return []
    if not resume:
        raise ResultsError(
            "{} holds results already: resume that run, or name another folder".format(out_dir)
        )
    try:
        with open(record, encoding="utf-8") as file:
            before = json.load(file)
    except (OSError, ValueError) as error:
        raise ResultsError("{} cannot be resumed: {}".format(out_dir, error)) from None
    changed = [key for key in {**before, **protocol} if before.get(key) != protocol.get(key)]
    if changed:
        listing = "; ".join(
            "{}: {} then, {} now".format(key, before.get(key), protocol.get(key)) for key in changed
        )
        raise ResultsError("{} is of another run: {}".format(out_dir, listing))
    beside = episodes + ".tmp"
    with open(beside, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    os.replace(beside, episodes)
    return rows


def plain(value: Any) -> Any:
    """`value` as JSON gives it back; numpy numbers and arrays become numbers and lists."""
    return json.loads(json.dumps(value, default=lambda v: v.tolist()))


def load_run(path: str) -> Tuple[Dict[str, Any], List[Dict[str, Any]]]:
    """(score, rows) of a run's folder or of a score.json.

    Raises:
        ResultsError: if there is no score.
    """
    folder, name = (path, SCORE) if os.path.isdir(path) else os.path.split(path)
    score_path, episodes = os.path.join(folder, name), os.path.join(folder, EPISODES)
    try:
        with open(score_path, encoding="utf-8") as file:
            score = json.load(file)
    except (OSError, ValueError) as error:
        raise ResultsError("no score in {}: {}".format(path, error)) from None
    return score, load_rows(episodes) if os.path.exists(episodes) else []


def _counts(rows: Sequence[Dict[str, Any]]) -> Dict[str, Any]:
    successes = sum(1 for row in rows if row["success"])
    low, high = wilson(successes, len(rows))
    return {
        "successes": successes,
        "episodes": len(rows),
        "rate": successes / len(rows) if rows else 0.0,
        "wilson_low": low,
        "wilson_high": high,
    }


def _percentiles(rows: Sequence[Dict[str, Any]], key: str) -> Dict[str, Any]:
    values = [ms for row in rows for ms in row.get(key, ())]
    if not values:
        return {"count": 0, "p50": None, "p99": None}
    p50, p99 = np.percentile(values, [50, 99])
    return {"count": len(values), "p50": round(float(p50), 3), "p99": round(float(p99), 3)}


def _mean(values: Sequence[float]) -> Any:
    return sum(values) / len(values) if values else None


def _merge(folders: Sequence[str], out_dir: str) -> Dict[str, Any]:
    """Shards of one protocol -> one folder with all rows and their score."""
    protocols, shards = [], []
    for folder in folders:
        with open(os.path.join(folder, PROTOCOL), encoding="utf-8") as file:
            protocols.append(json.load(file))
        shards.append(load_rows(os.path.join(folder, EPISODES)))
    first = protocols[0]
    for index, other in enumerate(protocols):
        keys = {**first, **other}.keys() - {"episodes", "seeds"}  # a shard has its own of these
        changed = sorted(key for key in keys if first.get(key) != other.get(key))
        if changed:
            raise ResultsError(
                "{} differs from {} in {}".format(folders[index], folders[0], changed)
            )
    rows = merge_rows(shards)
    seeds = [row["seed"] for row in rows]
    protocol = dict(protocols[0], episodes=len(rows), seeds=[min(seeds), max(seeds)])
    if open_run(out_dir, protocol, resume=False):
        raise ResultsError("{} holds results already".format(out_dir))
    with open(os.path.join(out_dir, EPISODES), "w", encoding="utf-8") as file:
        file.writelines(json.dumps(dict(row, video=None)) + "\n" for row in rows)
    score = summarize(rows, protocol)
    write_score(os.path.join(out_dir, SCORE), score)
    return score


def _main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m eval_servers.results", description="Reports on and merges evaluations."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("report", help="write OUT/index.html comparing runs").add_argument
    add("--run", action="append", required=True, metavar="NAME=DIR", help="repeat for every run")
    add("--loss-log", metavar="FILE", help="log.jsonl of the training run, for the loss curve")
    add("--title", default="Evaluation", help="heading of the page")
    add("--out", required=True, metavar="DIR")
    add = commands.add_parser("merge", help="shards of one run -> one run").add_argument
    add("shards", nargs="+", metavar="DIR")
    add("--out", required=True, metavar="DIR")
    flags = parser.parse_args(arguments)
    try:
        if flags.command == "merge":
            score = _merge(flags.shards, flags.out)
            print("{successes}/{episodes} = {success_rate:.1%}".format(**score))
            return 0
        runs = {}
        for item in flags.run:
            name, separator, path = item.partition("=")
            if not separator or name in runs:
                parser.error("--run {}: write NAME=DIR, each name once".format(item))
            runs[name] = path
        from eval_servers.report import report

        print(report(runs, flags.out, loss_log=flags.loss_log, title=flags.title))
    except (OSError, ValueError) as error:
        print("results: {}".format(error), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
