"""Qwen's tokenizer file against the algorithm itself, on a vocabulary learned here."""

import base64
import itertools
import random
from collections import Counter

import pytest

from vla_jax.data.language import qwen_tiktoken
from vla_jax.data.language.tokenizer import Tokenizer

WORDS = ("pull", "push", "put", "the", "blue", "block", "lull", "button", "tub", "shut", "übe")


def learn(words, count):
    """Byte-pair encoding: all bytes, then the most frequent pair again and again."""
    ranks = {bytes([i]): i for i in range(256)}
    corpus = [[bytes([b]) for b in f" {word}".encode()] for word in words]
    for _ in range(count):
        pairs = Counter(pair for word in corpus for pair in itertools.pairwise(word))
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        ranks.setdefault(best[0] + best[1], len(ranks))
        corpus = [merge(word, best[0] + best[1]) for word in corpus]
    return ranks


def merge(word, piece):
    out = []
    for part in word:
        if out and out[-1] + part == piece:
            out[-1] = piece
        else:
            out.append(part)
    return out


def encode(word, ranks):
    """tiktoken: join the two neighbours that make the piece of the lowest rank, leftmost first."""
    if word in ranks:
        return [ranks[word]]
    parts = [bytes([b]) for b in word]
    while True:
        joined = [ranks.get(a + b, len(ranks)) for a, b in itertools.pairwise(parts)]
        if not joined or min(joined) == len(ranks):
            return [ranks[part] for part in parts]
        i = joined.index(min(joined))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


@pytest.fixture(scope="module")
def ranks():
    return learn(WORDS, 25)


@pytest.fixture
def folder(ranks, tmp_path):
    lines = [f"{base64.b64encode(piece).decode()} {rank}" for piece, rank in ranks.items()]
    (tmp_path / "qwen.tiktoken").write_text("\n".join(lines) + "\n")
    return tmp_path


def ids(tokenizer, text):
    result, mask = tokenizer.encode(text, 400)
    return result[mask].tolist()


def test_words_are_joined_as_tiktoken_joins_them(ranks, folder):
    tokenizer, rng = Tokenizer.from_dir(folder), random.Random(0)
    recorded = set()
    for _ in range(300):
        words: list[str] = [
            "".join(rng.choices("pulshtbeü", k=rng.randint(1, 9))) for _ in range(3)
        ]
        words[1] = rng.choice(WORDS)
        cut = [words[0], *(f" {word}" for word in words[1:])]
        expected = [i for word in cut for i in encode(word.encode(), ranks)]
        assert ids(tokenizer, " ".join(words)) == expected
        recorded.update(expected)
    assert len(recorded) > 30  # many pieces, not bytes alone


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("push 42", ["push", " ", "4", "2"]),
        ("it's", ["it", "'s"]),
        ("put,\n\nthe", ["put", ",\n\n", "the"]),
        ("a  b", ["a", " ", " b"]),
        ("u\u0308be", ["\u00fcbe"]),
    ],
)
def test_text_is_normalised_and_cut_into_words(ranks, folder, text, words):
    expected = [i for word in words for i in encode(word.encode(), ranks)]
    assert ids(Tokenizer.from_dir(folder), text) == expected


def test_special_tokens_follow_the_pieces_and_stand_in_text(ranks, folder):
    tokenizer, count = Tokenizer.from_dir(folder), len(ranks)
    assert tokenizer.pad_id == tokenizer.token_id("<|endoftext|>") == count
    assert tokenizer.token_id("<|im_end|>") == count + 2
    # 151857 where there are the released file's 151643 pieces.
    assert tokenizer.token_id("<img>") == count + 151857 - 151643
    assert tokenizer.vocab_size == count + 151860 - 151643
    assert ids(tokenizer, "<|im_start|>t</img>") == [count + 1, ord("t"), count + 215]
    result, mask = tokenizer.encode("", 3)
    assert result.tolist() == [count] * 3
    assert not mask.any()


def test_it_survives_the_checkpoint(folder):
    tokenizer = Tokenizer.from_dir(folder)
    again = Tokenizer.from_json(tokenizer.to_json())
    assert ids(again, "push the übe<img>") == ids(tokenizer, "push the übe<img>")
    assert again.pad_id == tokenizer.pad_id


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("IQ== 0\nnonsense\n", "line 2"),
        ("IQ== 0\nI!= 1\n", "line 2"),
        ("IQ== 0\nIg== 2\n", "not 0, 1, 2"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, text, told):
    path = tmp_path / qwen_tiktoken.FILE
    path.write_text(text)
    with pytest.raises(ValueError, match=told):
        qwen_tiktoken.read(path)
