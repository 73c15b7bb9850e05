"""Parts of real vocabularies, against ids of other implementations on the whole ones."""

import json
from pathlib import Path

import pytest

from vla_jax.data.language.tokenizer import Tokenizer

FOLDER = Path(__file__).parents[2] / "fixtures" / "vocabularies"
CASES = json.loads((FOLDER / "ids.json").read_text())
# OpenAI's own CLIP repairs texts first (ftfy): quotes, ligatures, wide letters, control characters.
# Hugging Face's, which is what the file describes, does not.
REPAIRED = ["\ufeffopen", "fi ﬁ ligature", "fullＷidth", "smart ‘quotes’ and “double”"]
REPAIRED += ["a\0b", "\abell", "\x1b[0m", "ǅ", "\x85nel"]
# What stands around a text, in front and behind.
AROUND = {"clip": ([49406], [49407])}


def ids(tokenizer, text):
    row, mask = tokenizer.encode(text, 512)
    return row[mask].tolist()


@pytest.mark.parametrize("name", sorted(CASES["ids"]))
def test_ids_of_real_texts(name):
    tokenizer = Tokenizer.from_dir(FOLDER / name)
    again = Tokenizer.from_json(tokenizer.to_json())
    differ = []
    for text, expected in zip(CASES["texts"], CASES["ids"][name], strict=True):
        result = ids(tokenizer, text)
        assert ids(again, text) == result, repr(text)
        differ += [text] * (result != expected)
    assert differ == (REPAIRED if name == "clip" else [])


@pytest.mark.parametrize("name", sorted(CASES["ids"]))
def test_nothing_around_a_plain_text(name):
    expected = dict(zip(CASES["texts"], CASES["ids"][name], strict=True))["open middle drawer"]
    before, behind = AROUND.get(name, ([], []))
    full, plain = (Tokenizer.from_dir(FOLDER / name, plain=plain) for plain in (False, True))
    assert ids(full, "open middle drawer") == expected
    assert [*before, *ids(plain, "open middle drawer"), *behind] == expected
    assert full.ids("open middle drawer") == ids(plain, "open middle drawer")
