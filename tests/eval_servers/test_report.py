import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval_servers import report, results, video
from eval_servers.row import Row, Stage


def make_run(folder, successes, per_task=4, tasks=("lift", "place"), name="fake", **changes):
    rows = []
    for index in range(per_task * len(tasks)):
        task = tasks[index % len(tasks)]
        success = index // len(tasks) < successes
        row = Row(
            index,
            index,
            task,
            f"<b>{task}</b> & go",
            success,
            steps=9,
            seconds=1.0,
            first_frame=f"{name}{index}",
            round_trip_ms=(1.0, 2.0),
            server_ms=(0.5,),
        )
        if index < 2:
            film = f"videos/{index}.webp"
            row = dataclasses.replace(row, video=film)
            (folder / "videos").mkdir(parents=True, exist_ok=True)
            frames = [np.full((16, 32, 3), 9 * i, np.uint8) for i in range(5)]
            video.save_video(str(folder / film), frames)
        rows.append(row)
    protocol = {"environment": name, "server": {"model": "m", "chunk": 4}, "seeds": "0-7"}
    protocol.update(changes)
    sanity = [{"name": "image", "level": "warn", "text": "moves <little>", "advice": "look"}]
    (folder / "episodes.jsonl").write_text("".join(json.dumps(r.to_json()) + "\n" for r in rows))
    score = results.summarize(rows, protocol, {"sanity": sanity, "cpus": 2})
    results.write_score(str(folder / "score.json"), score)
    return str(folder)


@pytest.fixture
def runs(tmp_path):
    return {
        "trained": make_run(tmp_path / "a", 4),
        "un<trained>": make_run(tmp_path / "b", 1, tasks=("lift", "push"), name="other"),
    }


def make_log(path):
    rows = [{"step": i, "kind": "train", "loss": 1 / (i + 1), "lr": 0.1} for i in range(50)]
    rows += [
        {"step": 25, "kind": "eval", "loss": 0.5},
        {"step": 30, "kind": "train", "loss": "nan"},
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"step": 5')
    return str(path)


def test_the_page_is_self_contained_and_says_it_all(runs, tmp_path):
    log = make_log(tmp_path / "log.jsonl")
    path = report.report(runs, str(tmp_path / "page"), loss_log=log, title="A & B")
    page = (tmp_path / "page" / "index.html").read_text()
    assert path == str(tmp_path / "page" / "index.html")
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert "<script" not in page
    assert page.count("data:image/svg+xml") == 2
    assert page.count("data:image/webp") == 4
    for text in ("A &amp; B", "100.0&nbsp;%", "8/8 episodes", "2/8 episodes", "4/4 &middot; 51"):
        assert text in page, text
    for text in ("un&lt;trained&gt;", "&lt;b&gt;lift&lt;/b&gt; &amp; go", "server.chunk", "1.5 ms"):
        assert text in page, text
    assert (
        "cannot take a difference: trained and un&lt;trained&gt; differ in environment"
        in page.lower()
    )
    assert "moves &lt;little&gt;" in page
    assert page.count("<td>&ndash;</td>") == 2  # each run lacks one of the other's tasks
    assert '<td class="wrap differs">other</td>' in page
    assert '<td class="wrap" colspan="2">m</td>' in page


def test_the_page_needs_neither_log_nor_videos(runs, tmp_path):
    score = {"only": runs["trained"] + "/score.json"}
    (tmp_path / "a" / "episodes.jsonl").unlink()
    report.report(score, str(tmp_path / "page"))
    page = (tmp_path / "page" / "index.html").read_text()
    assert page.count("data:image/svg+xml") == 1
    assert "data:image/webp" not in page
    assert "Training loss" not in page


def test_losses_are_read_whatever_else_the_log_holds(tmp_path):
    curves = report.read_losses(make_log(tmp_path / "log.jsonl"))
    assert sorted(curves) == ["eval", "train"]
    assert len(curves["train"]) == 50
    assert curves["train"][1] == (1, 0.5)
    (tmp_path / "empty.jsonl").write_text('{"step": 1}\n[1]\n')
    with pytest.raises(results.ResultsError, match="no row with a step and a loss"):
        report.read_losses(str(tmp_path / "empty.jsonl"))


def test_report_command(runs, tmp_path, capsys):
    flags = [item for name, path in runs.items() for item in ("--run", f"{name}={path}")]
    assert results._main(["report", *flags, "--out", str(tmp_path / "page")]) == 0
    assert capsys.readouterr().out.strip().endswith("index.html")


def test_videos_play_every_frame(tmp_path):
    from PIL import Image

    frames = [np.full((8, 16, 3), 40 * i, np.uint8) for i in range(4)]
    video.save_video(str(tmp_path / "v.webp"), frames)
    film: Any = Image.open(tmp_path / "v.webp")
    assert (film.size, film.n_frames) == ((16, 8), 4)
    film.seek(3)
    assert abs(np.asarray(film.convert("RGB")).mean() - 120) < 4


def test_runs_of_one_protocol_are_compared_by_task(tmp_path):
    runs = {
        "before": make_run(tmp_path / "a", 1, server={"model": "m", "step": 1}),
        "after": make_run(tmp_path / "b", 4, server={"model": "m", "step": 2}),
        "other": make_run(tmp_path / "c", 4, max_steps=9),
    }
    report.report(runs, str(tmp_path / "page"))
    page = (tmp_path / "page" / "index.html").read_text()
    assert "Against before" in page
    assert page.count("data:image/svg+xml") == 2
    assert "<b>+75</b><small>" in page
    assert "8 episodes" in page
    assert "differ in max_steps (None / 9)" in page
    assert "other pixels" not in page


def test_other_first_frames_are_told(tmp_path):
    single, two = make_run(tmp_path / "a", 1), make_run(tmp_path / "b", 2)
    path = tmp_path / "b" / "episodes.jsonl"
    path.write_text(path.read_text().replace('"first_frame": "fake3"', '"first_frame": "gpu3"'))
    report.report({"a": single, "b": two}, str(tmp_path / "page"))
    page = (tmp_path / "page" / "index.html").read_text()
    assert "1 of 8 episodes of b start with other pixels" in page


def test_crashes_missing_episodes_and_chains_are_on_the_page(tmp_path):
    first, second = (Stage("t0", success=False), Stage("t0", success=True))
    stages = [(first,), (second,), (second, Stage("t1", success=True))]
    rows = [
        Row(i, i, "chain", "", success=i > 1, steps=4, tasks=("t0", "t1"), stages=stages[i])
        for i in range(3)
    ]
    rows.append(dataclasses.replace(rows[0], index=3, error="died", stages=()))
    score = results.summarize(rows, {"environment": "calvin", "episodes": 6})
    results.write_score(str(tmp_path / "score.json"), score)
    report.report({"run": str(tmp_path)}, str(tmp_path / "page"))
    page = (tmp_path / "page" / "index.html").read_text()
    assert "1 lost to crashes of the simulator" in page
    assert "2 episodes still missing" in page
    assert "<td>66.7&nbsp;%</td><td>33.3&nbsp;%</td><td>1.00<small>" in page


def test_perturbed_suites_stand_beside_the_plain_one(tmp_path):
    def run(folder, successes, **protocol):
        return make_run(tmp_path / folder, successes, name="libero", **protocol)

    runs = {
        "plain": run("a", 4, suite="object", perturbation=None),
        "swap": run("b", 0, suite="object_swap", perturbation="swap"),
        "words": run("c", 4, suite="object_lan", perturbation="lan"),
        "goal": run("d", 4, suite="goal_lan", perturbation="lan"),
        "other": run("e", 0, suite="object_task", perturbation="task", server={"model": "n"}),
    }
    page = Path(report.report(runs, str(tmp_path / "page"))).read_text()
    section = page[page.index("Plain beside perturbed") : page.index("Against plain")]
    tables = section.split("<table>")[1:]
    assert len(tables) == 2
    assert "<th>plain</th><th>swap (swap)</th>" in tables[0]
    assert "<b>-100</b>" in tables[0]
    assert "+0<small>" in tables[1]
    for name in ("goal", "other"):
        assert f"{name}: no run here is of the plain suite".lower() in section.lower()
