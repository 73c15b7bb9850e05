"""FAST tokens as words of the language model: pi0-FAST's answer, `Action: ` tokens `|` end.

A FAST token takes the place of a word at the upper end of the vocabulary; PaliGemma keeps the last
128 for segmentation. The map is its own inverse.

Source: openpi 15a9616 `models/tokenizer.py`. It reads an answer by way of text, which may join
two tokens to another; here ids are read as they are. Where it takes an answer that is none for
zeros, here is an error.

Legend: f steps of a chunk · a action dimension · n columns of an answer
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Int32

from vla_jax.data.errors import DataError
from vla_jax.data.language.tokenizer import Tokenizer
from vla_jax.data.units.fast import FastTokenizer, NotAChunkError

OPENING, CLOSING = "Action: ", "|"
PADDING = -1  # behind an answer; no id


@dataclass(frozen=True)
class FastText:
    """How a chunk is written by a language model.

    Attributes:
        fast: the action tokenizer.
        token_end: first id above those that stand for FAST tokens.
        opening: ids of what an answer begins with.
        closing: ids of what the tokens are followed by.
        stop: id of the end of a text.
    """

    fast: FastTokenizer
    token_end: int
    opening: tuple[int, ...]
    closing: tuple[int, ...]
    stop: int

    @classmethod
    def of(
        cls, fast: FastTokenizer, tokenizer: Tokenizer, token_end: int, begun: bool = False
    ) -> "FastText":
        """Of the tokenizers of the actions and of the language.

        Args:
            fast: of the actions.
            tokenizer: of the language.
            token_end: see `FastText`.
            begun: whether the prompt ends with the first words of the answer.

        Raises:
            ValueError: the language has no token that ends a text.
        """
        opening = () if begun else tuple(tokenizer.ids(OPENING))
        try:
            return cls(fast, token_end, opening, tuple(tokenizer.ids(CLOSING)), tokenizer.stop_id)
        except KeyError as error:
            raise ValueError(f"FAST: {error.args[0]}") from error

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "FastText":
        """Inverse of `to_json`."""
        return cls(
            FastTokenizer.from_json(raw["fast"]),
            raw["token_end"],
            tuple(raw["opening"]),
            tuple(raw["closing"]),
            raw["stop"],
        )

    def to_json(self) -> dict[str, Any]:
        """All of it as plain JSON values, for a checkpoint."""
        return {
            "fast": self.fast.to_json(),
            "token_end": self.token_end,
            "opening": list(self.opening),
            "closing": list(self.closing),
            "stop": self.stop,
        }

    @property
    def first(self) -> int:
        """The smallest id that may stand for an action."""
        return self.token_end - self.fast.size

    def write(self, chunk: Float[np.ndarray, "f a"], clip: bool = False) -> list[int]:
        """A normalized chunk -> the ids of an answer; `clip` as in `FastTokenizer.encode`."""
        words = [self._swap(token) for token in self.fast.encode(chunk, clip)]
        return [*self.opening, *words, *self.closing, self.stop]

    def read(
        self, ids: Sequence[int] | Int[np.ndarray, "n"], horizon: int, dim: int
    ) -> Float[np.ndarray, "f a"]:
        """The ids of an answer -> a normalized chunk.

        Raises:
            NotAChunkError: the answer does not begin as one, or holds no whole chunk.
        """
        words, size = list(map(int, ids)), len(self.opening)
        if tuple(words[:size]) != self.opening:
            raise NotAChunkError(f"the answer begins with {words[:size]}, not {self.opening}")
        # An answer may end without its closing; what lies behind either is not read.
        stops = {self.closing[0], self.stop}
        until = next((i for i, word in enumerate(words) if i >= size and word in stops), len(words))
        return self.fast.decode([self._swap(word) for word in words[size:until]], horizon, dim)

    def _swap(self, token: int) -> int:
        return self.token_end - 1 - token


@dataclass(frozen=True)
class AnswerWriter:
    """What the loader writes of every window's newest chunk.

    Attributes:
        text: how.
        length: columns of an answer.
        gripper: whether the last number of an action is 0 = closed or 1 = open.
    """

    text: FastText
    length: int
    gripper: bool

    def __call__(self, chunk: Float[np.ndarray, "f a"]) -> Int32[np.ndarray, "n"]:
        """A normalized chunk -> ids, `PADDING` behind the end.

        Raises:
            DataError: the answer is too long.
        """
        if self.gripper:  # a chunk has it at -1 and 1, within the range of the other numbers
            chunk = np.concatenate([chunk[:, :-1], 2 * chunk[:, -1:] - 1], axis=1)
        # A coefficient beyond the fitted range is clipped, as actions are: it would be lost else,
        # and with it the chunk.
        words = self.text.write(chunk, clip=True)
        if len(words) > self.length:
            raise DataError(
                f"model.fast.length: the FAST tokens of a chunk are {len(words)} with the words "
                f"around them, {len(words) - self.length} more than the {self.length} columns"
            )
        ids = np.full(self.length, PADDING, np.int32)
        ids[: len(words)] = words
        return ids
