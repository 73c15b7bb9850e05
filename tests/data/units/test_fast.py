"""FAST tokens: fitting, files, and what must not become an action."""

import json

import numpy as np
import pytest

from vla_jax.data.units.fast import FastTokenizer, NotAChunkError


def _chunks(count: int = 60, seed: int = 0) -> np.ndarray:
    """Smooth chunks [count, 8, 3] within [-1, 1]."""
    rng = np.random.default_rng(seed)
    time = np.linspace(0, 1, 8)[None, :, None]
    speed, phase = rng.uniform(0, 3, (2, count, 1, 3))
    return np.sin(speed * time + phase)


@pytest.fixture(scope="module")
def tokenizer() -> FastTokenizer:
    return FastTokenizer.fit(_chunks(), vocab_size=200)


def test_fitted_chunks_survive_and_are_short(tokenizer):
    chunks = _chunks()
    ids = [tokenizer.encode(chunk) for chunk in chunks]
    assert tokenizer.size <= 200
    assert np.mean([len(row) for row in ids]) < 0.7 * 8 * 3
    for row, chunk in zip(ids, chunks, strict=True):
        assert tokenizer.keeps(chunk)
        # half a coefficient each, all of them in one step at worst
        assert np.abs(tokenizer.decode(row) - chunk).max() < 0.05 * np.sqrt(8)


def test_the_folder_gives_the_same_tokens(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    again = FastTokenizer.from_dir(tmp_path)
    assert again == tokenizer
    chunk = _chunks(1, seed=5)[0]
    assert again.encode(chunk) == tokenizer.encode(chunk)


def test_a_folder_for_any_shape_must_be_told_which(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    path = tmp_path / "processor_config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(raw | {"time_horizon": None, "action_dim": None}))
    universal = FastTokenizer.from_dir(tmp_path)
    ids = tokenizer.encode(_chunks(1)[0])
    with pytest.raises(ValueError, match="say which"):
        universal.decode(ids)
    np.testing.assert_array_equal(universal.decode(ids, 8, 3), tokenizer.decode(ids))


def test_what_is_no_chunk_is_refused(tokenizer):
    ids = tokenizer.encode(_chunks(1)[0])
    for wrong in (ids[:-1], ids + ids[:1], [*ids[:-1], tokenizer.size], [], [-1]):
        with pytest.raises(NotAChunkError):
            tokenizer.decode(wrong)


def test_a_broken_character_is_no_action_of_hundreds():
    """Bytes that make no character read as U+FFFD, which the published code takes for 65533."""
    chunks = 12 * _chunks(200)  # more than 128 coefficients, so characters of two bytes
    tokenizer = FastTokenizer.fit(chunks, vocab_size=700)
    symbols = json.loads(tokenizer.vocabulary)["model"]["vocab"]
    lead = symbols["Ã"]  # the byte C3 alone
    with pytest.raises(NotAChunkError, match="break off"):
        tokenizer.decode([lead] * 24)


def test_a_chunk_outside_the_fitted_range_is_told(tokenizer):
    assert not tokenizer.keeps(np.full((8, 3), 7.0))


def test_mistakes_are_named(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="not finite"):
        tokenizer.encode(np.full((8, 3), np.nan))
    with pytest.raises(ValueError, match=r"shape \(7, 3\), not \(8, 3\)"):
        tokenizer.encode(np.zeros((7, 3)))
    with pytest.raises(ValueError, match="one shape"):
        FastTokenizer.fit([np.zeros((8, 3)), np.zeros((7, 3))])
    with pytest.raises(ValueError, match="normalized"):
        FastTokenizer.fit(1000 * _chunks())
    with pytest.raises(ValueError, match="no \\['min_token', 'scale'\\]"):
        FastTokenizer.from_json({"tokenizer": ""})
    with pytest.raises(ValueError, match="damaged"):
        FastTokenizer.from_json({"tokenizer": "{}", "scale": 10, "min_token": 0})
