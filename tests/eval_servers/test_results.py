import json
import os
from pathlib import Path

import numpy as np
import pytest

from eval_servers import results


def row(index, success=True, task="lift", **changes):
    return {
        "index": index,
        "seed": 100 + index,
        "task": task,
        "instruction": task,
        "success": success,
        "steps": 5,
        "seconds": 0.5,
        "round_trip_ms": [1.0, 3.0],
        "server_ms": [0.5],
        "restarts": 0,
        "error": None,
        **changes,
    }


# Reference: statsmodels 0.14 proportion_confint(method="wilson"), and Newcombe 1998 (Stat. Med. 17,
# table I: 81/263, 15/148, 0/20, 1/29) to the four digits printed there.
@pytest.mark.parametrize(
    ("successes", "episodes", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 1 - 0.1611, 1.0),
        (50, 100, 0.4038, 0.5962),
    ],
)
def test_wilson_interval(successes, episodes, low, high):
    assert results.wilson(successes, episodes) == pytest.approx((low, high), abs=6e-5)


def test_wilson_edges():
    assert results.wilson(0, 0) == (0.0, 1.0)
    assert results.wilson(0, 7)[0] == 0.0
    assert results.wilson(7, 7)[1] == 1.0
    with pytest.raises(ValueError, match="8 successes of 7"):
        results.wilson(8, 7)


def test_summary():
    rows = [row(0), row(1, False), row(2, task="place"), row(3, False, "place", error="died")]
    rows.append(row(4, task="place", steps=9, restarts=2, round_trip_ms=[101.0]))
    score = results.summarize(rows, {"environment": "x"})
    assert (score["successes"], score["episodes"], score["success_rate"]) == (3, 5, 0.6)
    assert (score["wilson_low"], score["wilson_high"]) == results.wilson(3, 5)
    assert score["per_task"]["lift"]["rate"] == 0.5
    assert score["per_task"]["place"]["successes"] == 2
    assert score["per_task"]["place"]["episodes"] == 3
    assert (score["errors"], score["restarts"]) == (1, 2)
    assert score["steps_of_successes"] == pytest.approx(19 / 3)
    assert score["latency_ms"]["round_trip"] == {"count": 9, "p50": 3.0, "p99": 93.16}
    assert score["protocol"] == {"environment": "x"}


def test_summary_of_nothing():
    score = results.summarize([], {})
    assert (score["success_rate"], score["episodes"], score["wilson_high"]) == (0.0, 0, 1.0)
    assert score["latency_ms"]["server"]["p50"] is None


def test_score_is_written_beside_then_renamed(tmp_path, monkeypatch):
    path = tmp_path / "score.json"
    results.write_score(str(path), {"a": 1})
    with pytest.raises(TypeError):
        results.write_score(str(path), {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    seen = []
    monkeypatch.setattr(
        os,
        "replace",
        lambda a, b: seen.append((json.loads(Path(a).read_text()), b, path.read_text())),
    )
    results.write_score(str(path), {"a": 2})
    assert seen[0][:2] == ({"a": 2}, str(path))
    assert json.loads(seen[0][2]) == {"a": 1}
    assert os.listdir(tmp_path) == ["score.json"]


def test_rows_of_a_killed_run_and_of_a_broken_file(tmp_path):
    path = tmp_path / "episodes.jsonl"
    whole = json.dumps(row(0)) + "\n"
    path.write_text(whole + json.dumps(row(1))[:30])
    assert [r["index"] for r in results.load_rows(str(path))] == [0]
    path.write_text(whole + "{}\n")
    with pytest.raises(results.ResultsError, match="line 2: no index"):
        results.load_rows(str(path))
    path.write_text("nonsense\n" + whole)
    with pytest.raises(results.ResultsError, match="line 1"):
        results.load_rows(str(path))


def test_shards_merge_and_every_episode_counts_once():
    first = [row(0), row(2, False, error="died")]
    second = [row(1), row(2), row(0)]
    merged = results.merge_rows([first, second])
    assert [(r["index"], r["success"], r["error"]) for r in merged] == [
        (0, True, None), (1, True, None), (2, True, None)
    ]  # fmt: skip
    with pytest.raises(results.ResultsError, match=r"episodes \[0\] differ"):
        results.merge_rows([first, [row(0, seed=7)]])


def make_run(folder, rows, **protocol):
    protocol = {"environment": "fake", "episodes": len(rows), "seeds": [0, 1], **protocol}
    results.open_run(str(folder), protocol, resume=False)
    with open(folder / "episodes.jsonl", "a") as file:
        file.writelines(json.dumps(r) + "\n" for r in rows)
    results.write_score(str(folder / "score.json"), results.summarize(rows, protocol))


def test_merge_command(tmp_path, capsys):
    make_run(tmp_path / "a", [row(0), row(1, False)])
    make_run(tmp_path / "b", [row(2), row(3)])
    command = ["merge", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "all")]
    assert results._main(command) == 0
    assert capsys.readouterr().out == "3/4 = 75.0%\n"
    score, rows = results.load_run(str(tmp_path / "all"))
    assert [r["index"] for r in rows] == [0, 1, 2, 3]
    assert score["protocol"]["seeds"] == [100, 103]
    make_run(tmp_path / "c", [row(4)], max_steps=3)
    command[2] = str(tmp_path / "c")
    assert results._main(command) == 1
    assert "max_steps" in capsys.readouterr().err


def test_command_errors_are_one_line(tmp_path, capsys):
    command = ["report", "--run", f"x={tmp_path}", "--out", str(tmp_path / "page")]
    assert results._main(command) == 1
    assert capsys.readouterr().err.startswith(f"results: no score in {tmp_path}")
    with pytest.raises(SystemExit):
        results._main(["report", "--run", "nameless", "--out", "x"])
    assert "NAME=DIR" in capsys.readouterr().err


def test_a_folder_with_results_is_never_written_over(tmp_path):
    make_run(tmp_path, [row(0)])
    (tmp_path / "protocol.json").unlink()
    for resume in (False, True):
        with pytest.raises(results.ResultsError, match="resume"):
            results.open_run(str(tmp_path), {"environment": "fake"}, resume)
    assert len(results.load_rows(str(tmp_path / "episodes.jsonl"))) == 1


def test_a_run_that_ended_before_its_first_episode_may_start_again(tmp_path):
    assert results.open_run(str(tmp_path), {"a": 1}, resume=False) == []
    assert results.open_run(str(tmp_path), {"a": 2}, resume=False) == []
    assert json.loads((tmp_path / "protocol.json").read_text()) == {"a": 2}


def test_plain_makes_numpy_json():
    value = {"mean": np.array([1.0, 2.0]), "n": np.int64(3), "t": (1, 2)}
    assert results.plain(value) == {"mean": [1.0, 2.0], "n": 3, "t": [1, 2]}
