"""Runs -> one self-contained page: success with intervals, plots, loss curve, videos, protocol.

Needs matplotlib, which only this file imports, and only when it draws.
"""

from __future__ import annotations

import base64
import html
import io
import json
import os
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from eval_servers import results

# Okabe and Ito's palette, told apart by colour-blind readers too.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MAX_VIDEOS = 12  # embedded per run; the page stays of a size that mails

_STYLE = """
:root{--ink:#1d2733;--soft:#5d6b7a;--line:#dfe4ea;--back:#f6f7f9}
*{box-sizing:border-box}
body{margin:0;background:var(--back);color:var(--ink);
 font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1080px;margin:0 auto;padding:32px 20px 60px}
h1{font-size:28px;margin:0 0 4px} h2{font-size:19px;margin:0 0 14px}
p.sub{color:var(--soft);margin:0 0 24px} .note{color:var(--soft);font-size:13px;margin:12px 0 0}
section{background:#fff;border:1px solid var(--line);border-radius:10px;padding:22px 24px;
 margin:0 0 22px;overflow-x:auto}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(200px,1fr));gap:16px;
 margin:0 0 22px}
.tile{background:#fff;border:1px solid var(--line);border-top:5px solid;border-radius:10px;
 padding:14px 18px}
.tile b{display:block;font-size:34px;line-height:1.2;font-variant-numeric:tabular-nums}
.tile span{color:var(--soft);font-size:13px;display:block} .tile strong{font-weight:600}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:6px 12px;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}
th{font-size:13px;color:var(--soft);font-weight:600} tr:last-child td{border-bottom:0}
tr.total td{font-weight:600;background:var(--back)}
td small{color:var(--soft);font-weight:400;margin-left:6px;white-space:nowrap}
.bar{height:5px;border-radius:3px;background:var(--line);margin-top:3px;min-width:90px}
.bar i{display:block;height:5px;border-radius:3px}
.films{display:grid;grid-template-columns:repeat(auto-fill,minmax(230px,1fr));gap:16px}
figure{margin:0;border:1px solid var(--line);border-radius:8px;overflow:hidden;background:#fff}
figure img{display:block;width:100%;image-rendering:auto}
figcaption{padding:8px 12px;font-size:13px} figcaption em{color:var(--soft)}
.ok,.no{font-weight:600} .ok{color:#00734f} .no{color:#b3410a}
img.plot{width:100%;height:auto;display:block} td.differs{background:#fff6e0}
h3{font-size:15px;margin:18px 0 10px} h3:first-of-type{margin-top:0} td.wrap{word-break:break-word}
"""


def report(
    runs: Mapping[str, str],
    out_dir: str,
    loss_log: Optional[str] = None,
    title: str = "Evaluation",
) -> str:
    """Write OUT/index.html comparing `runs`; returns its path.

    Args:
        runs: name -> folder of the run, or its score.json (then without videos of other folders).
        out_dir: OUT, made if missing.
        loss_log: log.jsonl of the training run.
        title: heading.

    Raises:
        results.ResultsError: a run has no score, or the log has no loss.
        ImportError: matplotlib is missing.
    """
    loaded = []
    for index, (name, path) in enumerate(runs.items()):
        score, rows = results.load_run(path)
        folder = path if os.path.isdir(path) else os.path.dirname(path)
        loaded.append(_Run(name, folder, COLOURS[index % len(COLOURS)], score, rows))
    if not loaded:
        raise results.ResultsError("name at least one run")
    losses = read_losses(loss_log) if loss_log else None
    parts = [
        "<h1>{}</h1>{}".format(html.escape(title), _subtitle(loaded)),
        '<div class="tiles">{}</div>'.format("".join(_tile(run) for run in loaded)),
        _section("Success by task", _picture(_draw_bars(loaded), "success rates with intervals")),
        _section("The numbers", _table(loaded) + _WILSON_NOTE),
    ]
    if losses:
        parts.append(_section("Training loss", _picture(_draw_losses(losses), "loss over steps")))
    films = "".join(_films(run) for run in loaded)
    if films:
        parts.append(_section("Episodes", films))
    parts.append(_section("Speed", _speed(loaded)))
    parts.append(_section("Protocol", _protocol(loaded)))
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        "<title>{}</title><style>{}</style></head><body><main>{}</main></body></html>\n"
    ).format(html.escape(title), _STYLE, "\n".join(parts))
    os.makedirs(out_dir, exist_ok=True)
    path = os.path.join(out_dir, "index.html")
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        file.write(page)
    os.replace(path + ".tmp", path)
    return path


def read_losses(path: str) -> Dict[str, List[Tuple[float, float]]]:
    """Training log -> {"train": [(step, loss)], "eval": ...}, without rows of no finite loss.

    Raises:
        results.ResultsError: if no row has a "step" and a "loss".
    """
    curves: Dict[str, List[Tuple[float, float]]] = {}
    with open(path, encoding="utf-8") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:  # the last line of a run that is still writing
                continue
            if not isinstance(row, dict):
                continue
            step, loss = row.get("step"), row.get("loss")
            if isinstance(step, (int, float)) and isinstance(loss, (int, float)):
                curves.setdefault(str(row.get("kind", "train")), []).append((step, loss))
    if not curves:
        raise results.ResultsError("{} has no row with a step and a loss".format(path))
    return curves


class _Run:
    def __init__(self, name: str, folder: str, colour: str, score: Dict, rows: List[Dict]) -> None:
        self.name, self.folder, self.colour = name, folder, colour
        self.score, self.rows = score, rows

    def counts(self, task: Optional[str]) -> Optional[Dict[str, Any]]:
        """Counts of one task (None if the run lacks it) or, without a task, of all."""
        if task is None:
            return dict(self.score, rate=self.score["success_rate"])
        return self.score["per_task"].get(task)


_WILSON_NOTE = (
    '<p class="note">Successes of episodes, with the Wilson 95&nbsp;% interval of the success rate.'
    " Runs whose intervals overlap may be equally good.</p>"
)


def _tasks(runs: Sequence[_Run]) -> List[str]:
    return list(dict.fromkeys(task for run in runs for task in run.score["per_task"]))


def _section(heading: str, body: str) -> str:
    return "<section><h2>{}</h2>{}</section>".format(html.escape(heading), body)


def _subtitle(runs: Sequence[_Run]) -> str:
    protocol = runs[0].score["protocol"]
    told = "{} &middot; {} tasks &middot; {} episodes a run".format(
        html.escape(str(protocol.get("environment", "?"))),
        len(_tasks(runs)),
        " / ".join(dict.fromkeys(str(run.score["episodes"]) for run in runs)),
    )
    return '<p class="sub">{}</p>'.format(told)


def _tile(run: _Run) -> str:
    score = run.score
    errors = " &middot; {} errors".format(score["errors"]) if score.get("errors") else ""
    return (
        '<div class="tile" style="border-top-color:{}"><strong>{}</strong><b>{:.1f}&nbsp;%</b>'
        "<span>{}/{} episodes{}</span><span>95&nbsp;% interval {}</span></div>"
    ).format(
        run.colour,
        html.escape(run.name),
        100 * score["success_rate"],
        score["successes"],
        score["episodes"],
        errors,
        _interval(score),
    )


def _interval(counts: Mapping[str, Any]) -> str:
    return "{:.0f}&ndash;{:.0f}&nbsp;%".format(
        100 * counts["wilson_low"], 100 * counts["wilson_high"]
    )


def _table(runs: Sequence[_Run]) -> str:
    head = "".join("<th>{}</th>".format(html.escape(run.name)) for run in runs)
    body = []
    for task in [None, *_tasks(runs)]:
        cells = "".join(_cell(run.counts(task), run.colour) for run in runs)
        name = "all tasks" if task is None else html.escape(task.replace("_", " "))
        row = "<tr{}><td>{}</td>{}</tr>"
        body.append(row.format(' class="total"' if task is None else "", name, cells))
    return "<table><tr><th>task</th>{}</tr>{}</table>".format(head, "".join(body))


def _cell(counts: Optional[Mapping[str, Any]], colour: str) -> str:
    if counts is None:
        return "<td>&ndash;</td>"
    return (
        "<td>{:.0f}&nbsp;%<small>{}/{} &middot; {}</small>"
        '<div class="bar"><i style="width:{:.1f}%;background:{}"></i></div></td>'
    ).format(
        100 * counts["rate"],
        counts["successes"],
        counts["episodes"],
        _interval(counts),
        100 * counts["rate"],
        colour,
    )


def _films(run: _Run) -> str:
    shown, seen = [], set()
    candidates = sorted((row for row in run.rows if row.get("video")), key=lambda r: r["index"])
    # One of every task first, then the others.
    for row in sorted(candidates, key=lambda r: r["task"] in seen or bool(seen.add(r["task"]))):
        path = os.path.join(run.folder, row["video"])
        if len(shown) < MAX_VIDEOS and os.path.exists(path):
            shown.append(_film(row, path))
    if not shown:
        return ""
    heading = "<h3>{}</h3>".format(html.escape(run.name))
    return '{}<div class="films">{}</div>'.format(heading, "".join(shown))


def _film(row: Mapping[str, Any], path: str) -> str:
    with open(path, "rb") as file:
        data = base64.b64encode(file.read()).decode("ascii")
    kind = "gif" if path.endswith(".gif") else "webp"
    outcome = (
        '<span class="ok">solved</span>' if row["success"] else '<span class="no">failed</span>'
    )
    return (
        '<figure><img alt="video of episode {}" src="data:image/{};base64,{}">'
        "<figcaption>&ldquo;{}&rdquo;<br>{} in {} steps <em>&middot; task {} &middot; seed {}</em>"
        "</figcaption></figure>"
    ).format(
        row["index"],
        kind,
        data,
        html.escape(row["instruction"]),
        outcome,
        row["steps"],
        html.escape(row["task"].replace("_", " ")),
        row["seed"],
    )


def _speed(runs: Sequence[_Run]) -> str:
    head = (
        "<tr><th>run</th><th>requests</th><th>round trip p50</th><th>p99</th>"
        "<th>inside the policy p50</th><th>p99</th><th>steps of a success</th></tr>"
    )
    rows = []
    for run in runs:
        latency = run.score["latency_ms"]
        trip, inner = latency["round_trip"], latency["server"]
        steps = run.score.get("steps_of_successes")
        cells = [run.name, str(trip["count"])]
        cells += [_ms(trip["p50"]), _ms(trip["p99"]), _ms(inner["p50"]), _ms(inner["p99"])]
        cells.append("–" if steps is None else "{:.1f}".format(steps))
        rows.append("<tr>{}</tr>".format("".join("<td>" + html.escape(c) + "</td>" for c in cells)))
    return "<table>{}{}</table>".format(head, "".join(rows))


def _ms(value: Optional[float]) -> str:
    return "–" if value is None else "{:.1f} ms".format(value)


def _protocol(runs: Sequence[_Run]) -> str:
    flat = [_flatten(run.score["protocol"]) for run in runs]
    keys = list(dict.fromkeys(key for values in flat for key in values))
    head = "".join("<th>{}</th>".format(html.escape(run.name)) for run in runs)
    body = []
    for key in keys:
        values = [values.get(key, "–") for values in flat]
        if len(set(values)) == 1:
            cells = '<td class="wrap" colspan="{}">{}</td>'.format(
                len(runs), html.escape(values[0])
            )
        else:
            cells = "".join(
                '<td class="wrap differs">{}</td>'.format(html.escape(value)) for value in values
            )
        body.append("<tr><td>{}</td>{}</tr>".format(html.escape(key), cells))
    note = '<p class="note">Shaded: what differs between the runs.</p>' if len(runs) > 1 else ""
    return "<table><tr><th></th>{}</tr>{}</table>{}".format(head, "".join(body), note)


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Dict[str, str]:
    flat: Dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, "{}{}.".format(prefix, key)))
        elif isinstance(value, list):
            flat[prefix + key] = ", ".join(str(item) for item in value)
        else:
            flat[prefix + key] = str(value)
    return flat


def _draw_bars(runs: Sequence[_Run]) -> Any:
    from matplotlib.figure import Figure

    names: List[Optional[str]] = [None, *_tasks(runs)]
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
        axes.barh(places, rates, thickness * 0.86, color=run.colour, alpha=0.4, zorder=2)
        errors = [[max(v, 0.0) for v in below], [max(v, 0.0) for v in above]]
        line = {"color": run.colour, "elinewidth": 1.4, "capsize": 2.5, "ms": 5, "zorder": 3}
        axes.errorbar(rates, places, xerr=errors, fmt="o", label=run.name, clip_on=False, **line)
    labels = ["all tasks" if name is None else name.replace("_", " ") for name in names]
    axes.set_yticks(range(len(names)), labels)
    axes.get_yticklabels()[0].set_fontweight("bold")
    axes.axhline(0.5, color="#c5ccd4", linewidth=1)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(0, 100)
    axes.set_xlabel("success, %, with 95 % interval")
    if len(runs) > 1:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(runs), frameon=False)
    _tidy(axes, "x")
    return figure


def _draw_losses(curves: Mapping[str, Sequence[Tuple[float, float]]]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.4))
    axes = figure.add_subplot()
    for number, (kind, points) in enumerate(sorted(curves.items(), reverse=True)):
        steps, losses = [p[0] for p in points], [p[1] for p in points]
        marker = "o" if len(points) <= 30 else ""
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(steps, losses, color=colour, label=kind, linewidth=1.4, marker=marker, ms=4)
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


def _picture(figure: Any, alt: str) -> str:
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": alt, "font.size": 10}):
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return '<img class="plot" alt="{}" src="data:image/svg+xml;base64,{}">'.format(alt, data)
