r"""Texts about images in LLaVA's form: the file most image-text sets are published in.

A JSON list, or one object a line (.jsonl):

    {"image": "coco/000000033471.jpg",
     "conversations": [{"from": "human", "value": "<image>\nWhat is on the table?"},
                       {"from": "gpt", "value": "A red block."}, ...]}

`image` may be missing (text alone). Turns alternate, people first. Legend: b batch · t text columns
"""

import concurrent.futures
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from vla_jax.config import ConfigError, CotrainConfig
from vla_jax.data.decode import decode_into
from vla_jax.data.errors import DataError, ImageDecodeError
from vla_jax.data.language.tokenizer import Tokenizer
from vla_jax.data.sampler import MixtureOrder
from vla_jax.types import Captions

PLACEHOLDER = "<image>"
# Published files use either name for a side.
_SPEAKERS = (("human", "user"), ("gpt", "assistant"))
_BLOCK = 4096  # the order's block; see MixtureOrder


class CaptionSet:
    """The conversations of one file, read when they are asked for.

    Of .jsonl only the places of the lines are kept in memory, of .json all of it.
    """

    def __init__(self, path: str | Path, images: str | Path = ""):
        """Finds the conversations.

        Args:
            path: .json or .jsonl.
            images: folder that `image` is relative to; "" is the file's own.

        Raises:
            DataError: the file is missing, empty or no list of objects.
        """
        self.path = Path(path).expanduser()
        self.folder = Path(images).expanduser() if images else self.path.parent
        if not self.path.is_file():
            raise DataError("no such file, as data.cotrain.path names it", self.path)
        self._items: list[Any] | None = None
        self._starts = np.zeros(0, np.int64)
        if self.path.suffix == ".jsonl":
            self._starts = _line_starts(self.path)
        else:
            try:
                items = json.loads(self.path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise DataError(f"not JSON: {error}", self.path) from error
            if not isinstance(items, list):
                raise DataError("expected a list of conversations", self.path)
            self._items = items
        if not len(self):
            raise DataError("holds no conversation", self.path)

    def __len__(self) -> int:
        return len(self._starts) if self._items is None else len(self._items)

    def __getitem__(self, number: int) -> tuple[Path | None, list[tuple[str, str]]]:
        """Image file (None = text alone) and the pairs (question, answer) of a conversation.

        Raises:
            DataError: it is not in LLaVA's form; says what is wrong with it.
        """
        item = self._item(number)
        problem = _problem(item)
        if problem:
            raise DataError(f"conversation {number}: {problem}", self.path)
        # The backbone's layout places the image, so its mark in the text is dropped.
        turns = [turn["value"].replace(PLACEHOLDER, "").strip() for turn in item["conversations"]]
        image = item.get("image")
        pairs = list(zip(turns[::2], turns[1::2], strict=True))
        return (self.folder / image if image else None), pairs

    def _item(self, number: int) -> Any:
        if self._items is not None:
            return self._items[number]
        with self.path.open("rb") as file:
            # The file is opened for every line, as several threads read at the same time.
            file.seek(int(self._starts[number]))
            line = file.readline()
        try:
            return json.loads(line)
        except ValueError as error:
            raise DataError(f"conversation {number}: not JSON: {error}", self.path) from error

    def identity(self) -> dict[str, Any]:
        """The facts that the order of the texts depends on; JSON-serializable."""
        # The size stands for the content: hashing a file of gigabytes would delay every start.
        size = os.path.getsize(self.path)
        return {"file": self.path.name, "conversations": len(self), "bytes": size}

    def words(self, prompt: str) -> Iterator[str]:
        """All text, questions in their prompt, for a tokenizer that is built from it."""
        for number in range(len(self)):
            for question, answer in self[number][1]:
                yield f"{prompt.format(question=question)} {answer}"


def check_texts(texts: CaptionSet | None, position: Mapping[str, Any]) -> None:
    """Refuse to go on with other texts than a run was stopped with.

    Raises:
        DataError: saying which there were and which there are.
    """
    previous, current = position.get("captions"), texts.identity() if texts else None
    # A position in the order means nothing for other texts.
    if previous != current:
        raise DataError(
            f"data.cotrain: the run was stopped with {previous}, now there is {current}"
        )


def _line_starts(path: Path) -> Int64[np.ndarray, "n"]:
    starts, place = [], 0
    with path.open("rb") as file:
        for line in file:
            if line.strip():
                starts.append(place)
            place += len(line)
    return np.array(starts, np.int64)


def _problem(item: Any) -> str:
    """The reason why an entry is no conversation, or ""."""
    turns = item.get("conversations") if isinstance(item, Mapping) else None
    if not isinstance(turns, list) or not turns or len(turns) % 2:
        return "`conversations` must be a list of questions and answers in turn"
    for i, turn in enumerate(turns):
        legal = _SPEAKERS[i % 2]
        if not isinstance(turn, Mapping) or turn.get("from") not in legal:
            return f"turn {i} must be from {legal[0]!r}, not {turn!r}"
        if not isinstance(turn.get("value"), str):
            return f"turn {i} has no text"
    image = item.get("image")
    if image is not None and not isinstance(image, str):
        return f"`image` must be the name of one file, not {image!r}"
    return ""


class CaptionLoader(Iterator[Captions]):
    """Batches of texts for ever, in an order that depends on seed and row number alone.

    Batch k holds rows k * rows .. (k + 1) * rows - 1; a process fills its contiguous share.
    """

    def __init__(
        self,
        texts: CaptionSet,
        tokenizer: Tokenizer,
        config: CotrainConfig,
        image_size: tuple[int, int],
        seed: int,
        start: int = 0,
        process_index: int = 0,
        process_count: int = 1,
        threads: int = 2,
        prefetch: int = 4,
        ends: tuple[str, str] = ("", ""),
    ):
        """Starts loading.

        Args:
            texts: where from.
            tokenizer: of the run.
            config: `data.cotrain`.
            image_size: (height, width) that images are squashed to.
            seed: of the order.
            start: batches to skip.
            process_index: which share of the rows is this process's.
            process_count: number of shares.
            threads: batches that are prepared at the same time.
            prefetch: batches in preparation or ready.
            ends: what a text begins and ends with, where the tokenizer does not add it.

        Raises:
            ConfigError: the rows cannot be split over the processes.
        """
        if config.rows % process_count:
            raise ConfigError(
                f"data.cotrain.rows: {config.rows} is not a multiple of {process_count} processes"
            )
        self._texts, self._tokenizer, self._config = texts, tokenizer, config
        self._size, self._rows, self._ends = image_size, config.rows // process_count, ends
        self._offset, self._next = process_index * self._rows, start
        # A mixture of one, so that texts share the code that orders the robot data.
        self._order = MixtureOrder([len(texts)], [1.0], seed, _BLOCK)
        self._pool = concurrent.futures.ThreadPoolExecutor(max(1, threads), "captions")
        # Batches leave in their order, whichever of the threads is done first.
        self._ready = []
        for _ in range(max(1, prefetch)):
            self._submit()

    def _submit(self) -> None:
        self._ready.append(self._pool.submit(self._assemble, self._next))
        self._next += 1

    def __next__(self) -> Captions:
        batch = self._ready.pop(0).result()
        self._submit()
        return batch

    def __enter__(self) -> "CaptionLoader":
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _assemble(self, batch: int) -> Captions:
        c, rows = self._config, self._rows
        # Numbers are global, so the order does not depend on the number of processes.
        numbers = np.arange(rows) + batch * c.rows + self._offset
        # Text alone keeps a black image, which `has_image` hides from the model.
        images = np.zeros((rows, *self._size, 3), np.uint8)
        has_image = np.zeros(rows, bool)
        parts = []
        for row, number in enumerate(self._order(numbers)[1].tolist()):
            image, pairs = self._texts[number]
            if image is not None:
                _read_image(image, self._texts.path, number, images[row])
                has_image[row] = True
            turns: list[tuple[str, bool]] = [(self._ends[0], False)]
            for question, answer in pairs:
                space = " " if len(turns) > 1 else ""  # the next question's, not to be predicted
                turns.append((space + c.prompt.format(question=question), False))
                turns.append((answer, True))
            # The end is predicted as well, or the model would never learn to stop.
            turns.append((self._ends[1], True))
            parts.append(self._tokenizer.encode_answers(turns, c.text_len))
        text, mask, target = (np.stack(column) for column in zip(*parts, strict=True))
        return Captions(images, has_image, text, mask, target)


def _read_image(image: Path, source: Path, number: int, out: np.ndarray) -> None:
    try:
        decode_into(image.read_bytes(), out)
    except FileNotFoundError as error:
        raise DataError(f"conversation {number}: {image} does not exist", source) from error
    except ImageDecodeError as error:
        raise ImageDecodeError(f"conversation {number}: {image}: {error}", source) from error
