"""Every structure with every head: it trains, or it is refused with the reason."""

import itertools
from typing import Any

import pytest

from bench import support
from configs.tiny import ARCHS
from tests.models import tiny
from vla_jax.config import ConfigError
from vla_jax.models import legality, vla
from vla_jax.models.heads import HEADS
from vla_jax.models.structures import STRUCTURES

# By hand: what is legal is a decision, and the code must not be the only place that states it.
STEPWISE = ("mlp", "diffusion", "flow")
ALL = (*STEPWISE, "lstm", "gpt2")
LEGAL: dict[str, tuple[str, ...]] = {
    "one_step": STEPWISE,
    "discrete": ("detokenizer", "fast"),
    "interleaved": ALL,
    "policy_head": ALL,
    "video": STEPWISE,
    "expert": ("expert_flow",),
    "parallel": ("detokenizer", "l1"),
}
CELLS = [(structure, head) for structure, heads in LEGAL.items() for head in heads]
# Words of the reason; a structure or head that is not here takes all.
REASONS = {
    ("one_step", "lstm"): "with one step there is nothing to remember",
    ("one_step", "gpt2"): "with one step there is nothing to remember",
    ("one_step", "detokenizer"): "only the structures discrete and parallel have",
    ("discrete", "mlp"): "the VLM itself writes the actions",
    ("discrete", "lstm"): "the VLM itself writes the actions",
    ("discrete", "gpt2"): "the VLM itself writes the actions",
    ("discrete", "diffusion"): "the VLM itself writes the actions",
    ("discrete", "flow"): "the VLM itself writes the actions",
    ("interleaved", "detokenizer"): "only the structures discrete and parallel have",
    ("policy_head", "detokenizer"): "only the structures discrete and parallel have",
    ("video", "lstm"): "the window becomes a single feature",
    ("video", "gpt2"): "the window becomes a single feature",
    ("video", "detokenizer"): "only the structures discrete and parallel have",
    ("expert", "detokenizer"): "only the structures discrete and parallel have",
    **{
        (structure, "fast"): "only the discrete structure has"
        for structure in ("one_step", "interleaved", "policy_head", "video", "expert")
    },
    ("parallel", "fast"): "vary in number",
    **{("expert", head): "the expert itself makes the actions" for head in ALL},
    **{
        (structure, "expert_flow"): "only the structure `expert` has"
        for structure in ("one_step", "discrete", "interleaved", "policy_head", "video", "parallel")
    },
    **{("parallel", head): "every number of the chunk has a hidden state" for head in ALL},
    **{
        (structure, "l1"): "only the structure parallel has"
        for structure in ("one_step", "discrete", "interleaved", "policy_head", "video", "expert")
    },
}
# Backbones whose images are not part of their sequence, which can thus not hold a window.
APART = ("flamingo", "ofa")
# Those whose decoder hands out keys and values for an expert, and can be read in both directions.
READABLE = ("paligemma", "smolvlm", "prismatic")


@pytest.mark.slow
@pytest.mark.parametrize(("structure", "head"), CELLS)
def test_trains(structure, head):
    backbone = {"expert": "paligemma", "parallel": "prismatic"}.get(structure, "kosmos2")
    before, after = support.train(support.build(backbone, structure, head))
    assert 0 < after < support.LEFT * before


def test_every_pair_is_legal_or_has_a_reason():
    assert set(CELLS) | set(REASONS) == set(itertools.product(STRUCTURES, HEADS))
    assert not set(CELLS) & set(REASONS)
    for structure, head in CELLS:
        assert legality.problems(tiny.config(structure, head)) == []


@pytest.mark.parametrize(("structure", "head"), list(REASONS))
def test_refused(structure, head):
    with pytest.raises(ConfigError) as error:
        vla.build(tiny.config(structure, head))
    text = str(error.value)
    assert f"{structure} + {head}: " in text
    assert REASONS[structure, head] in text
    assert f"{structure} takes {', '.join(h for h in HEADS if h in LEGAL[structure])}" in text


def test_backbones_that_cannot_hold_a_window_are_refused_there():
    refused = {
        (backbone, structure)
        for backbone, structure in itertools.product(ARCHS, STRUCTURES)
        if legality.refusal(backbone, structure, LEGAL[structure][0])
    }
    windows = set(itertools.product(APART, ("interleaved", "video")))
    beside = {(n, s) for n in ARCHS if n not in READABLE for s in ("expert", "parallel")}
    assert refused == windows | beside


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
        (
            ("discrete", "fast"),
            {"structure.window": 2, "fast.prompt": "pi0fast", "fast.blank": -1},
            ["FAST tokens have no history", "structure.proprio", "blank"],
        ),
        (("discrete", "fast"), {"fast.token_end": 999}, ["vocabulary of 128"]),
        (
            ("discrete", "fast"),
            {"fast.parity.skipped_position": True},
            ["needs fast.parity.vocabulary 'all'"],
        ),
        (("expert", "expert_flow"), {"expert.fast_weight": -1.0}, ["fast_weight must not be"]),
        (("policy_head", "lstm"), {"structure.readout": "all"}, ["'pooling' or 'resampler'"]),
        (("policy_head", "gpt2"), {"head.heads": 5}, ["5 does not divide the width"]),
        (("policy_head", "lstm"), {"head.gripper": "number"}, ["head.gripper: lstm predicts"]),
        (("policy_head", "flow"), {"head.gripper": "number"}, ["head.gripper: flow predicts"]),
        (("parallel", "l1"), {"structure.window": 2}, ["parallel has no history"]),
        (("parallel", "l1"), {"structure.readout": "all"}, ["one hidden state for each number"]),
        (("parallel", "detokenizer"), {"head.bins": 200}, ["head.token_end 64", "of 128"]),
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
    legal = ["/".join(cell) for cell in cells if not legality.refusal(*cell)]
    table = support.markdown(dict.fromkeys(legal, (2.0, 1.0)))
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line[:1] == "|"][2:]
    assert len(rows) == len(ARCHS) * len(STRUCTURES)
    results = [cell for row in rows for cell in row[2:]]
    assert results.count("50%") == len(legal)
    reasons = {cell for cell in results if cell != "50%"}
    assert reasons == {line.split()[0] for line in table.splitlines() if line[:1] == "["}
