"""Rows of earlier versions stay readable, and nothing in them is lost."""

import dataclasses
import json

import pytest

from eval_servers.episode import Episode
from eval_servers.row import Outcome, Row, Stage

# As they were written before a row had a class: a task, a chain, a trial with more, a crash.
WRITTEN = {
    "task": (
        '{"index": 3, "seed": 2, "task": "up", "instruction": "raise it", "success": true, "steps":'
        ' 3, "round_trip_ms": [1.5, 2.0], "server_ms": [0.5, 0.7], "seconds": 0.01, "first_frame":'
        ' "ab12", "restarts": 1, "error": null, "video": "videos/0003_up.webp"}'
    ),
    "chain": (
        '{"index": 4, "seed": 9, "task": "chain", "instruction": "a", "state": [0.0, 1.0],'
        ' "tasks": ["t0", "t1"], "instructions": ["a", "b"], "success": false, "steps": 9,'
        ' "stages": [{"task": "t0", "success": true, "steps": 3, "seconds": 0.1}, {"task": "t1",'
        ' "success": false, "steps": 6, "seconds": 0.2}], "round_trip_ms": [], "server_ms": [],'
        ' "seconds": 0.4, "first_frame": "cd", "restarts": 0, "error": null}'
    ),
    "trial": (
        '{"index": 0, "seed": 1, "task": "stack", "instruction": "", "setting": "visual",'
        ' "variant": "base", "start": [0, [1]], "steps": 60, "swapped": false, "success": true,'
        ' "solved_at": 4, "told": ["stack"], "stats": {"moved": true}, "round_trip_ms": [1.0],'
        ' "server_ms": [], "seconds": 1.0, "first_frame": "", "restarts": 0, "error": null}'
    ),
    "crash": (
        '{"index": 5, "seed": 1, "task": "up", "instruction": "go", "success": false, "steps": 0,'
        ' "seconds": 0.0, "first_frame": "", "round_trip_ms": [], "server_ms": [], "restarts": 0,'
        ' "error": "died"}'
    ),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_rows_of_earlier_versions(name):
    written = json.loads(WRITTEN[name])
    row = Row.from_json(written)
    assert json.loads(json.dumps(row.to_json())) == written
    assert Row.from_json(row.to_json()) == row


def test_what_a_chain_and_a_trial_say():
    chain = Row.from_json(json.loads(WRITTEN["chain"]))
    assert chain.solved_in_a_row == 1
    assert [(stage.task, stage.success) for stage in chain.tried] == [("t0", True), ("t1", False)]
    assert chain.more == {"state": [0.0, 1.0], "instructions": ["a", "b"]}
    trial = Row.from_json(json.loads(WRITTEN["trial"]))
    assert trial.tried == (Stage("stack", True, 60, 1.0),)
    assert trial.more["solved_at"] == 4


def test_the_outcome_counts_where_an_episode_has_the_same_word():
    @dataclasses.dataclass(frozen=True)
    class Trial(Episode):
        steps: int
        variant: str

    row = Row.of(Trial(1, 2, "t", "go", 60, "v"), Outcome(True, 7, more={"told": ["go"]}))
    assert (row.steps, row.more) == (7, {"variant": "v", "told": ["go"]})
    assert Row.crashed(Trial(1, 2, "t", "go", 60, "v"), "died").steps == 0


def test_what_is_missing_is_listed():
    with pytest.raises(ValueError, match="no instruction, steps"):
        Row.from_json({"index": 0, "task": "t", "seed": 1, "success": True})
