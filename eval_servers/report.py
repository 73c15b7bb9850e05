"""Runs -> one self-contained page: success with intervals, plots, differences, videos, protocol."""

from __future__ import annotations

import base64
import html
import json
import os
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from eval_servers import compare, plots, report_comparison, results
from eval_servers.row import Row

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
.videos{display:grid;grid-template-columns:repeat(auto-fill,minmax(230px,1fr));gap:16px}
figure{margin:0;border:1px solid var(--line);border-radius:8px;overflow:hidden;background:#fff}
figure img{display:block;width:100%;image-rendering:auto}
figcaption{padding:8px 12px;font-size:13px} figcaption em{color:var(--soft)}
.ok,.no,.warn{font-weight:600} .ok{color:#00734f} .tile .no,.no{color:#b3410a}
.warn{color:#8a5a00}
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
        # Colors go round again when there are more runs than the palette has.
        loaded.append(Run(name, folder, plots.COLOURS[index % len(plots.COLOURS)], score, rows))
    if not loaded:
        raise results.ResultsError("name at least one run")
    losses = read_losses(loss_log) if loss_log else None
    parts = [
        "<h1>{}</h1>{}".format(html.escape(title), _subtitle(loaded)),
        '<div class="tiles">{}</div>'.format("".join(_tile(run) for run in loaded)),
        _section("Success by task", plots.picture(plots.bars(loaded), "success rates by task")),
        _section("The numbers", _table(loaded) + _WILSON_NOTE),
    ]
    if any("chains" in run.score for run in loaded):
        # Runs of single tasks may stand on the same page.
        chains = [run for run in loaded if "chains" in run.score]
        picture = plots.picture(plots.chains(chains), "tasks solved in a row")
        # Right behind the tiles: for chains this is the number that papers compare.
        parts.insert(
            2, _section("Tasks solved in a row", picture + report_comparison.chains(chains))
        )
    if any(run.score["protocol"].get("perturbation") for run in loaded):
        parts.append(_section("Plain beside perturbed", report_comparison.perturbed(loaded)))
    if len(loaded) > 1:
        parts.append(_section("Against " + loaded[0].name, report_comparison.differences(loaded)))
    if losses:
        figure = plots.losses(losses)
        parts.append(_section("Training loss", plots.picture(figure, "loss over steps")))
    videos = "".join(_videos(run) for run in loaded)
    if videos:
        parts.append(_section("Episodes", videos))
    parts.append(_section("Speed", _speed(loaded)))
    if any(run.score["conditions"].get("sanity") for run in loaded):
        parts.append(_section("Checked before", _sanity(loaded)))
    parts.append(_section("Protocol", _settings([run.score["protocol"] for run in loaded], loaded)))
    parts.append(_section("Conditions", _settings([_conditions(run) for run in loaded], loaded)))
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        "<title>{}</title><style>{}</style></head><body><main>{}</main></body></html>\n"
    ).format(html.escape(title), _STYLE, "\n".join(parts))
    os.makedirs(out_dir, exist_ok=True)
    path = os.path.join(out_dir, "index.html")
    # A browser that reloads meanwhile never sees half a page.
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
            # The trainer's log also holds rows of other kinds, and null for a loss that is not
            # finite.
            if isinstance(step, (int, float)) and isinstance(loss, (int, float)):
                curves.setdefault(str(row.get("kind", "train")), []).append((step, loss))
    if not curves:
        raise results.ResultsError("{} has no row with a step and a loss".format(path))
    return curves


class Run(NamedTuple):
    """One evaluation on the page."""

    name: str
    folder: str
    colour: str
    score: Dict[str, Any]
    rows: List[Row]

    def counts(self, task: Optional[str]) -> Optional[Dict[str, Any]]:
        """Counts of one task (None if the run lacks it) or, without a task, of all."""
        if task is None:
            # A score spells its rate out, the counts of a task do not.
            return dict(self.score, rate=self.score["success_rate"])
        return self.score["per_task"].get(task)


_WILSON_NOTE = (
    '<p class="note">Successes of episodes, with the Wilson 95&nbsp;% interval of the success rate.'
    " Runs whose intervals overlap may be equally good.</p>"
)


def _section(heading: str, body: str) -> str:
    return "<section><h2>{}</h2>{}</section>".format(html.escape(heading), body)


def _subtitle(runs: Sequence[Run]) -> str:
    protocol = runs[0].score["protocol"]
    subtitle = "{} &middot; {} tasks &middot; {} episodes a run".format(
        html.escape(str(protocol.get("environment", "?"))),
        len(plots.tasks(runs)),
        " / ".join(dict.fromkeys(str(run.score["episodes"]) for run in runs)),
    )
    return '<p class="sub">{}</p>'.format(subtitle)


def _tile(run: Run) -> str:
    score = run.score
    lost = [
        "<span class=no>{} {}</span>".format(score[key], words)
        for key, words in (
            ("crashes", "lost to crashes of the simulator"),
            ("missing", "episodes still missing"),
        )
        if score[key]
    ]
    return (
        '<div class="tile" style="border-top-color:{}"><strong>{}</strong><b>{:.1f}&nbsp;%</b>'
        "<span>{}/{} episodes</span><span>95&nbsp;% interval {}</span>{}</div>"
    ).format(
        run.colour,
        html.escape(run.name),
        100 * score["success_rate"],
        score["successes"],
        score["episodes"],
        _interval(score),
        "".join(lost),
    )


def _interval(counts: Mapping[str, Any]) -> str:
    return "{:.0f}&ndash;{:.0f}&nbsp;%".format(
        100 * counts["wilson_low"], 100 * counts["wilson_high"]
    )


def _table(runs: Sequence[Run]) -> str:
    head = "".join("<th>{}</th>".format(html.escape(run.name)) for run in runs)
    body = []
    for task in [None, *plots.tasks(runs)]:
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


def _videos(run: Run) -> str:
    paths = {row.index: os.path.join(run.folder, row.video) for row in run.rows if row.video}
    videos = sorted((row for row in run.rows if row.video), key=lambda row: row.index)
    # A score copied without its folder has rows that name videos but no videos.
    videos = [row for row in videos if os.path.exists(paths[row.index])]
    # Failures teach more, but at most half the places: the page must also show success.
    failures = [row for row in videos if not row.success][: MAX_VIDEOS // 2]
    successes = [row for row in videos if row.success][: MAX_VIDEOS - len(failures)]
    chosen = sorted(successes + failures, key=lambda row: row.index)
    shown = [_film(row, paths[row.index]) for row in chosen]
    if not shown:
        return ""
    heading = "<h3>{}</h3>".format(html.escape(run.name))
    return '{}<div class="videos">{}</div>'.format(heading, "".join(shown))


def _film(row: Row, path: str) -> str:
    with open(path, "rb") as file:
        # Embedded, so that the page stays whole when it is mailed or moved.
        data = base64.b64encode(file.read()).decode("ascii")
    kind = "gif" if path.endswith(".gif") else "webp"
    outcome = '<span class="ok">solved</span>' if row.success else '<span class="no">failed</span>'
    return (
        '<figure><img alt="video of episode {}" src="data:image/{};base64,{}">'
        "<figcaption>&ldquo;{}&rdquo;<br>{} in {} steps <em>&middot; task {} &middot; seed {}</em>"
        "</figcaption></figure>"
    ).format(
        row.index,
        kind,
        data,
        html.escape(row.instruction),
        outcome,
        row.steps,
        html.escape(row.task.replace("_", " ")),
        row.seed,
    )


def _speed(runs: Sequence[Run]) -> str:
    head = (
        "<tr><th>run</th><th>requests</th><th>round trip p50</th><th>p99</th>"
        "<th>inside the policy p50</th><th>p99</th><th>steps of a success</th></tr>"
    )
    rows = []
    for run in runs:
        # The round trip includes the wire and queueing; "inside" is the server's own clock.
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


def _sanity(runs: Sequence[Run]) -> str:
    colours = {"ok": "ok", "warn": "warn", "fail": "no"}
    body = []
    for run in runs:
        for finding in run.score["conditions"].get("sanity", ()):
            cells = [run.name, finding["name"], finding["text"], finding["advice"]]
            level = finding["level"]
            body.append(
                '<tr><td class="{}">{}</td>{}</tr>'.format(
                    colours.get(level, ""),
                    level,
                    "".join("<td>{}</td>".format(html.escape(cell)) for cell in cells),
                )
            )
    head = "<tr><th></th><th>run</th><th>check</th><th>seen</th><th>advice</th></tr>"
    return "<table>{}{}</table>".format(head, "".join(body))


def _conditions(run: Run) -> Dict[str, Any]:
    return {key: value for key, value in run.score["conditions"].items() if key != "sanity"}


def _settings(trees: Sequence[Mapping[str, Any]], runs: Sequence[Run]) -> str:
    # Flat keys, so that a difference deep inside a protocol is a row of its own.
    flat = [{k: _text(v) for k, v in compare.flatten(tree).items()} for tree in trees]
    keys = list(dict.fromkeys(key for values in flat for key in values))
    head = "".join("<th>{}</th>".format(html.escape(run.name)) for run in runs)
    body = []
    for key in keys:
        values = [values.get(key, "–") for values in flat]
        # One wide cell for what agrees makes the differences stand out.
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


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_text(item) for item in value)
    return "{:.6g}".format(value) if isinstance(value, float) else str(value)
