"""Qwen's own tokenizer file, `qwen.tiktoken`, as a `tokenizers` pipeline.

A line is a piece (its bytes in base64) and its rank, which is its id. Text is normalized (NFC),
cut into words by a regular expression, and in every word the two neighbours that make the piece
of the lowest rank are joined until none are left. The special tokens' ids follow those of the
pieces; no token is added around a text.

Source: tokenization_qwen.py of Qwen/Qwen-VL and the tiktoken library.
"""

import base64
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

FILE = "qwen.tiktoken"
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PADDING = "<|endoftext|>"
# In the order of their ids.
_SPECIALS = (
    PADDING, "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)),
    "<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<img>", "</img>", "<imgpad>",
)  # fmt: skip


def read(path: str | Path) -> Tokenizer:
    """The pipeline of a file.

    Raises:
        ValueError: naming the first line that is no piece, or if the ranks are not 0, 1, 2, ...
    """
    ranks = _ranks(Path(path))
    letters = _letters()
    spelled = {piece: "".join(letters[byte] for byte in piece) for piece in ranks}
    # Any two neighbours that make a piece may be joined, whichever two they are.
    merges = [
        (spelled[piece[:i]], spelled[piece[i:]])
        for piece in ranks
        for i in range(1, len(piece))
        if piece[:i] in ranks and piece[i:] in ranks
    ]
    vocabulary = {spelled[piece]: rank for piece, rank in ranks.items()}
    # A word that is a piece itself is taken whole, as in tiktoken.
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    tokenizer.normalizer = normalizers.NFC()  # type: ignore[assignment]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            # Its own expression is GPT-2's, which cuts words at other places.
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in _SPECIALS])
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id(PADDING), pad_token=PADDING)
    return tokenizer


def _ranks(path: Path) -> dict[bytes, int]:
    """Piece -> rank, lowest rank first."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line:
            continue
        try:
            piece, rank = line.split()
            ranks[base64.b64decode(piece, validate=True)] = int(rank)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: no piece in base64 and its rank") from error
    # The merges follow this order, which is their priority.
    ranks = dict(sorted(ranks.items(), key=lambda item: item[1]))
    if list(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"{path}: the ranks of the {len(ranks)} pieces are not 0, 1, 2, ...")
    return ranks


def _letters() -> dict[int, str]:
    """GPT-2's printable stand-ins for the 256 bytes, which `ByteLevel` writes."""
    # Left out are blanks, control characters and 173, the soft hyphen, none of which can be seen.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    unprintable = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    return letters | {byte: chr(256 + i) for i, byte in enumerate(unprintable)}
