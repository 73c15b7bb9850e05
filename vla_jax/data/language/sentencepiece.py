"""A sentencepiece file (`*.model`) of byte pairs, such as PaliGemma's, as a `tokenizers` pipeline.

openpi's checkpoints are used with `paligemma_tokenizer.model` alone; nothing else of PaliGemma's
folder is needed, and neither is the sentencepiece library.

Source of the format: sentencepiece_model.proto of google/sentencepiece.
"""

import struct
from pathlib import Path
from typing import NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from vla_jax.data.rlds.records import message_fields

# `type` of a piece.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_BPE = 2  # `model_type` of the trainer
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


class _Piece(NamedTuple):
    text: str
    score: float
    kind: int


def read(path: str | Path) -> Tokenizer:
    """The pipeline of a file; nothing is added around a text.

    Raises:
        ValueError: the file is no sentencepiece model, or one of unigrams, or it rewrites texts.
    """
    data = Path(path).expanduser().read_bytes()
    try:
        pieces = [
            _piece(data[a:b]) for number, a, b in message_fields(data, 0, len(data)) if number == 1
        ]
        trainer, normalizer = _part(data, 2), _part(data, 3)
        kind, prefix = _number(trainer, 3, 1), _number(normalizer, 3, 1)
        trims, rewrites = _number(normalizer, 4, 1), bool(_part(normalizer, 2))
    except (IndexError, UnicodeDecodeError, struct.error) as error:
        raise ValueError(f"{path}: not a sentencepiece model: {error}") from error
    # Models that prefix, trim or rewrite texts would need steps that `_build` lacks.
    if not pieces or kind != _BPE or prefix or trims or rewrites:
        raise ValueError(
            f"{path}: only byte pairs over texts as they are (PaliGemma's) can be read: it has "
            f"{len(pieces)} pieces, model type {kind}, dummy prefix {bool(prefix)}, whitespace "
            f"removal {bool(trims)}, rewriting {rewrites}"
        )
    return _build(pieces)


def _build(pieces: list[_Piece]) -> Tokenizer:
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
    tokenizer.normalizer = normalizers.Replace(" ", _SPACE)  # type: ignore[assignment]
    tokenizer.decoder = decoders.Sequence(  # type: ignore[assignment]
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    control = [p.text for p in pieces if p.kind in (_UNKNOWN, _CONTROL)]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    # These are matched whole before any pair is joined.
    user_defined = [p.text for p in pieces if p.kind == _USER_DEFINED]
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in user_defined])
    tokenizer.enable_padding(pad_id=0, pad_token=pieces[0].text)
    return tokenizer


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
