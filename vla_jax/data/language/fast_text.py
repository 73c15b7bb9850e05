"""FAST tokens as words of the language model: pi0-FAST's answer, `Action: ` tokens `|` end.

A FAST token takes the place of a word at the upper end of the vocabulary, below the last 128, which
PaliGemma has for segmentation; the map is its own inverse.

Source: openpi 15a9616 `models/tokenizer.py`. It reads an answer by way of text, which may join
two tokens to another; here ids are read as they are. Where it takes an answer that is none for
zeros, here is an error.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from vla_jax.data.units.fast import FastTokenizer, NotAChunkError

KEPT = 128  # ids at the vocabulary's end that are no actions
OPENING, CLOSING = "Action: ", "|"


@dataclass(frozen=True)
class FastText:
    """How a chunk is written by a language model.

    Attributes:
        fast: the action tokenizer.
        vocab: ids of the text tokenizer.
        opening: ids of what an answer begins with.
        closing: ids of what the tokens are followed by.
        end: id of the end of a text.
    """

    fast: FastTokenizer
    vocab: int
    opening: tuple[int, ...]
    closing: tuple[int, ...]
    end: int

    @property
    def first(self) -> int:
        """The smallest id that may stand for an action."""
        return self.vocab - KEPT - self.fast.size

    def write(self, chunk: Float[np.ndarray, "f a"]) -> list[int]:
        """A normalized chunk -> the ids of an answer."""
        words = [self._swap(token) for token in self.fast.encode(chunk)]
        return [*self.opening, *words, *self.closing, self.end]

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
        stops = {self.closing[0], self.end}
        until = next((i for i, word in enumerate(words) if i >= size and word in stops), len(words))
        return self.fast.decode([self._swap(word) for word in words[size:until]], horizon, dim)

    def _swap(self, token: int) -> int:
        return self.vocab - 1 - KEPT - token
