import itertools
import math

import pytest

from eval_servers import compare
from eval_servers.intervals import difference, paired_difference, wilson
from eval_servers.row import Row, Stage


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
    assert wilson(successes, episodes) == pytest.approx((low, high), abs=6e-5)


def test_wilson_edges():
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(0, 7)[0] == 0.0
    assert wilson(7, 7)[1] == 1.0
    with pytest.raises(ValueError, match="8 successes of 7"):
        wilson(8, 7)


# Newcombe 1998 (Stat. Med. 17:873), table II, method 10, to the four digits printed there.
@pytest.mark.parametrize(
    ("mine", "base", "low", "high"),
    [
        ((56, 70), (48, 80), 0.0524, 0.3339),
        ((9, 10), (3, 10), 0.1705, 0.8090),
        ((10, 10), (0, 10), 0.6075, 1.0),
    ],
)
def test_difference_of_independent_rates(mine, base, low, high):
    assert difference(*mine, *base) == pytest.approx((low, high), abs=6e-5)
    assert difference(*base, *mine) == pytest.approx((-high, -low), abs=6e-5)


def test_difference_edges():
    assert difference(0, 0, 3, 4) == (-1.0, 1.0)
    assert paired_difference(0, 0, 0, 0) == (-1.0, 1.0)


def test_pairs_without_correlation_are_as_independent():
    assert paired_difference(12, 8, 12, 8) == pytest.approx(difference(20, 40, 24, 40))


def test_agreeing_pairs_narrow_the_interval():
    def width(*cells):
        low, high = paired_difference(*cells)
        return high - low

    assert width(18, 2, 2, 18) < 0.6 * width(10, 10, 10, 10)
    assert paired_difference(18, 2, 6, 14) == pytest.approx(
        tuple(-bound for bound in reversed(paired_difference(18, 6, 2, 14)))
    )


@pytest.mark.parametrize(
    "chances",
    [
        (0.4, 0.1, 0.1, 0.4),
        (0.25, 0.25, 0.25, 0.25),
        (0.6, 0.3, 0.05, 0.05),
        (0.85, 0.1, 0.03, 0.02),
    ],
)
def test_paired_interval_covers_the_truth(chances):
    """Exactly, over all outcomes of 20 pairs: how often the interval holds the true difference."""
    n, truth, covered = 20, chances[1] - chances[2], 0.0
    for both, only, base_only in itertools.product(range(n + 1), repeat=3):
        neither = n - both - only - base_only
        if neither < 0:
            continue
        cells = (both, only, base_only, neither)
        low, high = paired_difference(*cells)
        if low - 1e-12 <= truth <= high + 1e-12:
            ways = math.factorial(n) / math.prod(math.factorial(c) for c in cells)
            covered += ways * math.prod(p**c for p, c in zip(chances, cells, strict=True))
    assert 0.93 < covered < 0.999


def row(index, success, task="lift", **changes):
    values: dict = {"seed": index, **changes}
    return Row(index=index, task=task, instruction="", success=success, steps=1, **values)


def test_differences_are_of_the_episodes_that_both_made():
    base = [row(i, i < 4, "lift" if i % 2 else "push") for i in range(10)]
    actual = [row(i, i < 8, "lift" if i % 2 else "push") for i in range(8)]
    actual += [row(8, True, "push", error="died"), row(9, True, "lift", seed=99)]
    differences = compare.differences(actual, base)
    assert {name: d.episodes for name, d in differences.items()} == {None: 8, "push": 4, "lift": 4}
    assert (differences[None].rate, differences[None].base_rate, differences[None].change) == (
        1.0,
        0.5,
        0.5,
    )
    assert differences[None][3:] == paired_difference(4, 4, 0, 0)


def test_differences_of_chains_are_of_tasks_in_a_row():
    def chain(index, solved):
        stages = (Stage("t", success=True),) * solved + (Stage("t", success=False),)
        return row(index, solved == 3, "chain", tasks=("t",) * 3, stages=stages)

    differences = compare.differences([chain(0, 2), chain(1, 1)], [chain(0, 1), chain(1, 0)])
    assert {name: d.change for name, d in differences.items()} == {
        None: 0, "1 in a row": 0.5, "2 in a row": 0.5, "3 in a row": 0
    }  # fmt: skip


def test_starts_that_show_other_pixels():
    base = [row(i, True, first_frame=f"{i}") for i in range(4)]
    actual = [row(i, True, first_frame="x" if i == 2 else f"{i}") for i in range(3)]
    assert compare.other_starts(actual, base) == (1, 3)
    assert compare.other_starts([row(0, True)], base) == (0, 0)


def test_protocols_that_differ():
    a = {
        "max_steps": 60,
        "server": {"model": "a"},
        "simulator": {"driver": "x", "versions": {"n": 1}},
    }
    b = {
        "max_steps": 60,
        "server": {"model": "b"},
        "simulator": {"driver": "x", "versions": {"n": 2}},
    }
    assert set(compare.differing(a, b)) == {"server.model", "simulator.versions.n"}
    compare.require_same({"one": a, "two": b}, "compare", compare.COMPARABLE)
    other = {**b, "max_steps": 61, "seeds": "1-3"}
    with pytest.raises(
        compare.ProtocolError, match=r"cannot compare: one and three differ in"
    ) as e:
        compare.require_same({"one": a, "two": b, "three": other}, "compare", compare.COMPARABLE)
    assert "max_steps (60 / 61)" in str(e.value)
    assert "seeds" not in str(e.value)
