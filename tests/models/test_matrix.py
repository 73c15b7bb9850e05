"""Every structure with every head: it trains, or it is refused with the reason."""

import itertools
from typing import Any

import pytest

from bench import support
from configs.tiny import ARCHS
from tests.models import tiny
from vla_jax.config import ConfigError
from vla_jax.models import vla
from vla_jax.models.heads import HEADS
from vla_jax.models.structures import STRUCTURES, refusal

CELLS = list(itertools.product(STRUCTURES, HEADS))
LEGAL = [cell for cell in CELLS if not refusal(*cell)]


@pytest.mark.slow
@pytest.mark.parametrize(("structure", "head"), LEGAL)
def test_trains(structure, head):
    before, after = support.train(support.build("kosmos2", structure, head))
    assert 0 < after < support.LEFT * before


@pytest.mark.parametrize(("structure", "head"), [cell for cell in CELLS if cell not in LEGAL])
def test_refused(structure, head):
    with pytest.raises(ConfigError) as error:
        vla.build(tiny.config(structure, head))
    assert f"{structure} + {head}: {refusal(structure, head)}" in str(error.value)
    for name in STRUCTURES[structure].heads:
        assert name in str(error.value)


def test_every_structure_and_head_is_used():
    assert {s for s, _ in LEGAL} == set(STRUCTURES)
    assert {h for _, h in LEGAL} == set(HEADS)


@pytest.mark.parametrize(
    ("cell", "changes", "words"),
    [
        (("one_step", "mlp"), {"structure.window": 2}, ["one_step has no history"]),
        (("interleaved", "mlp"), {"structure.slide": 4}, ["structure.slide: 4 is not within"]),
        (("discrete", "detokenizer"), {"structure.latent": 2}, ["structure.latent 1"]),
        (("discrete", "detokenizer"), {"head.bins": 1}, ["bins must be at least 2"]),
        (("discrete", "detokenizer"), {"head.bins": 200}, ["head.token_end 128", "vocabulary"]),
        (("discrete", "detokenizer"), {"head.token_end": 999}, ["vocabulary of 128"]),
        (
            ("discrete", "detokenizer"),
            {"structure.parity.act_insert": "padded_column"},
            ["per_row"],
        ),
        (
            ("discrete", "detokenizer"),
            {"sentence.dim": 4, "sentence.dir": "clip"},
            ["no features to predict a sentence"],
        ),
        (("policy_head", "lstm"), {"structure.readout": "all"}, ["'pooling' or 'resampler'"]),
        (("policy_head", "gpt2"), {"head.heads": 5}, ["5 does not divide the width"]),
    ],
)
def test_settings_that_do_not_combine(cell, changes, words):
    with pytest.raises(ConfigError) as error:
        vla.build(tiny.config(*cell, **changes))
    for word in words:
        assert word in str(error.value)


def test_all_problems_at_once():
    changes: dict[str, Any] = {"structure.window": 4}
    with pytest.raises(ConfigError) as error:
        vla.build(tiny.config("one_step", "lstm", **changes))
    assert "nothing to remember" in str(error.value)
    assert "no history" in str(error.value)


def test_the_table_has_no_empty_cell():
    cells = itertools.product(ARCHS, STRUCTURES, HEADS)
    legal = ["/".join(cell) for cell in cells if not support.why_not(*cell)]
    table = support.markdown(dict.fromkeys(legal, (2.0, 1.0)))
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line[:1] == "|"][2:]
    assert len(rows) == len(ARCHS) * len(STRUCTURES)
    found = [cell for row in rows for cell in row[2:]]
    assert found.count("50%") == len(legal)
    reasons = {cell for cell in found if cell != "50%"}
    assert reasons == {line.split()[0] for line in table.splitlines() if line[:1] == "["}
