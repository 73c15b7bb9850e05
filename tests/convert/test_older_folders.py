"""Hugging Face folders of before: weights that torch.save wrote, tokenizers of sentencepiece."""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from vla_jax.config import resolve
from vla_jax.convert.formats import torch_write
from vla_jax.convert.formats.safetensors import Safetensors
from vla_jax.convert.hf.source import open_source
from vla_jax.data.language.tokenizer import Tokenizer
from vla_jax.models.weights import WeightError

SOURCE = Path(__file__).parents[1] / "fixtures" / "hf_kosmos2"


@pytest.fixture
def model():
    from configs import kosmos_ph

    return resolve(kosmos_ph.get_config()).model


def write(path, source, names):
    shapes, dtypes = ({name: of[name] for name in names} for of in (source.shapes, source.dtypes))
    torch_write.write(
        path, shapes, dtypes, {}, lambda: ((name, source.read(name)) for name in names), wrapper=""
    )


def test_weights_of_torch(tmp_path, model):
    source = Safetensors(SOURCE)
    names = sorted(source.shapes)
    write(tmp_path / "pytorch_model.bin", source, names)
    result = open_source(tmp_path, model)
    assert result.shapes == source.shapes
    np.testing.assert_array_equal(result.read(names[3]), source.read(names[3]))


def test_weights_of_torch_in_shards(tmp_path, model):
    source = Safetensors(SOURCE)
    names = sorted(source.shapes)
    parts = {"pytorch_model-1.bin": names[:5], "pytorch_model-2.bin": names[5:]}
    for file, part in parts.items():
        write(tmp_path / file, source, part)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    result = open_source(tmp_path, model)
    assert result.shapes == source.shapes
    for name in (names[0], names[-1]):
        np.testing.assert_array_equal(result.read(name), source.read(name))
    index["weight_map"][names[0]] = "../elsewhere.bin"
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightError, match="names files outside its folder"):
        open_source(tmp_path, model)


def test_a_sentencepiece_model_names_what_is_missing(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    shutil.copyfile(SOURCE / "config.json", tmp_path / "config.json")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    present = importlib.util.find_spec

    def without(name, *more):
        return None if name == "sentencepiece" else present(name, *more)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    with pytest.raises(ImportError, match=r"\*\.model cannot be converted without sentencepiece"):
        Tokenizer.from_dir(tmp_path)


def test_tokens_beyond_the_embedding_are_refused():
    tokenizer = Tokenizer.build(["open the drawer", "open it"], 64)
    assert tokenizer.beyond(tokenizer.vocab_size) == []
    assert tokenizer.beyond(6) == ["drawer", "it", "the"]
    tokenizer.limit(6)
    tokenizer.encode("open", 8)
    with pytest.raises(ValueError, match=r"'open it' holds the tokens \['it'\], beyond the 6 rows"):
        tokenizer.encode("open it", 8)
