"""Runs on SimplerEnv side by side, one table a setting, and against the real robot.

    python -m eval_servers.simpler.scores --run kosmos=DIR --run kosmos=DIR --run paligemma=DIR ...
    python -m eval_servers.simpler.scores --run rt-1-x=DIR ... --run mine=DIR --real=REAL.json

Runs of the same NAME are one policy's tasks and settings. Nothing here is averaged over settings or
robots: their rates are different quantities. Where four or more policies have a real-robot result
for a task (published ones by their published names, others from --real: {task: {policy: rate}}) it
gives the mean maximum rank violation and Pearson's correlation, for each setting.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any, Dict, List, Mapping, NamedTuple, Sequence, Tuple

from eval_servers import compare, results
from eval_servers.intervals import wilson
from eval_servers.simpler.published import REAL, agreement
from eval_servers.simpler.tasks import TASKS, robot_of

# Two runs of one table may differ in these: the policy, and which tasks it was given.
_MAY_DIFFER = (*compare.COMPARABLE, "tasks", "max_steps", "simulator.cameras")

Tables = Dict[str, Dict[str, Dict[str, "Cell"]]]  # setting -> task -> policy -> its result


class Cell(NamedTuple):
    """One policy on one task in one setting.

    Attributes:
        successes: of the episodes below.
        episodes: that ran to their end.
        absent: parts of the task that were not run, and how many episodes are missing or crashed.
    """

    successes: int
    episodes: int
    absent: str = ""

    @property
    def rate(self) -> float:
        """Success rate, in 0..1."""
        return self.successes / self.episodes if self.episodes else 0.0


def collect(runs: Sequence[Tuple[str, str]]) -> Tables:
    """Read runs into one table a setting.

    Args:
        runs: (policy, folder).

    Raises:
        results.ResultsError: a run has no score, is not of SimplerEnv, or gives a task again.
        compare.ProtocolError: runs of one setting and robot are of different protocols.
    """
    tables: Tables = {}
    protocols: Dict[Tuple[str, str], Dict[str, Dict[str, Any]]] = {}
    for policy, folder in runs:
        score, _ = results.load_run(folder)
        protocol = score["protocol"]
        if protocol.get("environment") != "simpler":
            raise results.ResultsError("{} is no run of SimplerEnv".format(folder))
        setting = protocol["setting"]
        group = protocols.setdefault((setting, protocol["robot"]), {})
        group["{} ({})".format(policy, folder)] = protocol
        # Episodes without an outcome, which make a mean incomplete.
        lost = score["missing"] + score["crashes"]
        for task, cell in _cells(score["per_task"], setting, lost).items():
            cells = tables.setdefault(setting, {}).setdefault(task, {})
            if policy in cells:
                raise results.ResultsError(
                    "{} gives {} in {} of {} a second time".format(folder, task, setting, policy)
                )
            cells[policy] = cell
    for (setting, robot), by_run in protocols.items():
        purpose = "put runs of {} on {} side by side".format(setting, robot)
        compare.require_same(by_run, purpose, _MAY_DIFFER)
    return tables


def _cells(per_task: Mapping[str, Any], setting: str, lost: int) -> Dict[str, Cell]:
    cells: Dict[str, Cell] = {}
    grouped = {part: name for name, parts in TASKS.items() for part in parts}
    for task, counts in per_task.items():
        # The prepackaged setting runs environments by themselves, not as parts of a published task.
        name = grouped.get(task, task) if setting != "prepackaged" else task
        # Parts are added up, since a task's mean is over its episodes.
        before = cells.get(name, Cell(0, 0))
        solved = before.successes + counts["successes"]
        cells[name] = Cell(solved, before.episodes + counts["episodes"])
    for name, cell in cells.items():
        parts = TASKS.get(name, ()) if setting != "prepackaged" else ()
        without = [part for part in parts if part not in per_task]
        reasons = ["without " + ", ".join(without)] if without else []
        reasons += ["{} episodes missing or crashed".format(lost)] if lost else []
        cells[name] = cell._replace(absent="; ".join(reasons))
    return cells


def average(tables: Tables, policy: str, cells: Sequence[Tuple[str, str]]) -> float:
    """Mean of a policy's rates over tasks, each counting the same.

    Args:
        tables: see `collect`.
        policy: whose.
        cells: (setting, task) each.

    Raises:
        ValueError: they are of several settings or robots, or one is not there.
    """
    settings = sorted({setting for setting, _ in cells})
    robots = sorted({robot_of(task) for _, task in cells})
    # Settings draw the same task differently, so their rates answer different questions.
    if len(settings) != 1 or len(robots) != 1:
        raise ValueError(
            "rates of different settings or robots are different quantities and have no mean: {};"
            " {}".format(", ".join(settings), ", ".join(robots))
        )
    absent = [task for setting, task in cells if policy not in tables[setting].get(task, {})]
    if absent:
        raise ValueError("{} has no result for {}".format(policy, ", ".join(absent)))
    return sum(tables[setting][task][policy].rate for setting, task in cells) / len(cells)


def text(tables: Tables, real: Mapping[str, Mapping[str, float]]) -> str:
    """All tables, with agreement where enough policies have a real-robot result."""
    lines: List[str] = []
    for setting, tasks in tables.items():
        lines += ["", setting.replace("_", " ")]
        policies = list(dict.fromkeys(name for cells in tasks.values() for name in cells))
        for task in sorted(tasks):
            lines.append("  " + task)
            for policy in policies:
                if policy in tasks[task]:
                    lines.append("    " + _told(policy, tasks[task][policy], real.get(task, {})))
            lines.append("    " + _agreement(tasks[task], real.get(task, {})))
        for robot in sorted({robot_of(task) for task in tasks}):
            cells = [(setting, task) for task in sorted(tasks) if robot_of(task) == robot]
            for policy in policies if len(cells) > 1 else []:
                # A mean over fewer tasks is another quantity, so a policy that lacks one gets none.
                if all(policy in tasks[task] for _, task in cells):
                    mean = average(tables, policy, cells)
                    template = "  {}: mean of these {} tasks of {} {:.1%}"
                    lines.append(template.format(policy, len(cells), robot, mean))
    # Every setting begins with an empty line, which the first one does not need.
    return "\n".join(lines[1:])


def _told(policy: str, cell: Cell, real: Mapping[str, float]) -> str:
    low, high = wilson(cell.successes, cell.episodes)
    line = "{:20s} {:6.1%} ({}/{}, 95 % interval {:.1%} to {:.1%})".format(
        policy, cell.rate, cell.successes, cell.episodes, low, high
    )
    if policy in real:
        line += ", real robot {:.1%}".format(real[policy])
    return line + (" [{}]".format(cell.absent) if cell.absent else "")


def _agreement(cells: Mapping[str, Cell], real: Mapping[str, float]) -> str:
    # A rate over a part of the episodes would rank a policy by which ones ran.
    rates = {policy: cell.rate for policy, cell in cells.items() if not cell.absent}
    if not real:
        return "no real-robot results"
    try:
        result = agreement(rates, real)
    except ValueError as error:
        return "no MMRV: {}".format(error)
    template = "MMRV {:.3f}, Pearson {:.3f} ({})"
    return template.format(result.mmrv, result.pearson, ", ".join(result.policies))


def read_real(path: str) -> Dict[str, Dict[str, float]]:
    """The published table with a file's results added: {task: {policy: rate in 0..1}}.

    Raises:
        ValueError: the file is of another form, or contradicts the table.
    """
    table = {task: dict(rates) for task, rates in REAL.items()}
    if not path:
        return table
    with open(path, encoding="utf-8") as file:
        added = json.load(file)
    if not isinstance(added, dict) or not all(isinstance(v, dict) for v in added.values()):
        raise ValueError("{}: write {{task: {{policy: rate}}}}".format(path))
    for task, rates in added.items():
        for policy, rate in rates.items():
            if not isinstance(rate, (int, float)) or not 0 <= rate <= 1:
                raise ValueError("{}: {} {}: {!r} is no rate".format(path, task, policy, rate))
            # A file may repeat a published number, but must not silently replace it.
            if table.setdefault(task, {}).setdefault(policy, float(rate)) != rate:
                raise ValueError("{}: {} {} is published otherwise".format(path, task, policy))
    return table


def _main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m eval_servers.simpler.scores",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--run", action="append", required=True, metavar="NAME=DIR", help="repeat for every run")
    add("--real", default="", metavar="FILE", help="further real-robot results, JSON")
    flags = parser.parse_args(arguments)
    runs = []
    for item in flags.run:
        name, separator, folder = item.partition("=")
        if not separator:
            parser.error("--run {}: write NAME=DIR".format(item))
        runs.append((name, folder))
    try:
        print(text(collect(runs), read_real(flags.real)))
    except (OSError, ValueError) as error:
        print("scores: {}".format(error), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
