import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vla_jax.config import ConfigError, CotrainConfig
from vla_jax.data.errors import DataError, ImageDecodeError
from vla_jax.data.language.captions import CaptionLoader, CaptionSet, check_texts
from vla_jax.data.language.tokenizer import Tokenizer
from vla_jax.types import Captions

PROMPT = "Question: {question} Answer: "
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def write(folder: Path, name: str = "texts.json") -> Path:
    items: list[dict[str, Any]] = []
    for colour, rgb in COLOURS.items():
        Image.new("RGB", (12, 8), rgb).save(folder / f"{colour}.png")
        captions = turns("<image>\nwhich colour is it ?", f"it is {colour}")
        items.append({"id": colour, "image": f"{colour}.png", "conversations": captions})
    items.append({"conversations": turns("hello", "good day", "how are you ?", "fine")})
    path = folder / name
    lines = name.endswith("l")
    text = "\n".join(map(json.dumps, items)) + "\n\n" if lines else json.dumps(items)
    path.write_text(text, encoding="utf-8")
    return path


def config(path: Path, **changes: Any) -> CotrainConfig:
    return dataclasses.replace(CotrainConfig(str(path), "", 4, 24, PROMPT), **changes)


def tokenizer(texts: CaptionSet) -> Tokenizer:
    return Tokenizer.build(texts.words(PROMPT), 64)


def batches(path: Path, count: int, start: int = 0, **share: Any) -> list[Captions]:
    texts = CaptionSet(path)
    options: dict[str, Any] = {"seed": 5, "start": start, **share}
    with CaptionLoader(texts, tokenizer(texts), config(path), (8, 8), **options) as loader:
        return [next(loader) for _ in range(count)]


@pytest.mark.parametrize("name", ["texts.json", "texts.jsonl"])
def test_conversations_are_read(tmp_path, name):
    texts = CaptionSet(write(tmp_path, name))
    assert len(texts) == 4
    assert texts[1] == (tmp_path / "green.png", [("which colour is it ?", "it is green")])
    assert texts[3] == (None, [("hello", "good day"), ("how are you ?", "fine")])
    assert texts.identity()["conversations"] == 4


def test_only_answers_are_targets(tmp_path):
    texts = CaptionSet(write(tmp_path))
    words = tokenizer(texts)
    recorded: dict[str, tuple[str, str, bool]] = {}
    names = {words.token_id(w): w for w in " ".join(texts.words(PROMPT)).split()}
    names |= {0: "<s>", 2: "</s>"}
    for batch in batches(tmp_path / "texts.json", 2):
        for row in range(4):
            ids, mask = batch.text[row], batch.text_mask[row]
            assert not np.any(batch.target[row] & ~mask)
            text = " ".join(names[i] for i in ids[batch.target[row]])
            full = " ".join(names[i] for i in ids[mask])
            colour = tuple(int(x) for x in batch.images[row, 4, 4])
            recorded[text] = (full, str(colour), bool(batch.has_image[row]))
    for colour, rgb in COLOURS.items():
        full, pixel, has_image = recorded[f"it is {colour} </s>"]
        asked = f"<s> Question: which colour is it ? Answer: it is {colour} </s>"
        assert (full, pixel, has_image) == (asked, str(rgb), True)
    full, pixel, has_image = recorded["good day fine </s>"]
    assert (pixel, has_image) == ("(0, 0, 0)", False)
    assert full.startswith("<s> Question: hello Answer: good day Question: how are")


def test_long_texts_are_cut():
    words = Tokenizer.build(["a b c"], 16)
    ids, mask, target = words.encode_answers([("a b", False), (" c c c", True)], 4)
    assert ids.tolist()[1:] == [words.token_id(w) for w in "abc"]
    assert mask.all()
    assert target.tolist() == [False, False, False, True]
    _, mask, target = words.encode_answers([("a", False), (" c", True), (" b", False)], 6)
    assert mask.sum() == 5
    assert target.tolist() == [False, False, True, False, False, False]


def test_rows_depend_on_seed_and_number_alone(tmp_path):
    path = write(tmp_path)
    full = batches(path, 5)
    again = batches(path, 2, start=3, threads=1, prefetch=1)
    for a, b in zip(full[3:], again, strict=True):
        for x, y in zip(dataclasses.astuple(a), dataclasses.astuple(b), strict=True):
            np.testing.assert_array_equal(x, y)
    halves = [batches(path, 5, process_index=i, process_count=2) for i in range(2)]
    for k, batch in enumerate(full):
        text = np.concatenate([halves[0][k].text, halves[1][k].text])
        np.testing.assert_array_equal(text, batch.text)
    first = np.concatenate([b.text for b in full[:3]])
    other = np.concatenate([b.text for b in batches(path, 3, seed=6)])
    assert not np.array_equal(first, other)
    # One epoch is every conversation once.
    assert len({row.tobytes() for row in full[0].text}) == 4


@pytest.mark.parametrize(
    ("item", "problem"),
    [
        ({"conversations": turns("a")}, "conversation 0: `conversations` must be a list"),
        ({"conversations": turns("a", "b")[::-1]}, "turn 0 must be from 'human'"),
        ({"conversations": [{"from": "human"}, {"from": "gpt"}]}, "turn 0 has no text"),
        ({"image": ["a", "b"], "conversations": turns("a", "b")}, "the name of one file"),
        ("text", "must be a list"),
    ],
)
def test_what_is_not_a_conversation_is_named(tmp_path, item, problem):
    path = tmp_path / "texts.json"
    path.write_text(json.dumps([item]))
    with pytest.raises(DataError, match=problem):
        CaptionSet(path)[0]


def test_files_that_cannot_be_used_are_named(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        CaptionSet(tmp_path / "absent.json")
    for text, problem in (("{", "not JSON"), ("{}", "expected a list"), ("[]", "no conversation")):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(DataError, match=problem):
            CaptionSet(tmp_path / "bad.json")
    path = write(tmp_path)
    (tmp_path / "red.png").unlink()
    with pytest.raises(DataError, match=r"conversation 0: .*red.png does not exist"):
        batches(path, 1)
    (tmp_path / "red.png").write_bytes(b"\x89PNGxx")
    with pytest.raises(ImageDecodeError, match=r"conversation 0: .*red.png"):
        batches(path, 1)
    with pytest.raises(ConfigError, match=r"data\.cotrain\.rows: 4 is not a multiple of 3"):
        batches(path, 1, process_count=3)


def test_a_run_goes_on_with_the_texts_it_had(tmp_path):
    texts = CaptionSet(write(tmp_path))
    check_texts(texts, {"samples": 3, "captions": texts.identity()})
    check_texts(None, {"samples": 3})
    for current, position in ((texts, {}), (None, {"captions": texts.identity()})):
        with pytest.raises(DataError, match="the run was stopped with"):
            check_texts(current, position)
