"""FAST tokens read on the device as on the host, and which tokens may follow."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vla_jax.data.units.fast import FastTokenizer, NotAChunkError
from vla_jax.models.fast_code import FastCode

FOLDER = Path(__file__).parents[1] / "fixtures/fast_libero_like"
STEPS, DIM = 10, 7


def tokenizers() -> dict[str, FastTokenizer]:
    """One of characters of a byte each, and one whose characters take up to three."""
    raw = json.loads((FOLDER / "config.json").read_text())
    raw["tokenizer"] = (FOLDER / "tokenizer.json").read_text(encoding="utf-8")
    rng = np.random.default_rng(0)
    chunks = np.cumsum(rng.normal(size=(60, STEPS, DIM)), axis=1) / 4
    return {
        "narrow": FastTokenizer.from_json(raw),
        "wide": FastTokenizer.fit(chunks, 4000, scale=300.0),
    }


TOKENIZERS = tokenizers()


def code(tokenizer: FastTokenizer) -> FastCode:
    raw = {"fast": tokenizer.to_json(), "token_end": 9000, "opening": [1], "closing": [2]}
    return FastCode.from_json(raw | {"stop": 3}, STEPS, DIM)


def padded(rows: list[Any]) -> tuple[Any, Any]:
    size = max(map(len, rows))
    tokens, used = np.zeros((len(rows), size), int), np.zeros((len(rows), size), bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], used[i, : len(row)] = row, True
    return jnp.asarray(tokens), jnp.asarray(used)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_what_is_a_chunk_reads_as_on_the_host_and_all_else_is_nan(kind):
    tokenizer, rng = TOKENIZERS[kind], np.random.default_rng(1)
    chunks = np.cumsum(rng.normal(size=(30, STEPS, DIM)), axis=1) / (4 if kind == "wide" else 8)
    rows = [tokenizer.encode(chunk, clip=True) for chunk in chunks]
    for row in list(rows):
        for _ in range(6):  # one token exchanged, one left out
            wrong = list(row)
            wrong[rng.integers(len(row))] = int(rng.integers(-1, tokenizer.size + 1))
            rows += [wrong, row[: rng.integers(len(row))] + row[rng.integers(len(row)) :]]
    result = jax.jit(code(tokenizer).decode)(*padded(rows))
    retained = 0
    for row, ours in zip(rows, np.asarray(result), strict=True):
        try:
            wanted = tokenizer.decode(row, STEPS, DIM)
        except NotAChunkError:
            assert np.isnan(ours).all()
            continue
        retained += 1
        np.testing.assert_allclose(ours, wanted, atol=1e-5)
    assert 30 <= retained < len(rows)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_whatever_is_chosen_of_what_may_follow_is_a_chunk(kind):
    tokenizer, rng, rows = TOKENIZERS[kind], np.random.default_rng(2), 16
    ours = code(tokenizer)
    may_follow, follow = jax.jit(ours.may_follow), jax.jit(ours.follow)
    progress, written = ours.begin(rows), [[] for _ in range(rows)]
    for _ in range(STEPS * DIM * 3):
        may = np.asarray(may_follow(progress))
        goes_on = may.any(1)
        if not goes_on.any():
            break
        chosen = np.array([rng.choice(np.flatnonzero(row)) if row.any() else 0 for row in may])
        moved = follow(progress, jnp.asarray(chosen))
        progress = jax.tree.map(lambda x, y, g=goes_on: jnp.where(g, x, y), moved, progress)
        for row in np.flatnonzero(goes_on):
            written[row].append(int(chosen[row]))
    assert not np.asarray(progress.left).any()
    assert not np.asarray(progress.owed).any()
    for row in written:
        if kind == "narrow":
            assert tokenizer.decode(row).shape == (STEPS, DIM)
        text = np.concatenate([ours.bytes[token] for token in row])
        begins = ((text >= 0) & (text < 0x80)) | (text >= 0xC0)
        assert begins.sum() == STEPS * DIM
