import json
import os
from pathlib import Path

import numpy as np
import pytest

from eval_servers import results
from eval_servers.intervals import wilson
from eval_servers.row import Row, Stage


def row(index, success=True, task="lift", **changes):
    values: dict = {"seconds": 0.5, "round_trip_ms": (1.0, 3.0), "server_ms": (0.5,), "steps": 5}
    values |= {"seed": 100 + index, **changes}
    return Row(index=index, task=task, instruction=task, success=success, **values)


def test_summary():
    rows = [row(0), row(1, False), row(2, task="place"), row(3, False, "place", error="died")]
    rows.append(row(4, task="place", steps=9, restarts=2, round_trip_ms=(101.0,)))
    score = results.summarize(rows, {"environment": "x", "episodes": 7}, {"workers": 2})
    assert (score["successes"], score["episodes"], score["success_rate"]) == (3, 4, 0.75)
    assert (score["wilson_low"], score["wilson_high"]) == wilson(3, 4)
    assert score["per_task"]["lift"]["rate"] == 0.5
    assert score["per_task"]["place"]["successes"] == 2
    assert score["per_task"]["place"]["episodes"] == 2  # the crash says nothing of the policy
    assert (score["crashes"], score["missing"], score["restarts"]) == (1, 2, 2)
    assert score["steps_of_successes"] == pytest.approx(19 / 3)
    assert score["latency_ms"]["round_trip"] == {"count": 7, "p50": 3.0, "p99": 95.12}
    assert score["protocol"] == {"environment": "x", "episodes": 7}
    assert score["conditions"] == {"workers": 2}


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
    recorded = []
    monkeypatch.setattr(
        os,
        "replace",
        lambda a, b: recorded.append((json.loads(Path(a).read_text()), b, path.read_text())),
    )
    results.write_score(str(path), {"a": 2})
    assert recorded[0][:2] == ({"a": 2}, str(path))
    assert json.loads(recorded[0][2]) == {"a": 1}
    assert os.listdir(tmp_path) == ["score.json"]


def test_rows_of_a_killed_run_and_of_a_broken_file(tmp_path):
    path = tmp_path / "episodes.jsonl"
    full = json.dumps(row(0).to_json()) + "\n"
    path.write_text(full + json.dumps(row(1).to_json())[:30])
    assert [r.index for r in results.load_rows(str(path))] == [0]
    path.write_text(full + "{}\n")
    with pytest.raises(results.ResultsError, match="line 2: no index"):
        results.load_rows(str(path))
    path.write_text("nonsense\n" + full)
    with pytest.raises(results.ResultsError, match="line 1"):
        results.load_rows(str(path))


def test_shards_merge_and_every_episode_counts_once():
    first = [row(0), row(2, False, error="died")]
    second = [row(1), row(2), row(0)]
    merged = results.merge_rows([first, second])
    assert [(r.index, r.success, r.error) for r in merged] == [
        (0, True, None), (1, True, None), (2, True, None)
    ]  # fmt: skip
    with pytest.raises(results.ResultsError, match=r"episodes \[0\] differ"):
        results.merge_rows([first, [row(0, seed=7)]])


def make_run(folder, rows, **protocol):
    protocol = {"environment": "fake", "episodes": 5, "seeds": "100-104", **protocol}
    results.open_run(str(folder), protocol, resume=False)
    with open(folder / "episodes.jsonl", "a") as file:
        file.writelines(json.dumps(r.to_json()) + "\n" for r in rows)
    results.write_score(str(folder / "score.json"), results.summarize(rows, protocol))


def test_merge_command(tmp_path, capsys):
    make_run(tmp_path / "a", [row(0, video="videos/0.webp"), row(1, False)])
    make_run(tmp_path / "b", [row(2), row(3)])
    command = ["merge", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "all")]
    assert results._main(command) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("success 75.0 % (3/4, 95 % interval 30.1 to 95.4 %); 1 episodes are")
    score, rows = results.load_run(str(tmp_path / "all"))
    assert [r.index for r in rows] == [0, 1, 2, 3]
    assert rows[0].video == os.path.join("..", "a", "videos", "0.webp")
    assert score["missing"] == 1
    # What has come since is added; what is there stays.
    make_run(tmp_path / "late", [row(4)])
    assert results._main(["merge", str(tmp_path / "late"), *command[-2:]]) == 0
    assert capsys.readouterr().out == "success 80.0 % (4/5, 95 % interval 37.6 to 96.4 %)\n"


def test_shards_of_other_protocols_are_refused_with_what_differs(tmp_path, capsys):
    make_run(tmp_path / "a", [row(0)], simulator={"driver": "llvmpipe"}, max_steps=60)
    make_run(tmp_path / "b", [row(1)], simulator={"driver": "NVIDIA"}, max_steps=60)
    out = ["--out", str(tmp_path / "all")]
    assert results._main(["merge", str(tmp_path / "a"), str(tmp_path / "b"), *out]) == 1
    message = capsys.readouterr().err
    assert "simulator.driver (llvmpipe / NVIDIA)" in message
    assert "max_steps" not in message
    assert not (tmp_path / "all").exists()


def test_chains(tmp_path):
    def chain(index, *solved):
        stages = tuple(Stage(f"t{i}", success, 2) for i, success in enumerate(solved))
        tasks = ("t0", "t1", "t2")
        return row(index, all(solved) and len(solved) == 3, "chain", tasks=tasks, stages=stages)

    rows = [chain(0, True, True, True), chain(1, True, False), chain(2, False)]
    rows.append(row(3, False, "chain", tasks=("t0", "t1", "t2"), error="died"))
    score = results.summarize(rows, {})
    result = score["chains"]
    assert [c["successes"] for c in result["solved_in_a_row"].values()] == [2, 1, 1]
    assert [c["episodes"] for c in result["solved_in_a_row"].values()] == [3, 3, 3]
    assert result["average_solved"] == pytest.approx(4 / 3)
    spread = np.std([3, 1, 0], ddof=1) / np.sqrt(3) * 1.96
    assert result["average_low"] == pytest.approx(max(4 / 3 - spread, 0), abs=1e-4)
    counts = {task: (c["successes"], c["episodes"]) for task, c in score["per_task"].items()}
    assert counts == {"t0": (2, 3), "t1": (1, 2), "t2": (1, 1)}
    assert (score["successes"], score["episodes"], score["crashes"]) == (1, 3, 1)


def test_a_score_of_another_format_is_refused(tmp_path):
    (tmp_path / "score.json").write_text('{"format": 1, "successes": 3}')
    with pytest.raises(results.ResultsError, match="format 1, this version reads format 2"):
        results.load_run(str(tmp_path))


@pytest.mark.parametrize(
    ("values", "told"), [([], ""), ([4], "4"), ([7, 1, 3, 2, 2], "1-3,7"), (range(5, 9), "5-8")]
)
def test_ranges(values, told):
    assert results.ranges(values) == told


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
