"""FAST: a chunk of actions as a few tokens, and back (Pertsch et al. 2025). Serving imports it.

A chunk's discrete cosine transform is rounded, written as one character a coefficient, lowest
frequency first and all dimensions of it together, and compressed by byte pair encoding. Files and
tokens are those of the published tokenizer (physical-intelligence/fast), down to what it loses:
characters it has not been fitted on are dropped without a word. `FastTokenizer.decode` therefore
takes nothing but whole chunks, and `FastTokenizer.keeps` tells whether a chunk survives.

Legend: t steps of the chunk · a action dimension
"""

import itertools
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

CONFIG, VOCABULARY = "processor_config.json", "tokenizer.json"
_LOST = "\ufffd"  # what bytes that make no character are read as
_MIN_PAIRS, _LONGEST = 2, 10_000  # the published fit's; the latter bounds a token's characters


class NotAChunkError(ValueError):
    """Tokens that are no chunk of actions; a robot must be sent nothing because of them."""


@dataclass(frozen=True)
class FastTokenizer:
    """A fitted tokenizer.

    Attributes:
        scale: coefficients are multiplied by it before they are rounded.
        min_token: the smallest coefficient, which is character 0.
        vocabulary: the byte pair encoding, as the text of a `tokenizers` file.
        horizon: t of the chunks it was fitted on; None where it takes any (the universal one).
        dim: a of them, likewise.
    """

    scale: float
    min_token: int
    vocabulary: str = field(repr=False)
    horizon: int | None = None
    dim: int | None = None

    @classmethod
    def from_dir(cls, folder: str | Path) -> "FastTokenizer":
        """Reads a folder with processor_config.json and tokenizer.json, such as the universal one.

        Raises:
            FileNotFoundError: one of the files is missing.
            ValueError: a file is damaged or lacks a number.
        """
        root = Path(folder).expanduser()
        raw = json.loads((root / CONFIG).read_text(encoding="utf-8"))
        return cls.from_json(raw | {"tokenizer": (root / VOCABULARY).read_text(encoding="utf-8")})

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> "FastTokenizer":
        """Inverse of `to_json`; keys of other programs are passed over.

        Raises:
            ValueError: naming the keys that are missing, or the vocabulary cannot be read.
        """
        missing = sorted({"scale", "min_token", "tokenizer"} - set(raw))
        if missing:
            raise ValueError(f"FAST tokenizer: no {missing}; there is {sorted(raw)}")
        tokenizer = cls(
            scale=float(raw["scale"]),
            min_token=int(raw["min_token"]),
            vocabulary=raw["tokenizer"],
            horizon=raw.get("time_horizon"),
            dim=raw.get("action_dim"),
        )
        try:
            # Parsed now, so that a damaged file is found when it is loaded.
            tokenizer._bpe  # noqa: B018
        except Exception as error:  # tokenizers raises bare Exception
            raise ValueError(f"FAST tokenizer: damaged vocabulary: {error}") from error
        return tokenizer

    def to_json(self) -> dict[str, Any]:
        """All of it as plain JSON values, under the published names, for a checkpoint."""
        return {
            "scale": self.scale,
            "min_token": self.min_token,
            "vocab_size": self.size,
            "time_horizon": self.horizon,
            "action_dim": self.dim,
            "tokenizer": self.vocabulary,
        }

    def save(self, folder: str | Path) -> None:
        """Writes the folder that `from_dir` reads; so does the published code."""
        root = Path(folder).expanduser()
        root.mkdir(parents=True, exist_ok=True)
        raw = self.to_json()
        (root / VOCABULARY).write_text(raw.pop("tokenizer"), encoding="utf-8")
        # transformers' AutoProcessor looks this class up.
        raw = {"processor_class": "UniversalActionProcessor"} | raw
        (root / CONFIG).write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def fit(
        cls,
        chunks: Iterable[Float[np.ndarray, "t a"]],
        vocab_size: int = 1024,
        scale: float = 10.0,
        longest: int = _LONGEST,
    ) -> "FastTokenizer":
        """Fits the vocabulary to chunks, normalized to about [-1, 1].

        Args:
            chunks: all of one shape.
            vocab_size: tokens at most, those of single characters included.
            scale: finer with larger numbers, and longer.
            longest: characters of a token at most. Padded dimensions are runs of zeros, on which
                merges without a bound are wasted.

        Raises:
            ValueError: there is no chunk, the shapes differ, a number is not finite, or the
                coefficients alone are more than `vocab_size`.
        """
        rows = [np.asarray(chunk) for chunk in chunks]
        shapes = sorted({row.shape for row in rows})
        if len(shapes) != 1 or len(shapes[0]) != 2:
            raise ValueError(f"FAST needs chunks of one shape (steps, dimensions), not {shapes}")
        coefficients = [_coefficients(row, scale).reshape(-1) for row in rows]
        low = min(int(row.min()) for row in coefficients)
        high = max(int(row.max()) for row in coefficients)
        if high - low + 1 > vocab_size:
            raise ValueError(
                f"FAST: coefficients from {low} to {high} need {high - low + 1} tokens, more than "
                f"the vocabulary of {vocab_size}; are the actions normalized? (scale {scale})"
            )
        backend = Tokenizer(models.BPE())
        # A space in front would be read back as one more coefficient.
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[reportAttributeAccessIssue]
        backend.decoder = decoders.ByteLevel()  # type: ignore[reportAttributeAccessIssue]
        backend.post_processor = processors.ByteLevel(trim_offsets=False)  # type: ignore[reportAttributeAccessIssue]
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=_MIN_PAIRS,
            show_progress=False,
            special_tokens=[],
            # Every coefficient of the range gets a token, whether or not these chunks have it.
            initial_alphabet=[chr(i) for i in range(high - low + 1)],
            max_token_length=longest,
        )
        backend.train_from_iterator((_write(row, low) for row in coefficients), trainer)
        return cls(scale, low, backend.to_str(), *shapes[0])

    @property
    def size(self) -> int:
        """Number of tokens."""
        return self._bpe.get_vocab_size()

    def encode(self, chunk: Float[np.ndarray, "t a"], clip: bool = False) -> list[int]:
        """Normalized actions -> token ids.

        Args:
            chunk: the actions.
            clip: take the nearest coefficient that it has met for one it has not, such as beyond
                the range it was fitted on; the published code does so at the lower end alone.

        Raises:
            ValueError: an action is not finite, or the chunk has another shape than it is for.
        """
        chunk = np.asarray(chunk)
        wanted = (self.horizon or chunk.shape[0], self.dim or chunk.shape[-1])
        if chunk.shape != wanted:
            raise ValueError(f"FAST: a chunk of shape {chunk.shape}, not {wanted}")
        text = _write(self._rounded(chunk, clip).reshape(-1), self.min_token)
        return self._bpe.encode(text, add_special_tokens=False).ids

    def keeps(self, chunk: Float[np.ndarray, "t a"], clip: bool = False) -> bool:
        """Whether `encode` loses nothing of a chunk but the rounding, and what it clips.

        What lies outside the range it was fitted on is lost, unless it is clipped.
        """
        coefficients = self._rounded(np.asarray(chunk), clip)
        try:
            # Dropped characters change the count, which `_read` refuses.
            decoded = self._read(self.encode(chunk, clip), coefficients.size)
        except NotAChunkError:
            return False
        return bool((decoded == coefficients.reshape(-1)).all())

    def decode(
        self, ids: Sequence[int] | Int[np.ndarray, "n"], horizon: int = 0, dim: int = 0
    ) -> Float[np.ndarray, "t a"]:
        """Token ids -> normalized actions, float64.

        Args:
            ids: of one chunk.
            horizon: t, where the tokenizer does not say (the universal one).
            dim: a, likewise.

        Raises:
            NotAChunkError: the ids are no whole chunk of this shape: an unknown id, too many or
                too few coefficients, broken characters, or coefficients it was not fitted on.
            ValueError: t or a is said nowhere.
        """
        # The universal tokenizer says neither, so the caller must.
        horizon, dim = horizon or self.horizon or 0, dim or self.dim or 0
        if not horizon or not dim:
            raise ValueError("FAST: this tokenizer is for chunks of any shape: say which")
        coefficients = self._read(list(map(int, ids)), horizon * dim).reshape(horizon, dim)
        import scipy.fft  # half a second, which programs without FAST tokens need not wait

        return np.asarray(scipy.fft.idct(coefficients / self.scale, axis=0, norm="ortho"))

    def _rounded(self, chunk: Float[np.ndarray, "t a"], clip: bool) -> Int[np.ndarray, "t a"]:
        coefficients = _coefficients(chunk, self.scale)
        if not clip:
            return coefficients
        met = self._met
        # Between two that it has met the lower one counts up to the middle.
        return met[np.searchsorted((met[1:] + met[:-1]) / 2, coefficients)]

    @cached_property
    def _bpe(self) -> Tokenizer:
        return Tokenizer.from_str(self.vocabulary)

    @cached_property
    def _met(self) -> Int[np.ndarray, "n"]:
        """The coefficients that it can write, rising."""
        characters = [chr(i) for i in range(self._largest + 1)]
        encodings = self._bpe.encode_batch(characters, add_special_tokens=False)
        indices = [
            i
            for i, (character, encoding) in enumerate(zip(characters, encodings, strict=True))
            if self._bpe.decode(encoding.ids, skip_special_tokens=False) == character
        ]
        return np.array(indices, np.int64) + self.min_token

    @cached_property
    def _largest(self) -> int:
        """The largest character it was fitted on: all up to it stand in the vocabulary."""
        vocabulary = self._bpe.get_vocab()
        end = next(i for i in itertools.count() if chr(i) not in vocabulary)
        return end - 1 if end else sys.maxunicode

    def _read(self, ids: list[int], count: int) -> Int[np.ndarray, "n"]:
        """Ids -> coefficients, that many."""
        unknown = [i for i in ids if not 0 <= i < self.size]
        if unknown:
            raise NotAChunkError(f"FAST: {unknown[:5]} are none of the {self.size} tokens")
        text = self._bpe.decode(ids, skip_special_tokens=False)
        if _LOST in text:
            raise NotAChunkError("FAST: the tokens break off within a character")
        if len(text) != count:
            raise NotAChunkError(f"FAST: {len(text)} coefficients in place of {count}")
        if max(map(ord, text)) > self._largest:
            raise NotAChunkError(
                "FAST: a coefficient outside the range the tokenizer was fitted on"
            )
        return np.array([ord(character) for character in text], np.int64) + self.min_token


def _coefficients(chunk: Float[np.ndarray, "t a"], scale: float) -> Int[np.ndarray, "t a"]:
    """Rounded cosine transform along time."""
    if not np.isfinite(chunk).all():
        raise ValueError("FAST: the chunk has actions that are not finite")
    import scipy.fft

    transformed = np.asarray(scipy.fft.dct(chunk, axis=0, norm="ortho"))
    return np.around(transformed * scale).astype(np.int64)


def _write(coefficients: Int[np.ndarray, "n"], low: int) -> str:
    """Coefficients -> text; those below `low` are cut there."""
    return "".join(map(chr, np.maximum(coefficients - low, 0).tolist()))
