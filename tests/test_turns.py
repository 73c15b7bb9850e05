"""Sides of a bench that take turns: what they tell, and what one that ends is called."""

import subprocess
import sys
from pathlib import Path

import pytest

from bench import turns
from bench.turns import Side

ROOT = Path(__file__).resolve().parents[1]
STEP = """
import itertools
from bench.turns import Step, serve
losses = itertools.count(1)
serve(Step(lambda: next(losses), float, {"params": 7}, lambda: None), steps=3)
"""


def test_a_side_steps_when_it_is_told_to():
    side = Side([sys.executable, "-c", STEP], {"PYTHONPATH": str(ROOT)})
    answers = [side.answer(), side.turn(), side.turn()]
    side.end()
    # Three steps a turn, of which the last one's loss is told.
    assert [answer["loss"] for answer in answers] == [3.0, 6.0, 9.0]
    assert {answer["params"] for answer in answers} == {7}
    assert all(answer["wall_s"] > 0 for answer in answers)


def test_a_side_that_ends_tells_its_status():
    side = Side([sys.executable, "-c", "import sys; sys.exit(3)"])
    with pytest.raises(RuntimeError, match="ended with status 3"):
        side.answer()
    with pytest.raises(RuntimeError, match="ended with status 3"):
        side.turn()


def test_ratios_are_of_turns_next_to_each_other():
    # The machine becomes three times slower after the first round, for both.
    ours, theirs = [{"s": 1.0}, {"s": 3.0}, {"s": 3.0}], [{"s": 2.0}, {"s": 6.0}, {"s": 7.0}]
    assert turns.ratio(ours, theirs, "s") == 0.5


@pytest.mark.slow
def test_the_train_bench_measures_a_small_model():
    command = [sys.executable, "bench/train.py", "--tiny", "--windows=1", "--steps=1"]
    done = subprocess.run([*command, "--rounds=1"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (row,) = (line for line in done.stdout.splitlines() if line.startswith("| ours "))
    # Two layers of width 64, an LSTM of 1024 and the released vocabulary.
    assert "| 37.5 |" in row


def test_the_train_bench_refuses_what_torch_has_no_side_for():
    command = [sys.executable, "bench/train.py", "--config=paligemma_ph"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "an LSTM on Kosmos-2 alone" in done.stderr
    assert "Traceback" not in done.stderr
