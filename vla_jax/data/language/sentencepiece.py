"""A sentencepiece file (`*.model`) as a `tokenizers` pipeline, without the sentencepiece library.

Three families of such files are known, by what their folder or the file itself says:

- PaliGemma's, which openpi uses alone: byte pairs over texts as they are, nothing around them;
- LLaMA's (Vicuna, LLaVA): byte pairs, a space before every text, `<s>` in front;
- XLM-R's (Kosmos-2): unigrams, texts brought into one form of Unicode, `<s> ... </s>` around, ids
  in fairseq's order.

Ids are those of sentencepiece itself, but that special tokens which a text spells out are found.

Source of the format: sentencepiece_model.proto of google/sentencepiece; of the families: the
converters of transformers.
"""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from vla_jax.data.rlds.records import message_fields

# `type` of a piece.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_UNIGRAM, _BPE = 1, 2  # `model_type` of the trainer
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
# The first ids of fairseq's vocabularies; the file has others in their place.
_FAIRSEQ = ("<s>", "<pad>", "</s>", "<unk>")
_MASK = "<mask>"  # the last of them
_CONFIG = "tokenizer_config.json"
# Classes of transformers in tokenizer_config.json, and kinds of model in config.json.
_LLAMA = ("LlamaTokenizer", "LlamaTokenizerFast", "llama", "llava")
_XLM_R = ("XLMRobertaTokenizer", "XLMRobertaTokenizerFast", "kosmos-2")


class _Piece(NamedTuple):
    text: str
    score: float
    kind: int


class _File(NamedTuple):
    """What a file says: its pieces, how they are put together, and what is done to a text first."""

    pieces: list[_Piece]
    kind: int
    prefix: bool
    trims: bool
    rewriting: bytes


def read(path: str | Path) -> Tokenizer:
    """The pipeline of a file alone, by its own family; nothing is added to PaliGemma's texts.

    Raises:
        ValueError: the file is no sentencepiece model, or of no known family.
    """
    file = _parse(Path(path).expanduser())
    if file.kind == _UNIGRAM:
        return _xlm_r(file)
    return _llama(file, {}) if file.prefix else _paligemma(file)


def read_folder(folder: Path) -> Tokenizer | None:
    """The pipeline of a Hugging Face folder with one such file; None if its family is not known.

    Raises:
        ValueError: the file is damaged, or not what the folder says.
    """
    paths = sorted(folder.glob("*.model"))
    if len(paths) != 1:
        return None
    settings = _json(folder / _CONFIG)
    name = settings.get("tokenizer_class") or _json(folder / "config.json").get("model_type")
    # openpi's checkpoints have the file alone; with settings it is a Hugging Face folder.
    if not settings and name not in (*_LLAMA, *_XLM_R):
        return read(paths[0])
    if name not in (*_LLAMA, *_XLM_R):
        return None
    file = _parse(paths[0])
    kind = _BPE if name in _LLAMA else _UNIGRAM
    if file.kind != kind:
        raise ValueError(f"{paths[0]}: model type {file.kind}, a {name} has {kind}")
    tokenizer = _llama(file, settings) if name in _LLAMA else _xlm_r(file)
    return _with_added(tokenizer, folder, settings)


def _parse(path: Path) -> _File:
    data = path.read_bytes()
    try:
        pieces = [
            _piece(data[a:b]) for number, a, b in message_fields(data, 0, len(data)) if number == 1
        ]
        trainer, normalizer = _part(data, 2), _part(data, 3)
        kind, prefix = _number(trainer, 3, 1), bool(_number(normalizer, 3, 1))
        trims, rewriting = bool(_number(normalizer, 4, 1)), _part(normalizer, 2)
    except (IndexError, UnicodeDecodeError, struct.error) as error:
        raise ValueError(f"{path}: not a sentencepiece model: {error}") from error
    file = _File(pieces, kind, prefix, trims, rewriting)
    pairs = kind == _BPE and not trims and not rewriting
    fairseq = kind == _UNIGRAM and prefix and trims and rewriting
    if not pieces or not (pairs or fairseq):
        raise ValueError(
            f"{path}: only byte pairs over texts as they are (PaliGemma, LLaMA) and unigrams over "
            f"normalized ones (XLM-R) can be read: it has {len(pieces)} pieces, model type {kind}, "
            f"dummy prefix {prefix}, whitespace removal {trims}, rewriting {bool(rewriting)}"
        )
    return file


def _paligemma(file: _File) -> Tokenizer:
    tokenizer = _byte_pairs(file)
    tokenizer.normalizer = normalizers.Replace(" ", _SPACE)  # type: ignore[assignment]
    tokenizer.decoder = decoders.Sequence(  # type: ignore[assignment]
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


def _llama(file: _File, settings: Mapping[str, Any]) -> Tokenizer:
    tokenizer = _byte_pairs(file)
    prefix = file.prefix and settings.get("add_prefix_space") is not False
    # Sentencepiece puts a space before each part of a text, also behind a special token. Newer
    # settings say legacy=false: only before the first.
    if prefix and settings.get("legacy") is not False:
        before = [normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)]
        tokenizer.normalizer = normalizers.Sequence(before)  # type: ignore[assignment]
    else:
        scheme = "first" if prefix else "never"
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(  # type: ignore[assignment]
            replacement=_SPACE, prepend_scheme=scheme, split=False
        )
    parts = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    # The space that was put in front is no part of the text.
    parts += [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(parts)  # type: ignore[assignment]
    begin = _content(settings.get("bos_token"), "<s>")
    end = _content(settings.get("eos_token"), "</s>")
    around = [begin] * (settings.get("add_bos_token") is not False)
    around += ["$A"] + [end] * bool(settings.get("add_eos_token"))
    _surround(tokenizer, around)
    return tokenizer


def _xlm_r(file: _File) -> Tokenizer:
    # The file's own first three are <unk>, <s> and </s>.
    pieces = [(text, 0.0) for text in _FAIRSEQ]
    pieces += [(piece.text, piece.score) for piece in file.pieces[3:]] + [(_MASK, 0.0)]
    unknown = _FAIRSEQ.index("<unk>")
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=unknown, byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence(  # type: ignore[assignment]
        [
            normalizers.Precompiled(file.rewriting),
            normalizers.Strip(),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    )
    metaspace = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="always")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [pre_tokenizers.WhitespaceSplit(), metaspace]
    )
    tokenizer.decoder = decoders.Metaspace(replacement=_SPACE, prepend_scheme="always")  # type: ignore[assignment]
    specials = [AddedToken(text, special=True, normalized=False) for text in _FAIRSEQ]
    specials.append(AddedToken(_MASK, special=True, normalized=False, lstrip=True))
    tokenizer.add_special_tokens(specials)
    _surround(tokenizer, ["<s>", "$A", "</s>"])
    tokenizer.enable_padding(pad_id=_FAIRSEQ.index("<pad>"), pad_token="<pad>")
    return tokenizer


def _byte_pairs(file: _File) -> Tokenizer:
    pieces = file.pieces
    scores = {piece.text: piece.score for piece in pieces if piece.kind == _NORMAL}
    # Pairs with a higher score are joined first.
    ranked = sorted(scores, key=lambda text: -scores[text])
    # Any two neighbours that make a piece may be joined, whichever two they are.
    merges = [
        (text[:i], text[i:])
        for text in ranked
        for i in range(1, len(text))
        if text[:i] in scores and text[i:] in scores
    ]
    unknown = next((piece.text for piece in pieces if piece.kind == _UNKNOWN), None)
    vocabulary = {piece.text: i for i, piece in enumerate(pieces)}
    model = models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    control = [p.text for p in pieces if p.kind in (_UNKNOWN, _CONTROL)]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    # These are matched whole before any pair is joined.
    user_defined = [p.text for p in pieces if p.kind == _USER_DEFINED]
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in user_defined])
    tokenizer.enable_padding(pad_id=0, pad_token=pieces[0].text)
    return tokenizer


def _surround(tokenizer: Tokenizer, template: list[str]) -> None:
    """Puts special tokens around every text; those that the vocabulary lacks are left out."""
    ids = {t: tokenizer.token_to_id(t) for t in template if t != "$A"}
    special_tokens = {token: number for token, number in ids.items() if number is not None}
    if special_tokens:
        single = [part for part in template if part == "$A" or part in special_tokens]
        tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
            single=single, special_tokens=list(special_tokens.items())
        )


def _with_added(tokenizer: Tokenizer, folder: Path, settings: Mapping[str, Any]) -> Tokenizer:
    """With the tokens that a folder's other files add to the vocabulary, in the order of their ids.

    Raises:
        ValueError: one of them would get another id.
    """
    described = settings.get("added_tokens_decoder") or {}
    added = {int(i): (_content(token, ""), token) for i, token in described.items()}
    for text, number in _json(folder / "added_tokens.json").items():
        added.setdefault(int(number), (text, {"special": True}))
    for number, (text, how) in sorted(added.items()):
        how = how if isinstance(how, Mapping) else {}
        options = {k: bool(how.get(k)) for k in ("lstrip", "rstrip", "single_word", "normalized")}
        token = AddedToken(text, special=bool(how.get("special", True)), **options)
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
        if tokenizer.token_to_id(text) != number:
            got = tokenizer.token_to_id(text)
            raise ValueError(f"{folder}: token {text!r} is said to be {number}, it would be {got}")
    pad = _content(settings.get("pad_token"), "")
    if pad and tokenizer.token_to_id(pad) is not None:
        tokenizer.enable_padding(pad_id=tokenizer.token_to_id(pad), pad_token=pad)
    return tokenizer


def _content(token: Any, otherwise: str) -> str:
    """The text of a token, which settings give as such or described."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else otherwise


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: no JSON: {error}") from error
    return content if isinstance(content, dict) else {}


def _piece(data: bytes) -> _Piece:
    spans = {number: (a, b) for number, a, b in message_fields(data, 0, len(data))}
    text = data[slice(*spans[1])].decode() if 1 in spans else ""
    score = struct.unpack("<f", data[slice(*spans[2])])[0] if 2 in spans else 0.0
    return _Piece(text, score, _number(data, 3, _NORMAL))


def _part(data: bytes, number: int) -> bytes:
    """The value of a field; empty if it is not there."""
    return next((data[a:b] for n, a, b in message_fields(data, 0, len(data)) if n == number), b"")


def _number(data: bytes, number: int, default: int) -> int:
    """A field that fits one byte."""
    value = _part(data, number)
    return value[0] if value else default
