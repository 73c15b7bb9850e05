"""Parity cases of the FAST action tokenizer."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tests.parity import golden
from tests.parity.table import Row, compare
from vla_jax.data.units.fast import FastTokenizer, NotAChunkError


def run(folder: Path) -> Iterator[Row]:
    """Tokens to the id, chunks back from them; where the original answers with zeros, an error."""
    io, raw = golden.arrays(folder), golden.config(folder)
    tokenizer = FastTokenizer.from_json(
        raw | {"tokenizer": (folder / "tokenizer.json").read_text(encoding="utf-8")}
    )
    for i, chunk in enumerate(io["actions"]):
        expected, wanted = io["tokens"][i, : io["token_len"][i]], io["decoded_f64"][i]
        yield compare(f"tokens {i}", tokenizer.encode(chunk), expected, 0.0)
        # The original answers with zeros when symbols were lost, and to a chunk of zeros.
        lost = not tokenizer.keeps(chunk)
        yield compare(f"lost {i}", lost, not wanted.any() and chunk.any(), 0.0)
        if not lost:
            yield compare(f"decoded {i}", tokenizer.decode(expected), wanted, 1e-12)
    for i, ids in enumerate(io["bad/tokens"]):
        yield compare(f"refused {i}", _refused(tokenizer, ids[ids >= 0]), True, 0.0)


def _refused(tokenizer: FastTokenizer, ids: np.ndarray) -> bool:
    try:
        tokenizer.decode(ids)
    except NotAChunkError:
        return True
    return False
