"""FAST tokens on the device: from the ids that a model writes to its chunk, and what may follow.

What `vla_jax.data.units.fast` does on the host, for the compiled control step. A token is a few
bytes, the bytes of an answer are characters (UTF-8), each character is a coefficient of the chunk's
cosine transform.

Legend: b batch · n tokens of an answer · s tokens of the code · l bytes of the longest
t steps of the chunk · a action dimension
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

_CONTINUES = 0x80  # a byte below 0xC0 and not below this one goes on with a character
_LONGEST = 3  # bytes of a character; coefficients beyond 65535 do not occur


class Progress(NamedTuple):
    """How far an answer has come.

    Attributes:
        left: int32 [b], characters that are still to begin.
        owed: int32 [b], bytes that the last character still lacks.
    """

    left: Any
    owed: Any


@dataclass(frozen=True)
class FastCode:
    """Tables of one FAST tokenizer; see `FastText` for the fields of the same names.

    Attributes:
        scale, smallest: of the coefficients; character 0 is `smallest`.
        largest: the last character that the tokenizer was fitted on.
        bytes: int32 [s, l], those of every token, -1 behind them.
        token_end, opening, closing, stop: ids of the language.
        steps: t.
        dim: a.
    """

    scale: float
    smallest: int
    largest: int
    bytes: Int[np.ndarray, "s l"]
    token_end: int
    opening: tuple[int, ...]
    closing: tuple[int, ...]
    stop: int
    steps: int
    dim: int

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], steps: int, dim: int) -> "FastCode":
        """Of `FastText.to_json`, for chunks of this shape."""
        fast = raw["fast"]
        vocabulary = json.loads(fast["tokenizer"])["model"]["vocab"]
        tokens = [b""] * (1 + max(vocabulary.values()))
        for text, number in vocabulary.items():
            tokens[number] = _bytes_of(text)
        # A compiled step needs one shape for all tokens; -1 is no byte and marks what lies behind.
        table = np.full((len(tokens), max(map(len, tokens))), -1, np.int32)
        for row, token in zip(table, tokens, strict=True):
            row[: len(token)] = list(token)
        # The alphabet it was fitted on stands in the vocabulary without a gap.
        largest = next(i for i in range(len(vocabulary) + 1) if chr(i) not in vocabulary) - 1
        return cls(
            scale=float(fast["scale"]),
            smallest=int(fast["min_token"]),
            # Without character 0 there was no alphabet, and no character is too large; the host
            # reads such a vocabulary the same way.
            largest=largest if largest >= 0 else 0x10FFFF,
            bytes=table,
            token_end=raw["token_end"],
            opening=tuple(raw["opening"]),
            closing=tuple(raw["closing"]),
            stop=raw["stop"],
            steps=steps,
            dim=dim,
        )

    @property
    def size(self) -> int:
        """Number of tokens, s."""
        return len(self.bytes)

    def token_of(self, ids: Int[Array, "*b"]) -> Int[Array, "*b"]:
        """Ids of the language -> numbers of tokens, out of 0 .. s - 1 where an id is none."""
        return self.token_end - 1 - ids

    def begin(self, batch: int) -> Progress:
        """Before the first token."""
        count = self.steps * self.dim
        return Progress(jnp.full(batch, count, jnp.int32), jnp.zeros(batch, jnp.int32))

    def may_follow(self, progress: Progress) -> Bool[Array, "b s"]:
        """Tokens after which the answer can still be a whole chunk; none where it is one.

        What is counted is characters and their bytes. Where characters take several bytes, tokens
        that make one of no meaning are still among these; `decode` finds them.
        """
        facts = self._facts
        owed = progress.owed[:, None]
        # It pays what the last character lacks, all of it unless it holds nothing else.
        pays = jnp.where(facts["begins"] == 0, facts["pays"] <= owed, facts["pays"] == owed) & (
            facts["begins"] + facts["pays"] > 0
        )
        return pays & facts["sound"] & (facts["begins"] <= progress.left[:, None])

    def follow(self, progress: Progress, tokens: Int[Array, "b"]) -> Progress:
        """After one token more."""
        facts = {name: jnp.asarray(x)[tokens] for name, x in self._facts.items()}
        owed = jnp.where(facts["begins"] == 0, progress.owed - facts["pays"], facts["owes"])
        return Progress(progress.left - facts["begins"], owed)

    @cached_property
    def _facts(self) -> dict[str, Any]:
        """Of every token: bytes before its first character, characters, what the last one lacks."""
        begins, pays, owes, sound = (np.zeros(self.size, np.int32) for _ in range(4))
        for i, row in enumerate(self.bytes):
            token = row[row >= 0]
            starts = np.flatnonzero((token < _CONTINUES) | (token >= 0xC0))
            begins[i], pays[i] = len(starts), starts[0] if len(starts) else len(token)
            # Bytes up to the next character's start, against what each start announces.
            sizes = np.diff(np.append(starts, len(token)))
            wanted = np.array([_width(int(token[j])) for j in starts], int)
            sound[i] = bool((sizes[:-1] == wanted[:-1]).all() and (sizes <= wanted).all())
            owes[i] = wanted[-1] - sizes[-1] if len(starts) else 0
        return {"begins": begins, "pays": pays, "owes": owes, "sound": sound.astype(bool)}

    def decode(self, tokens: Int[Array, "b n"], used: Bool[Array, "b n"]) -> Float[Array, "b t a"]:
        """Tokens of one chunk each -> float32 actions, NaN where they are no whole chunk.

        Args:
            tokens: numbers of tokens.
            used: which of them belong to the answer, the first ones of each row.
        """
        count = self.steps * self.dim
        is_known = (tokens >= 0) & (tokens < self.size)
        table = jnp.asarray(self.bytes)
        token_bytes = jnp.where(
            (used & is_known)[..., None], table[jnp.clip(tokens, 0, self.size - 1)], -1
        ).reshape(len(tokens), -1)
        # The bytes of all tokens, one behind the other; what has no room makes it no chunk anyway.
        exists = token_bytes >= 0
        place = jnp.where(exists, jnp.cumsum(exists, axis=1) - 1, count * _LONGEST)
        rows = jnp.arange(len(tokens))[:, None]
        # One column more than there is room for: what is no byte is written there and cut off.
        text = jnp.full((len(tokens), count * _LONGEST + 1), -1)
        text = text.at[rows, place].set(token_bytes, mode="drop")[:, :-1]
        fits = exists.sum(1) <= count * _LONGEST
        values, sound = jax.vmap(self._characters)(text)
        fine = sound & fits & jnp.where(used, is_known, True).all(1)
        coefficients = (values + self.smallest).astype(jnp.float32) / self.scale
        # At the default precision a TPU rounds both factors to bfloat16, and the actions with them.
        chunk = jnp.einsum(
            "kt,bka->bta",
            jnp.asarray(_cosines(self.steps), jnp.float32),
            coefficients.reshape(-1, self.steps, self.dim),
            precision="highest",
        )
        # Not zeros: these are a motion like any other, and nobody would learn of the lost answer.
        return jnp.where(fine[:, None, None], chunk, jnp.nan)

    def _characters(self, text: Int[Array, "m"]) -> tuple[Int[Array, "c"], Bool[Array, ""]]:
        """Bytes, -1 behind them -> the characters of a chunk, and whether that is what they are."""
        count = self.steps * self.dim
        exists = text >= 0
        starts = exists & ((text < _CONTINUES) | (text >= 0xC0))
        number = jnp.cumsum(starts) - 1  # of the character that a byte belongs to
        columns = jnp.arange(len(text))
        begun = jax.lax.cummax(jnp.where(starts, columns, -1))
        width = jnp.where(
            starts, sum((text >= low).astype(jnp.int32) for low in (0, 0xC0, 0xE0)), 0
        )
        width_here = width[jnp.maximum(begun, 0)]
        payload = jnp.where(starts, text & jnp.array([0, 0x7F, 0x1F, 0x0F])[width], text & 0x3F)
        behind = width_here - 1 - (columns - begun)
        sound = jnp.where(exists, (number >= 0) & (behind >= 0), True).all()
        # Each of its bytes holds six bits, the first one the highest.
        shifted = jnp.where(exists & (behind >= 0), payload << jnp.maximum(6 * behind, 0), 0)
        target = jnp.where(exists, number, count)
        values = jnp.zeros(count, jnp.int32).at[target].add(shifted, mode="drop")
        size = jnp.zeros(count, jnp.int32).at[target].add(exists.astype(jnp.int32), mode="drop")
        announced = jnp.zeros(count, jnp.int32).at[target].add(width, mode="drop")
        # Each has as many bytes as it announces, and needs them all.
        least = jnp.array([0, 0, 0x80, 0x800])[jnp.clip(announced, 0, _LONGEST)]
        is_whole = (starts.sum() == count) & ((size == announced) & (values >= least)).all()
        # Characters of four bytes lie beyond all coefficients, and their bits are not read above.
        is_whole &= (text < 0xF0).all()
        return values, sound & is_whole & (values <= self.largest).all()


def _width(first: int) -> int:
    """Bytes of the character that a byte begins."""
    return 1 + (first >= 0xC0) + (first >= 0xE0)


def _cosines(steps: int) -> np.ndarray:
    """[k, t] float64: what frequency k adds to step t (orthonormal DCT-III)."""
    k, t = np.arange(steps)[:, None], np.arange(steps)
    table = math.sqrt(2 / steps) * np.cos(math.pi * (2 * t + 1) * k / (2 * steps))
    # The squares of a constant add up to twice those of a cosine; in an orthonormal table all rows
    # have the same length.
    table[0] /= math.sqrt(2)
    return table


def _symbols() -> dict[str, int]:
    """Character of a byte-level vocabulary -> its byte (GPT-2's table)."""
    # Bytes that print stand for themselves. The space and the soft hyphen, 0xAD, do not print.
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    unprintable = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(unprintable)}


_SYMBOLS = _symbols()


def _bytes_of(token: str) -> bytes:
    # A token with a character outside the table stands for itself, as the library reads it.
    if all(character in _SYMBOLS for character in token):
        return bytes(_SYMBOLS[character] for character in token)
    return token.encode()
