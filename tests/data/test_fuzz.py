"""Datasets that are damaged at random; `python -m tests.data.fuzz` for as many as one likes."""

import pytest

from tests.data import fuzz

pytest.importorskip("pyarrow")
NAMES = tuple(name for name in fuzz.FORMATS if name != "stream")


def test_some_mutations():
    outcomes, failures, longest = fuzz.run(80, 1, NAMES)
    assert not failures, "\n".join(failures)
    assert min(outcomes.values()) > 5
    assert longest < 20


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 7])
def test_many_mutations(seed):
    pytest.importorskip("tensorflow")
    _, failures, longest = fuzz.run(1000, seed)
    assert not failures, "\n".join(failures)
    assert longest < 60
