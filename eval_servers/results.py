"""Episode rows -> score: success rates with Wilson 95 % intervals, latencies, and the protocol.

    python -m eval_servers.results report --run trained=DIR --run untrained=DIR --out DIR
    python -m eval_servers.results merge DIR DIR ... --out DIR

Rows are written by `rollout.py`; a run's folder is described there. A score carries its protocol,
and nothing here mixes episodes of different ones.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from dataclasses import replace
from typing import Any, Dict, Iterable, List, Optional, Sequence, Tuple

import numpy as np

from eval_servers import compare
from eval_servers.intervals import Z95, wilson
from eval_servers.row import Row

EPISODES, SCORE, PROTOCOL = "episodes.jsonl", "score.json", "protocol.json"
FORMAT = 2  # of score.json; 1 counted crashes of the simulator as failures of the policy


class ResultsError(ValueError):
    """Results that cannot be read, merged or written over."""


def summarize(
    rows: Sequence[Row],
    protocol: Dict[str, Any],
    conditions: Optional[Dict[str, Any]] = None,
) -> Dict[str, Any]:
    """The score of a run: what goes into score.json.

    An episode whose simulator died says nothing about the policy: such rows (with an `error`) are
    counted as `crashes`, apart from the rates. `missing` are episodes of the protocol without a
    row, so a partial score cannot pass for a whole one.

    Args:
        rows: of all episodes, each once.
        protocol: everything that decides what the score means; its "episodes" is how many there
            should be.
        conditions: what may differ between runs of one protocol: machine, versions, times.
    """
    # Rates are over episodes that ran; counting crashes would blame the policy for the simulator.
    ran = [row for row in rows if not row.error]
    tried: Dict[str, List[bool]] = {}
    for stage in (stage for row in ran for stage in row.tried):
        tried.setdefault(stage.task, []).append(stage.success)
    total = _counts([row.success for row in ran])
    return {
        "format": FORMAT,
        "success_rate": total["rate"],
        "successes": total["successes"],
        "episodes": total["episodes"],
        "crashes": len(rows) - len(ran),
        "missing": max(protocol.get("episodes", len(rows)) - len(rows), 0),
        "wilson_low": total["wilson_low"],
        "wilson_high": total["wilson_high"],
        "per_task": {task: _counts(tried[task]) for task in sorted(tried)},
        "restarts": sum(row.restarts for row in rows),
        "steps_of_successes": _mean([row.steps for row in ran if row.success]),
        "requests": sum(len(row.round_trip_ms) for row in ran),
        "seconds": round(sum(row.seconds for row in rows), 3),
        "latency_ms": {
            "round_trip": _percentiles([row.round_trip_ms for row in ran]),
            "server": _percentiles([row.server_ms for row in ran]),
        },
        **_chains(ran),
        "protocol": protocol,
        "conditions": conditions or {},
    }


def ranges(values: Iterable[int]) -> str:
    """Whole numbers, exactly and briefly: [3, 1, 2, 7] -> "1-3,7"."""
    spans: List[List[int]] = []
    for value in sorted(set(values)):
        if spans and value == spans[-1][1] + 1:
            spans[-1][1] = value
        else:
            spans.append([value, value])
    return ",".join(str(a) if a == b else "{}-{}".format(a, b) for a, b in spans)


def write_score(path: str, score: Dict[str, Any]) -> None:
    """Write JSON beside `path`, then rename: a reader never sees half a file."""
    beside = "{}.{}.tmp".format(path, os.getpid())
    try:
        with open(beside, "w", encoding="utf-8") as file:
            json.dump(score, file, indent=2, sort_keys=False)
            file.write("\n")
            file.flush()
            # Without this a crash of the machine may leave the new name with an empty file.
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        if os.path.exists(beside):
            os.remove(beside)


def load_rows(path: str) -> List[Row]:
    """Rows of an episodes.jsonl; half a last line, left by a killed run, is ignored.

    Raises:
        ResultsError: naming the line that is not a row.
    """
    rows = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            # Rows are appended one after another, so only the last line can be torn.
            if not line.endswith("\n"):
                break
            try:
                rows.append(Row.from_json(json.loads(line)))
            except (ValueError, TypeError, KeyError) as error:
                raise ResultsError("{} line {}: {}".format(path, number, error)) from None
    return rows


def merge_rows(shards: Iterable[Sequence[Row]]) -> List[Row]:
    """Rows of all shards by index, each episode once: one without an error before one with.

    Raises:
        ResultsError: listing indices that stand for different episodes.
    """
    merged: Dict[int, Row] = {}
    conflicts = set()
    for row in (row for shard in shards for row in shard):
        earlier = merged.setdefault(row.index, row)
        # One index that stands for two episodes means shards of different runs.
        if (earlier.key, earlier.instruction) != (row.key, row.instruction):
            conflicts.add(row.index)
        elif earlier.error and not row.error:
            merged[row.index] = row
    if conflicts:
        raise ResultsError(
            "these shards are not of one run: episodes {} differ in seed, task or"
            " instruction".format(sorted(conflicts)[:20])
        )
    return [merged[index] for index in sorted(merged)]


def open_run(out_dir: str, protocol: Dict[str, Any], resume: bool) -> List[Row]:
    """Make `out_dir` ready for a run; returns the rows of an interrupted one.

    Raises:
        ResultsError: the folder holds results and `resume` is off, or they are of another protocol.
    """
    os.makedirs(out_dir, exist_ok=True)
    protocol = plain(protocol)
    episodes, record = os.path.join(out_dir, EPISODES), os.path.join(out_dir, PROTOCOL)
    rows = merge_rows([load_rows(episodes)]) if os.path.exists(episodes) else []
    # A run that was stopped before its first episode leaves nothing worth protecting.
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
    # Rows of two protocols in one file would give a score that means neither.
    changed = compare.differing(before, protocol)
    if changed:
        listing = "; ".join("{}: {} then, {} now".format(k, *pair) for k, pair in changed.items())
        raise ResultsError("{} is of another run: {}".format(out_dir, listing))
    # Half a last line would run into the first row that is appended, and spoil both.
    replace_rows(episodes, rows)
    return rows


def one_line(score: Dict[str, Any]) -> str:
    """`success 70.0 % (7/10, 95 % interval 39.7 to 89.2 %)` and what else must be said."""
    line = "success {:.1f} % ({}/{}, 95 % interval {:.1f} to {:.1f} %)".format(
        100 * score["success_rate"],
        score["successes"],
        score["episodes"],
        100 * score["wilson_low"],
        100 * score["wilson_high"],
    )
    if score.get("chains"):
        line += "; {average_solved:.2f} tasks in a row on average".format(**score["chains"])
    if score["crashes"]:
        line += "; {} episodes lost to crashes of the simulator".format(score["crashes"])
    if score["missing"]:
        line += "; {} episodes are still missing".format(score["missing"])
    return line


def plain(value: Any) -> Any:
    """`value` as JSON gives it back; numpy numbers and arrays become numbers and lists."""
    return json.loads(json.dumps(value, default=lambda v: v.tolist()))


def load_run(path: str) -> Tuple[Dict[str, Any], List[Row]]:
    """(score, rows) of a run's folder or of a score.json.

    Raises:
        ResultsError: if there is no score.
    """
    # Rows lie beside the score, whichever of the two was named.
    folder, name = (path, SCORE) if os.path.isdir(path) else os.path.split(path)
    score_path, episodes = os.path.join(folder, name), os.path.join(folder, EPISODES)
    try:
        with open(score_path, encoding="utf-8") as file:
            score = json.load(file)
    except (OSError, ValueError) as error:
        raise ResultsError("no score in {}: {}".format(path, error)) from None
    # Format 1 counted crashes as failures, so its rates cannot stand beside these.
    if not isinstance(score, dict) or score.get("format") != FORMAT:
        version = score.get("format") if isinstance(score, dict) else None
        raise ResultsError(
            "{} is a score of format {}, this version reads format {}: evaluate again".format(
                score_path, version, FORMAT
            )
        )
    return score, load_rows(episodes) if os.path.exists(episodes) else []


def _counts(outcomes: Sequence[bool]) -> Dict[str, Any]:
    successes = sum(1 for success in outcomes if success)
    low, high = wilson(successes, len(outcomes))
    return {
        "successes": successes,
        "episodes": len(outcomes),
        "rate": successes / len(outcomes) if outcomes else 0.0,
        "wilson_low": low,
        "wilson_high": high,
    }


def _chains(rows: Sequence[Row]) -> Dict[str, Any]:
    """Summarize how far episodes with several `tasks` in a row get."""
    length = max((len(row.tasks) for row in rows), default=0)
    if length < 2:
        return {}
    solved = [row.solved_in_a_row for row in rows]
    mean = sum(solved) / len(solved)
    # Standard deviation of the sample (n - 1), for a normal interval of the mean.
    spread = math.sqrt(sum((n - mean) ** 2 for n in solved) / max(len(solved) - 1, 1))
    reach = Z95 * spread / math.sqrt(len(solved))
    # Strings as keys, because JSON would make them strings anyway.
    at_least = {str(k): _counts([n >= k for n in solved]) for k in range(1, length + 1)}
    return {
        "chains": {
            "length": length,
            "average_solved": mean,
            "average_low": max(mean - reach, 0.0),
            "average_high": min(mean + reach, float(length)),
            "solved_in_a_row": at_least,
        }
    }


def _percentiles(latencies: Sequence[Sequence[float]]) -> Dict[str, Any]:
    # Pooled over requests, so that long episodes count for more.
    values = [ms for episode in latencies for ms in episode]
    if not values:
        return {"count": 0, "p50": None, "p99": None}
    p50, p99 = np.percentile(values, [50, 99])
    return {"count": len(values), "p50": round(float(p50), 3), "p99": round(float(p99), 3)}


def _mean(values: Sequence[float]) -> Any:
    return sum(values) / len(values) if values else None


def merge(folders: Sequence[str], out_dir: str) -> Dict[str, Any]:
    """Shards of one run -> one folder with all rows, where their videos are, and the score.

    Rows that `out_dir` holds already take part, so merging again adds what has come since.

    Raises:
        compare.ProtocolError: the shards are of different protocols; lists the keys.
        ResultsError: they overlap with different episodes, or `out_dir` holds another run.
    """
    protocols: Dict[str, Dict[str, Any]] = {}
    shards, conditions = [], []
    for folder in folders:
        with open(os.path.join(folder, PROTOCOL), encoding="utf-8") as file:
            protocols[folder] = json.load(file)
        rows = load_rows(os.path.join(folder, EPISODES))
        shards.append([_moved(row, folder, out_dir) for row in rows])
        conditions.append(_conditions(folder))
    # Refused before anything is written to `out_dir`.
    compare.require_same(protocols, "merge")
    protocol = protocols[folders[0]]
    rows = merge_rows([*shards, open_run(out_dir, protocol, resume=True)])
    score = summarize(rows, protocol, {"shards": conditions})
    replace_rows(os.path.join(out_dir, EPISODES), rows)
    write_score(os.path.join(out_dir, SCORE), score)
    return score


def replace_rows(path: str, rows: Sequence[Row]) -> None:
    """Write rows beside `path`, then rename."""
    beside = "{}.{}.tmp".format(path, os.getpid())
    with open(beside, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row.to_json()) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def _moved(row: Row, folder: str, out_dir: str) -> Row:
    if not row.video:
        return row
    # Videos stay in their shard's folder; only the path that leads there changes.
    return replace(row, video=os.path.relpath(os.path.join(folder, row.video), out_dir))


def _conditions(folder: str) -> Dict[str, Any]:
    try:
        with open(os.path.join(folder, SCORE), encoding="utf-8") as file:
            return json.load(file).get("conditions", {})
    except (OSError, ValueError):  # a shard that is still running has no score yet
        return {}


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
            print(one_line(merge(flags.shards, flags.out)))
            return 0
        runs = {}
        for item in flags.run:
            name, separator, path = item.partition("=")
            if not separator or name in runs:
                parser.error("--run {}: write NAME=DIR, each name once".format(item))
            runs[name] = path
        # Imported here, as merging needs no matplotlib.
        from eval_servers.report import report

        print(report(runs, flags.out, loss_log=flags.loss_log, title=flags.title))
    except ImportError as error:
        print("results: {}; pip install matplotlib".format(error), file=sys.stderr)
        return 1
    except (OSError, ValueError) as error:
        print("results: {}".format(error), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
