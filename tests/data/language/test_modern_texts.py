"""Prompts with a state, answers in FAST tokens, sentencepiece files."""

from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import normalizers, processors

from vla_jax.data.language import sentencepiece
from vla_jax.data.language.fast_text import FastText
from vla_jax.data.language.prompts import FORMS, Writer, state_bins
from vla_jax.data.language.tokenizer import Tokenizer
from vla_jax.data.units.fast import FastTokenizer, NotAChunkError

FOLDER = Path(__file__).parents[2] / "fixtures/openpi_tokenizer"


def test_bins_end_where_openpis_do():
    assert state_bins(np.array([-1.01, -1.0, 0.0, 0.999, 1.0, 7.0])).tolist() == [
        -1, 0, 128, 255, 255, 255,
    ]  # fmt: skip


def test_prompts():
    state = np.array([0.0, -1.0])
    assert FORMS["pi0"].write(" open_the\ndrawer ") == "open the drawer\n"
    text = FORMS["pi05"].write("Open it", state)
    assert text == "Task: Open it, State: 128 0;\nAction: "
    assert FORMS["smolvla"].write("go\n") == FORMS["smolvla"].write("go") == "go\n"
    with pytest.raises(ValueError, match="there is none"):
        FORMS["pi05"].write("Open it")


def llama(words: list[str]) -> Tokenizer:
    """A tokenizer made as Llama's is: blanks are letters, <s> comes first, pieces are merged."""
    letters = sorted(set("".join(words)) | {"\u2581", "\n", "?", ":", "."})
    vocabulary = {x: i for i, x in enumerate(["<unk>", "<s>", "</s>", *letters])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="<unk>"))
    steps = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    backend.normalizer = normalizers.Sequence(steps)  # type: ignore[assignment]
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return Tokenizer(backend)


@pytest.mark.parametrize("form", ["openvla", "openvla_v01"])
def test_openvlas_prompt_ends_with_a_blank_and_the_stop_token(form):
    text = FORMS[form].write("Open THE drawer")
    assert "What action should the robot take to open the drawer?" in text
    tokenizer = llama([text])
    ids, mask = Writer(tokenizer, 400, "", form)("Open THE drawer")
    assert ids[mask][-2:].tolist() == [tokenizer.token_id("\u2581"), tokenizer.token_id("</s>")]
    assert ids[mask][-3] == tokenizer.token_id(":")
    assert ids[mask].tolist().count(tokenizer.token_id("<s>")) == 1
    assert ids[0] == tokenizer.token_id("<s>")


def test_a_folder_with_a_sentencepiece_file_alone(tmp_path):
    model = tmp_path / "paligemma_tokenizer.model"
    model.write_bytes((FOLDER / "tiny_tokenizer.model").read_bytes())
    tokenizer = Tokenizer.from_dir(tmp_path)
    ids, mask = tokenizer.encode("<s>open the drawer\n", 12)
    assert ids[0] == 2
    assert ids[mask][-1] == tokenizer.token_id("\n")
    assert ids[~mask].tolist() == [0] * int((~mask).sum())
    again = Tokenizer.from_json(tokenizer.to_json())
    np.testing.assert_array_equal(again.encode("<s>open the drawer\n", 12)[0], ids)


def test_what_is_no_sentencepiece_file_is_refused(tmp_path):
    path = tmp_path / "x.model"
    for content in (b"", b"not a model at all", b"\x0a\xff"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"sentencepiece|byte pairs"):
            sentencepiece.read(path)


def test_answers_that_are_no_chunk_are_refused():
    time = np.linspace(0, 1, 6)[:, None]
    chunks = [np.sin(time * speed + np.arange(2)) for speed in np.linspace(0, 2, 40)]
    fast = FastText(FastTokenizer.fit(chunks, 120), 872, (7, 8), (9,), 1)
    ids = fast.write(chunks[3])
    assert ids[:2] == [7, 8]
    assert ids[-2:] == [9, 1]
    assert all(fast.first <= i < 872 for i in ids[2:-2])
    assert np.abs(fast.read(ids + [0] * 5, 6, 2) - chunks[3]).max() < 0.2
    for wrong in (ids[1:], [7, 8, 9, 1], ids[:-3] + ids[-2:], [7, 8, *ids[2:-2], ids[2], 9], []):
        with pytest.raises(NotAChunkError):
            fast.read(wrong, 6, 2)
