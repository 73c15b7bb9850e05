"""Folders with a sentencepiece file instead of tokenizer.json, against sentencepiece's own ids."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from vla_jax.data.language import tokenizer as tokenizer_module
from vla_jax.data.language.tokenizer import Tokenizer

FOLDER = Path(__file__).parents[2] / "fixtures" / "sentencepiece"


@pytest.fixture(autouse=True)
def without_the_libraries(monkeypatch):
    for name in ("transformers", "sentencepiece", "google.protobuf"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.fixture
def folder(tmp_path):
    """Makes a Hugging Face folder of a file and settings."""

    def make(file, name, settings=None, **others):
        shutil.copyfile(FOLDER / file, tmp_path / name)
        for stem, content in {"tokenizer_config": settings, **others}.items():
            if content is not None:
                (tmp_path / f"{stem}.json").write_text(json.dumps(content))
        return tmp_path

    return make


def cases(name):
    content = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return list(zip(content["texts"], content["ids"], strict=True))


def ids(tokenizer, text):
    row, mask = tokenizer.encode(text, 64)
    return row[mask].tolist()


LLAMA = {"tokenizer_class": "LlamaTokenizer"}


@pytest.mark.parametrize(
    "described",
    [{"settings": LLAMA}, {"settings": LLAMA | {"legacy": True, "add_bos_token": True}}, {},
     {"config": {"model_type": "llama"}}],
)  # fmt: skip
def test_llama_as_sentencepiece_has_it(folder, described):
    tokenizer = Tokenizer.from_dir(folder("llama.model", "tokenizer.model", **described))
    assert len(cases("llama")) > 10
    for text, expected in cases("llama"):
        assert ids(tokenizer, text) == [1, *expected], repr(text)
    again = Tokenizer.from_json(tokenizer.to_json())
    assert ids(again, "open the drawer") == ids(tokenizer, "open the drawer")


def test_llama_behind_a_special_token(folder):
    expected = dict(cases("llama"))["open the drawer"]
    created = folder("llama.model", "tokenizer.model", LLAMA)
    # A space before each part, also behind a token; by the newer rule before the first alone.
    assert ids(Tokenizer.from_dir(created), "</s>open the drawer") == [1, 2, *expected]
    (created / "tokenizer_config.json").write_text(json.dumps(LLAMA | {"legacy": False}))
    result = ids(Tokenizer.from_dir(created), "</s>open the drawer")
    assert result[:2] == [1, 2]
    assert result[2:] != expected
    assert ids(Tokenizer.from_dir(created), "open the drawer") == [1, *expected]


def test_ends_and_tokens_that_a_folder_adds(folder):
    settings = LLAMA | {
        "add_bos_token": False,
        "add_eos_token": True,
        "pad_token": {"content": "[PAD]"},
        "added_tokens_decoder": {
            "0": {"content": "<unk>", "special": True},
            "420": {"content": "[PAD]", "special": True},
        },
    }
    created = folder("llama.model", "tokenizer.model", settings, added_tokens={"<image>": 421})
    tokenizer = Tokenizer.from_dir(created)
    assert tokenizer.vocab_size == 422
    assert tokenizer.pad_id == 420
    expected = dict(cases("llama"))["open the drawer"]
    assert ids(tokenizer, "open the drawer<image>") == [*expected, 421, 2]
    assert ids(Tokenizer.from_dir(created, plain=True), "open the drawer") == expected
    (created / "added_tokens.json").write_text('{"<image>": 500}')
    with pytest.raises(ValueError, match="'<image>' is said to be 500, it would be 421"):
        Tokenizer.from_dir(created)


def test_kosmos2s_own_file(folder):
    described = {"config": {"model_type": "kosmos-2"}, "settings": {"model_max_length": 2048}}
    tokenizer = Tokenizer.from_dir(folder("kosmos2.model", "sentencepiece.bpe.model", **described))
    assert tokenizer.pad_id == 1
    differ = [text for text, expected in cases("kosmos2") if ids(tokenizer, text) != expected]
    # Spelled tokens are found as such; one accent over another, and a line break that Unicode has
    # beside the usual ones, are where its normalization and ours part.
    spelled = ["<s>", "</s>", "<pad>", "<unk>", "<s>open the drawer</s>"]
    assert differ[:5] == spelled
    assert len(differ) == 7


def test_a_file_of_another_kind_than_the_folder_says(folder):
    created = folder("llama.model", "tokenizer.model", {"tokenizer_class": "XLMRobertaTokenizer"})
    with pytest.raises(ValueError, match="model type 2, a XLMRobertaTokenizer has 1"):
        Tokenizer.from_dir(created)


def test_a_large_vocabulary_is_read_once(folder, monkeypatch):
    created = folder("llama.model", "tokenizer.model")
    (created / "tokenizer.json").write_text(Tokenizer.from_dir(created).to_json())
    (created / "tokenizer.model").unlink()
    read = []

    class Counted:
        def __getattr__(self, name):
            if name.startswith("from_"):
                read.append(name)
            return getattr(backend, name)

    backend = tokenizer_module._Backend
    monkeypatch.setattr(tokenizer_module, "_Backend", Counted())
    tokenizer = Tokenizer.from_dir(created, plain=True)
    assert read == ["from_file"]
    read.clear()
    Tokenizer.from_json(tokenizer.to_json())
    assert read == ["from_str"]
