"""The report's figures, as SVG inside the page. Needs matplotlib, imported when it draws."""

from __future__ import annotations

import base64
import io
from typing import Any, List, Mapping, Optional, Sequence, Tuple

# Okabe and Ito's palette, told apart by color-blind readers too.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def tasks(runs: Sequence[Any]) -> List[str]:
    """Names of all runs' tasks, in order of their first mention."""
    return list(dict.fromkeys(task for run in runs for task in run.score["per_task"]))


def bars(runs: Sequence[Any]) -> Any:
    """Success of every run (`report.Run`) by task, with intervals."""
    from matplotlib.figure import Figure

    names: List[Optional[str]] = [None, *tasks(runs)]
    thickness = 0.8 / len(runs)
    figure = Figure(figsize=(10, 0.9 + len(names) * max(0.34, 0.17 * len(runs))))
    axes = figure.add_subplot()
    for number, run in enumerate(runs):
        places, rates, below, above = [], [], [], []
        for place, task in enumerate(names):
            counts = run.counts(task)
            if counts is not None:
                places.append(place + (number - (len(runs) - 1) / 2) * thickness)
                rates.append(100 * counts["rate"])
                below.append(100 * (counts["rate"] - counts["wilson_low"]))
                above.append(100 * (counts["wilson_high"] - counts["rate"]))
        # The bar is pale so that the interval, which is what decides, stands out.
        axes.barh(places, rates, thickness * 0.86, color=run.colour, alpha=0.4, zorder=2)
        # Rounding may make a length slightly negative, which matplotlib refuses.
        errors = [[max(v, 0.0) for v in below], [max(v, 0.0) for v in above]]
        line = {"color": run.colour, "elinewidth": 1.4, "capsize": 2.5, "ms": 5, "zorder": 3}
        axes.errorbar(rates, places, xerr=errors, fmt="o", label=run.name, clip_on=False, **line)
    labels = ["all tasks" if name is None else name.replace("_", " ") for name in names]
    axes.set_yticks(range(len(names)), labels)
    axes.get_yticklabels()[0].set_fontweight("bold")
    # This line parts the total, which is the first row, from the tasks.
    axes.axhline(0.5, color="#c5ccd4", linewidth=1)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(0, 100)
    axes.set_xlabel("success, %, with 95 % interval")
    if len(runs) > 1:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(runs), frameon=False)
    _tidy(axes, "x")
    return figure


def chains(runs: Sequence[Any]) -> Any:
    """How many chains got to 1, 2, ... tasks in a row, with intervals."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.4))
    axes = figure.add_subplot()
    length = max(run.score["chains"]["length"] for run in runs)
    for number, run in enumerate(runs):
        counts = list(run.score["chains"]["solved_in_a_row"].values())
        places = [k + 1 + 0.06 * (number - (len(runs) - 1) / 2) for k in range(len(counts))]
        rates = [100 * c["rate"] for c in counts]
        errors = [
            [100 * max(c["rate"] - c["wilson_low"], 0.0) for c in counts],
            [100 * max(c["wilson_high"] - c["rate"], 0.0) for c in counts],
        ]
        line = {"color": run.colour, "capsize": 2.5, "ms": 5, "linewidth": 1.4}
        axes.errorbar(places, rates, yerr=errors, fmt="o-", label=run.name, clip_on=False, **line)
    axes.set_xticks(range(1, length + 1))
    axes.set_ylim(0, 100)
    axes.set_xlabel("tasks in a row")
    axes.set_ylabel("chains, %")
    if len(runs) > 1:
        axes.legend(frameon=False)
    _tidy(axes, "y")
    return figure


def changes(names: Sequence[str], runs: Sequence[Tuple[str, str, Mapping[str, Any]]]) -> Any:
    """Differences to a base run.

    Args:
        names: tasks, in the order of the rows.
        runs: (name, color, {task: `compare.Difference`}) of each.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 0.9 + len(names) * max(0.3, 0.16 * len(runs))))
    axes = figure.add_subplot()
    for number, (label, colour, by_task) in enumerate(runs):
        # Runs share a row, and without a shift their intervals would hide each other.
        shift = 0.5 * (number - (len(runs) - 1) / 2) / len(runs)
        points = [(place, by_task[name]) for place, name in enumerate(names) if name in by_task]
        places = [place + shift for place, _ in points]
        values = [100 * each.change for _, each in points]
        errors = [
            [100 * max(each.change - each.low, 0.0) for _, each in points],
            [100 * max(each.high - each.change, 0.0) for _, each in points],
        ]
        line = {"color": colour, "elinewidth": 1.4, "capsize": 2.5, "ms": 5, "zorder": 3}
        axes.errorbar(values, places, xerr=errors, fmt="o", label=label, clip_on=False, **line)
    axes.axvline(0, color="#5d6b7a", linewidth=1)
    axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    axes.get_yticklabels()[0].set_fontweight("bold")
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(-100, 100)
    axes.set_xlabel("difference of success, percentage points, with 95 % interval")
    if len(runs) > 1:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(runs), frameon=False)
    _tidy(axes, "x")
    return figure


def losses(curves: Mapping[str, Sequence[Tuple[float, float]]]) -> Any:
    """Training curves, kind -> [(step, loss)]."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.4))
    axes = figure.add_subplot()
    for number, (kind, points) in enumerate(sorted(curves.items(), reverse=True)):
        steps, values = [p[0] for p in points], [p[1] for p in points]
        # Dots of a long curve would merge into a thick band.
        marker = "o" if len(points) <= 30 else ""
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(steps, values, color=colour, label=kind, linewidth=1.4, marker=marker, ms=4)
    # A logarithmic axis cannot show zero or negative losses.
    if min(loss for points in curves.values() for _, loss in points) > 0:
        axes.set_yscale("log", subs=(2, 5))
        for axis in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            axis("{x:g}")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss")
    axes.legend(frameon=False)
    _tidy(axes, "both")
    return figure


def _tidy(axes: Any, grid: str) -> None:
    axes.grid(axis=grid, color="#e6eaee", zorder=0)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(which="both", length=0, pad=6)


def picture(figure: Any, alt: str) -> str:
    """The figure as an <img> that holds itself."""
    import matplotlib

    buffer = io.BytesIO()
    # A fixed salt and no date: the same scores give the same file.
    with matplotlib.rc_context({"svg.hashsalt": alt, "font.size": 10}):
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return '<img class="plot" alt="{}" src="data:image/svg+xml;base64,{}">'.format(alt, data)
