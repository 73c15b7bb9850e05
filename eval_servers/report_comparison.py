"""The report's comparing parts: differences to a base run, perturbed suites, chains of tasks."""

from __future__ import annotations

import html
from typing import Any, Dict, List, Optional, Sequence, Tuple

from eval_servers import compare, plots
from eval_servers.intervals import difference

ALL = "all tasks"
_NOTE = (
    '<p class="note">Percentage points more than {} on the same episodes, with the 95&nbsp;%'
    " interval of a paired difference (Newcombe 1998). Bold where the interval leaves out zero.</p>"
)


# What a perturbed run may differ in from the plain one that it stands beside.
_PERTURBED = ("suite", "perturbation", "episodes", "seeds", "simulator.first_frames")
_DROP_NOTE = (
    '<p class="note">Success on the plain suite and on each perturbed one, with the change in'
    " percentage points and its 95&nbsp;% interval, taken as independent episodes (Newcombe 1998)."
    " Bold where the interval leaves out zero. The suites are never averaged.</p>"
)


def differences(runs: Sequence[Any]) -> str:
    """Every run after the first against the first, or why they cannot be compared.

    Args:
        runs: `report.Run`.
    """
    base, paragraphs = runs[0], []
    shown: List[Tuple[Any, Dict[str, compare.Difference]]] = []
    for run in runs[1:]:
        pair = {base.name: base.score["protocol"], run.name: run.score["protocol"]}
        try:
            compare.require_same(pair, "take a difference", compare.COMPARABLE)
        # The page goes on without this pair: its own numbers are still worth reading.
        except compare.ProtocolError as error:
            paragraphs.append(_paragraph(str(error)))
            continue
        by_task = compare.differences(run.rows, base.rows)
        if not by_task:
            paragraphs.append(_paragraph("{} and {} share no episode".format(base.name, run.name)))
            continue
        shown.append((run, {ALL if name is None else name: d for name, d in by_task.items()}))
        paragraphs.append(_starts(base, run))
    if not shown:
        return "".join(paragraphs)
    # Runs may have evaluated different tasks, so a cell of the table may be empty.
    tasks = {name for _, by_task in shown for name in by_task} - {ALL}
    names = [ALL, *sorted(tasks)]
    drawn = [(run.name, run.colour, by_task) for run, by_task in shown]
    picture = plots.picture(plots.changes(names, drawn), "differences by task")
    head = "".join("<th>{}</th>".format(html.escape(run.name)) for run, _ in shown)
    body = [
        "<tr{}><td>{}</td>{}</tr>".format(
            ' class="total"' if name == ALL else "",
            html.escape(name.replace("_", " ")),
            "".join(_cell(by_task.get(name)) for _, by_task in shown),
        )
        for name in names
    ]
    table = "<table><tr><th>task</th>{}</tr>{}</table>".format(head, "".join(body))
    return picture + table + _NOTE.format(html.escape(base.name)) + "".join(paragraphs)


def chains(runs: Sequence[Any]) -> str:
    """Table of the rates of 1, 2, ... tasks in a row and of their average.

    Args:
        runs: `report.Run` whose scores have chains.
    """
    length = max(run.score["chains"]["length"] for run in runs)
    head = "".join("<th>{}</th>".format(k) for k in range(1, length + 1))
    body = []
    for run in runs:
        chain_score = run.score["chains"]
        cells = [
            "{:.1f}&nbsp;%".format(100 * counts["rate"])
            for counts in chain_score["solved_in_a_row"].values()
        ]
        # Runs with shorter chains have fewer columns.
        cells += ["&ndash;"] * (length - len(cells))
        average = "{average_solved:.2f}<small>{average_low:.2f}&ndash;{average_high:.2f}</small>"
        cells.append(average.format(**chain_score))
        body.append(
            "<tr><td>{}</td>{}</tr>".format(
                html.escape(run.name), "".join("<td>{}</td>".format(cell) for cell in cells)
            )
        )
    return "<table><tr><th>in a row</th>{}<th>average</th></tr>{}</table>".format(
        head, "".join(body)
    )


def perturbed(runs: Sequence[Any]) -> str:
    """Each plain suite beside what the same policy does on its perturbed ones.

    Args:
        runs: `report.Run`, of which some have a perturbation in their protocol.
    """
    shown = []
    for run in runs:
        kind = run.score["protocol"].get("perturbation")
        if not kind:
            continue
        # The first that fits: two plain runs of one policy would be equally good.
        base = next((other for other in runs if _is_plain_of(other, run)), None)
        if base is None:
            shown.append(
                _paragraph(
                    "{}: no run here is of the plain suite under the same protocol and policy,"
                    " to stand beside {}".format(run.name, run.score["protocol"]["suite"])
                )
            )
            continue
        tasks = [task for task in run.score["per_task"] if task in base.score["per_task"]]
        rows = [
            "<tr{}><td>{}</td>{}</tr>".format(
                ' class="total"' if task is None else "",
                ALL if task is None else html.escape(task.replace("_", " ")),
                _drop(base.counts(task), run.counts(task)),
            )
            for task in [None, *tasks]
        ]
        heads = ["task", base.name, "{} ({})".format(run.name, kind), "change"]
        head = "".join("<th>{}</th>".format(html.escape(text)) for text in heads)
        shown.append("<table><tr>{}</tr>{}</table>".format(head, "".join(rows)))
    return "".join(shown) + _DROP_NOTE


def _is_plain_of(base: Any, run: Any) -> bool:
    """Whether a run is of the plain suite that another perturbs, and else the same."""
    plain, other = base.score["protocol"], run.score["protocol"]
    return (
        not plain.get("perturbation")
        and other["suite"] == "{}_{}".format(plain.get("suite"), other["perturbation"])
        and not compare.differing(plain, other, _PERTURBED)
    )


def _drop(base: Dict[str, Any], run: Dict[str, Any]) -> str:
    # Unpaired: a perturbed scene is another initial state, so episodes do not match.
    low, high = difference(run["successes"], run["episodes"], base["successes"], base["episodes"])
    change = "{:+.0f}".format(100 * (run["rate"] - base["rate"]))
    # Bold where the interval excludes zero, as only that is evidence of a change.
    if low > 0 or high < 0:
        change = "<b>{}</b>".format(change)
    cells = [
        "{:.0f}&nbsp;%<small>{}/{}</small>".format(100 * c["rate"], c["successes"], c["episodes"])
        for c in (base, run)
    ]
    cells.append("{}<small>{:+.0f} to {:+.0f}</small>".format(change, 100 * low, 100 * high))
    return "".join("<td>{}</td>".format(cell) for cell in cells)


def _starts(base: Any, run: Any) -> str:
    other, shared = compare.other_starts(run.rows, base.rows)
    if not other:
        return ""
    return _paragraph(
        "{} of {} episodes of {} start with other pixels than those of {}: the renderer, the scene"
        " or the initial states are not the same, so this comparison may mislead".format(
            other, shared, run.name, base.name
        )
    )


def _cell(paired: Optional[compare.Difference]) -> str:
    if paired is None:
        return "<td>&ndash;</td>"
    change = "{:+.0f}".format(100 * paired.change)
    # Bold where the interval excludes zero, as only that is evidence of a change.
    if paired.low > 0 or paired.high < 0:
        change = "<b>{}</b>".format(change)
    return "<td>{}<small>{:+.0f} to {:+.0f} &middot; {} episodes</small></td>".format(
        change, 100 * paired.low, 100 * paired.high, paired.episodes
    )


def _paragraph(text: str) -> str:
    return '<p class="note no">{}.</p>'.format(html.escape(text[:1].upper() + text[1:]))
