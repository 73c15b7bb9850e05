import json

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, processors

from vla_jax.data.errors import TextLengthError
from vla_jax.data.language.tokenizer import Tokenizer
from vla_jax.models.backbones import moondream, uform

TEXTS = ["push the red block", "push the blue block", "Open the drawer"]


@pytest.fixture
def tokenizer():
    return Tokenizer.build(TEXTS, 64)


def test_build_and_encode(tokenizer):
    ids, mask = tokenizer.encode("push the green block", 8)
    assert ids.dtype == np.int32
    words = {w: tokenizer.token_id(w) for w in ("push", "the", "block")}
    assert words["the"] == 5  # the most frequent word comes first after the specials
    assert ids.tolist() == [0, words["push"], 5, 3, words["block"], 2, 1, 1]
    assert mask.tolist() == [True] * 6 + [False] * 2
    assert tokenizer.pad_id == 1


def test_build_is_deterministic_and_cut_to_size(tokenizer):
    again = Tokenizer.build(reversed(TEXTS), 64)
    assert again.to_json() == tokenizer.to_json()
    small = Tokenizer.build(TEXTS, 6)
    assert small.vocab_size == 6
    assert small.encode("the push", 4)[0].tolist() == [0, 5, 3, 2]
    with pytest.raises(ValueError, match="must exceed"):
        Tokenizer.build(TEXTS, 5)


def test_case_is_kept_and_specials_are_found_inside_words(tokenizer):
    assert tokenizer.token_id("Open") != tokenizer.encode("open", 3)[0][1]
    ids, _ = tokenizer.encode("<grounding>push", 4)
    assert ids.tolist() == [0, 4, tokenizer.token_id("push"), 2]


def test_too_long_says_by_how_much(tokenizer):
    assert tokenizer.encode("push the red block", 6)[1].all()
    with pytest.raises(TextLengthError, match="6 tokens, 2 more than the 4 text columns"):
        tokenizer.encode("push the red block", 4)


def test_json_round_trip(tokenizer):
    again = Tokenizer.from_json(tokenizer.to_json())
    assert again.to_json() == tokenizer.to_json()
    assert again.pad_id == tokenizer.pad_id
    for text in TEXTS:
        np.testing.assert_array_equal(again.encode(text, 9)[0], tokenizer.encode(text, 9)[0])


def test_from_dir_ignores_the_files_own_truncation(tokenizer, tmp_path):
    raw = json.loads(tokenizer.to_json())
    raw["truncation"] = {"max_length": 3, "strategy": "LongestFirst", "stride": 0}
    raw["truncation"]["direction"] = "Right"
    raw["padding"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"pad_token": {"content": "</s>"}})
    )
    loaded = Tokenizer.from_dir(tmp_path)
    ids, mask = loaded.encode("push the red block", 8)
    assert mask.sum() == 6
    assert loaded.pad_id == 2
    assert ids[6:].tolist() == [2, 2]
    assert Tokenizer.from_json(loaded.to_json()).pad_id == 2


def test_from_dir_without_a_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json"):
        Tokenizer.from_dir(tmp_path)


def test_unknown_token(tokenizer):
    with pytest.raises(KeyError, match="<image>"):
        tokenizer.token_id("<image>")


def test_from_dir_converts_a_slow_tokenizer(tmp_path):
    pytest.importorskip("transformers")
    vocabulary = {"<|endoftext|>": 0, "a": 1, "b": 2, "ab": 3, "Ġ": 4, "Ġab": 5}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\nĠ ab\n")
    described = {"tokenizer_class": "GPT2Tokenizer", "pad_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(described))
    ids, mask = Tokenizer.from_dir(tmp_path).encode("ab ab", 4)
    assert ids.tolist() == [3, 5, 0, 0]
    assert mask.sum() == 2


@pytest.mark.parametrize("described", [False, True])
def test_from_dir_reads_vocabulary_and_merges_alone(tmp_path, described):
    """OFA's files are BART's without a word on what they are; transformers agrees when told."""
    words = ["<s>", "<pad>", "</s>", "<unk>", "a", "b", "ab", "Ġ", "Ġab", "<mask>"]
    (tmp_path / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\nĠ ab\n")
    if described:
        pytest.importorskip("transformers")
        text = json.dumps({"tokenizer_class": "BartTokenizer"})
        (tmp_path / "tokenizer_config.json").write_text(text)
    loaded = Tokenizer.from_dir(tmp_path)
    ids, mask = loaded.encode(" ab aba", 8)
    assert ids.tolist() == [0, 8, 8, 4, 2, 1, 1, 1]
    assert mask.sum() == 5
    ids, _, target = loaded.encode_answers(((" ab", False), (" ab", True)), 5)
    assert ids.tolist() == [0, 8, 8, 2, 1]
    assert target.tolist() == [False, False, True, True, False]
    assert Tokenizer.from_json(loaded.to_json()).encode("a<mask>", 4)[0].tolist() == [0, 4, 9, 2]


def test_a_tokenizer_of_bytes_adds_nothing(tmp_path):
    """Moondream's and UForm's prompts: the special token is found, none is added."""
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    backend.add_special_tokens(["<|endoftext|>"])
    backend.add_special_tokens(["<image>"])
    backend.post_processor = processors.ByteLevel(trim_offsets=True)  # type: ignore[assignment]
    backend.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer.from_dir(tmp_path)
    text, mask = ours.encode(moondream.Moondream.PROMPT.format(instruction="go"), 6)
    assert text[mask].tolist() == [256, *(pieces.index(c) for c in "go")]
    text, mask = ours.encode(uform.UForm.PROMPT.format(instruction="go"), 6)
    assert text[mask].tolist() == [257, *(pieces.index(c) for c in "Ġgo")]


def test_kosmos_folder_with_sentencepiece_alone(tmp_path):
    """Its class is XLM-RoBERTa's; ids are the pieces' own plus one, as fairseq has them."""
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("transformers")
    texts = ["open the drawer", "push the red block to the left", "turn on the light bulb"]
    (tmp_path / "corpus.txt").write_text("\n".join(texts * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"),
        model_prefix=str(tmp_path / "sentencepiece.bpe"),
        vocab_size=45,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (tmp_path / "config.json").write_text('{"model_type": "kosmos-2"}')
    named = {"tokenizer_class": "XLMRobertaTokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    model = sentencepiece.SentencePieceProcessor(str(tmp_path / "sentencepiece.bpe.model"))
    tokenizer = Tokenizer.from_dir(tmp_path)
    for text in texts:
        ids, valid = tokenizer.encode(text, 40)
        # fairseq has <s> <pad> </s> <unk> where sentencepiece has <unk> <s> </s>.
        assert ids[valid].tolist() == [0, *(i + 1 for i in model.encode(text)), 2]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("tokenizer_config.json", "[]", "tokenizer_config.json: expected an object, found list"),
        ("tokenizer_config.json", "{nope", "tokenizer_config.json: not JSON"),
        ("special_tokens_map.json", "", "special_tokens_map.json: the file is empty"),
        ("tokenizer_config.json", '{"pad_token": 3}', "pad_token is 3, no token"),
        ("tokenizer_config.json", '{"pad_token": {"text": "x"}}', "pad_token is {'text': 'x'}"),
    ],
)
def test_settings_beside_it_that_are_none(tmp_path, name, content, problem):
    (tmp_path / "tokenizer.json").write_text(Tokenizer.build(["pick up"], 20).to_json())
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=problem):
        Tokenizer.from_dir(tmp_path)


def test_settings_with_a_byte_order_mark(tmp_path):
    (tmp_path / "tokenizer.json").write_text(Tokenizer.build(["pick up"], 20).to_json())
    (tmp_path / "tokenizer_config.json").write_text('\ufeff{"pad_token": "</s>"}', "utf-8")
    assert Tokenizer.from_dir(tmp_path).pad_id == 2


def test_files_that_only_look_like_a_tokenizer(tmp_path):
    (tmp_path / "vocab.json").write_text("[]")
    (tmp_path / "merges.txt").write_text("x")
    with pytest.raises(ValueError, match=r"vocab\.json and merges\.txt: "):
        Tokenizer.from_dir(tmp_path)
    with pytest.raises(ValueError, match="of the checkpoint cannot be read"):
        Tokenizer.from_json("{nope")
