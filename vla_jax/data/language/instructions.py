"""What each sample is told: one of its trajectory's instructions, a paraphrase of it, or nothing.

Axis letters: n samples.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32, Int64

from vla_jax.config import ConfigError, LanguageConfig, read_json
from vla_jax.data.sampler import Stream, uniform

log = logging.getLogger(__name__)
# Columns of a sample's draws.
_WHICH, _WHETHER, _PARAPHRASE, _DROPOUT, _COUNT = range(5)


@runtime_checkable
class Texts(Protocol):
    """The texts of a dataset; see `vla_jax.data.dataset.Trajectories`."""

    @property
    def instructions(self) -> Sequence[str]: ...  # noqa: D102

    @property
    def text(self) -> Int32[np.ndarray, "m"]: ...  # noqa: D102

    @property
    def text_starts(self) -> Int64[np.ndarray, "e+1"]: ...  # noqa: D102


class _Lists(NamedTuple):
    """Lists of codes, one after another."""

    codes: np.ndarray
    starts: np.ndarray

    def pick(self, rows: np.ndarray, draw: np.ndarray) -> np.ndarray:
        """An element of each row; rows must not be empty."""
        first = self.starts[rows]
        # Draws are below 1, so the product stays within the row.
        return self.codes[first + (draw * (self.starts[rows + 1] - first)).astype(np.int64)]


class Instructions:
    """The texts of a mixture, and which of them a sample gets.

    Attributes:
        texts: every distinct text that can be said, sorted; codes index it.
    """

    def __init__(self, datasets: Sequence[Texts], config: LanguageConfig, train: bool):
        """Collects them.

        Args:
            datasets: of the mixture.
            config: `data.language`.
            train: False: always a trajectory's first instruction, as it stands.

        Raises:
            ConfigError: the paraphrases cannot be read.
        """
        self._config, self._train = config, train
        recorded = {text for dataset in datasets for text in dataset.instructions}
        paraphrases: dict[str, list[str]] = {}
        if train and config.paraphrases:
            paraphrases = _read_paraphrases(Path(config.paraphrases).expanduser(), recorded)
        all_texts = recorded.union(*paraphrases.values())
        if train and config.dropout > 0:
            all_texts.add("")
        # Sorted, because codes must not depend on the order of a set.
        self.texts = sorted(all_texts)
        number = {text: i for i, text in enumerate(self.texts)}
        # -1 is never picked: without dropout no draw lies below it.
        self._blank = number.get("", -1)
        self._choices = []
        for dataset in datasets:
            codes = np.array([number[text] for text in dataset.instructions], np.int64)
            self._choices.append(_Lists(codes[dataset.text], dataset.text_starts))
        lists = [
            [number[text] for text in paraphrases.get(recorded, ())] for recorded in self.texts
        ]
        starts = np.concatenate([[0], np.cumsum([len(codes) for codes in lists])])
        flat = np.array([code for codes in lists for code in codes], np.int64)
        self._others = _Lists(flat, starts.astype(np.int64))

    def choose(
        self,
        dataset: int,
        trajectory: Int64[np.ndarray, "n"],
        samples: np.ndarray,
        seed: int,
    ) -> Int64[np.ndarray, "n"]:
        """Code of what each sample is told; depends on seed and sample number alone.

        Args:
            dataset: number in the mixture.
            trajectory: of each sample.
            samples: uint64 [n], sample numbers.
            seed: of the run.
        """
        choices = self._choices[dataset]
        if not self._train:
            # Nothing is drawn, so that every validation compares the same texts.
            return choices.codes[choices.starts[trajectory]]
        # All decisions draw, needed or not, so that one setting does not shift the others' draws.
        draws = uniform(seed, Stream.INSTRUCTIONS, samples, _COUNT)
        codes = choices.pick(trajectory, draws[:, _WHICH])
        has_others = self._others.starts[codes + 1] > self._others.starts[codes]
        other = np.flatnonzero(has_others & (draws[:, _WHETHER] < self._config.paraphrase))
        codes[other] = self._others.pick(codes[other], draws[other, _PARAPHRASE])
        return np.where(draws[:, _DROPOUT] < self._config.dropout, self._blank, codes)


def _read_paraphrases(path: Path, recorded: set[str]) -> dict[str, list[str]]:
    """Those of the file that are about instructions of the mixture."""
    where = f"data.language.paraphrases: {path}"
    raw = read_json(path, "data.language.paraphrases: ", "{instruction: [paraphrases]}")
    bad = [
        text
        for text, paraphrases in raw.items()
        if not isinstance(paraphrases, list)
        or not paraphrases
        or not all(isinstance(other, str) and other.strip() for other in paraphrases)
    ]
    if bad:
        raise ConfigError(f"{where}: not a list of texts: {bad[:5]} ({len(bad)} in all)")
    # Duplicates are dropped, as they would be drawn more often.
    usable = {
        text: list(dict.fromkeys(paraphrases))
        for text, paraphrases in raw.items()
        if text in recorded
    }
    if not usable:
        raise ConfigError(
            f"{where}: none of its {len(raw)} texts is one of {sorted(recorded)[:5]}..."
        )
    log.info("paraphrases for %d of %d instructions", len(usable), len(recorded))
    return usable
