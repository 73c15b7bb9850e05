"""Batches from a mixture: decoded by a thread pool, kept ready, resumable from one integer.

Global batch k holds samples k*B .. (k+1)*B - 1; a process fills its contiguous share of the rows.
What a batch holds depends on (mixture, seed, sample number) alone: not on threads, prefetching,
the number of processes, or where a run was interrupted.
"""

import atexit
import concurrent.futures
import logging
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from vla_jax.data import sampler
from vla_jax.data.buffers import BufferPool
from vla_jax.data.errors import DataError, TextLengthError
from vla_jax.data.language.fast_text import PADDING, AnswerWriter
from vla_jax.data.mixture import Mixture, open_datasets
from vla_jax.data.places import AT_ONCE, is_remote
from vla_jax.data.sampler import MixtureOrder, SequentialOrder, Stream, uniform
from vla_jax.data.source import Fetching
from vla_jax.data.stream_order import StreamedOrder, streamed
from vla_jax.types import Actions, Batch, Observation

__all__ = ["Loader", "Mixture", "open_datasets"]

log = logging.getLogger(__name__)
_TASKS_PER_THREAD = 2  # of a batch; more balance better, fewer cost less
_AHEAD = 4  # batches that are made at once where their images come from an object store


class Loader(Iterator[Batch]):
    """Iterator over batches with numpy leaves; also a context manager.

    With `shuffle` it never ends. Without, every window comes once, in order.
    """

    def __init__(
        self,
        mixture: Mixture,
        encode: Callable[..., tuple[np.ndarray, np.ndarray]],
        batch_size: int,
        seed: int,
        start: int | Mapping[str, Any] = 0,
        shuffle: bool = True,
        process_index: int = 0,
        process_count: int = 1,
        threads: int = 2,
        prefetch: int = 4,
        pad_last: bool = False,
        sentences: Mapping[str, np.ndarray] | None = None,
        answer: AnswerWriter | None = None,
    ):
        """Starts loading.

        Args:
            mixture: from `open_datasets`.
            encode: instruction -> (ids int32 [t], mask bool [t]), prompt template included; called
                once for each distinct instruction. One whose `needs_state` is true also takes the
                robot's state in the model's units, and is called for every window.
            batch_size: windows of the global batch.
            seed: of the order.
            start: sample number to go on from, or a `state()`, which is checked first.
            shuffle: draw from the mixture for ever, or visit every window once.
            process_index: which share of the rows is this process's.
            process_count: number of shares.
            threads: decoding threads.
            prefetch: batches in preparation or ready.
            pad_last: without shuffle, fill up the last batch with its last window, all of whose
                actions are masked, instead of dropping it.
            sentences: instruction -> vector that goes into the batch beside its text.
            answer: of models that read texts which say a chunk; windows whose chunk it refuses
                are left out where `data.on_error` allows that.

        Raises:
            ValueError: the batch cannot be split over the processes, `start` is the state of
                another mixture, or prompts are too long (all are listed).
        """
        if batch_size % process_count or not 0 <= process_index < process_count:
            position = f"process {process_index} of {process_count}"
            raise ValueError(f"batch_size {batch_size} cannot be split: {position}")
        self._mixture, self._seed, self._batch_size = mixture, seed, batch_size
        self._order: MixtureOrder | SequentialOrder | StreamedOrder = SequentialOrder(mixture.sizes)
        self._total: int | None = mixture.num_windows
        if shuffle:
            self._order = MixtureOrder(mixture.sizes, mixture.weights, seed, mixture.block)
            self._total = None
        self._samples = start if isinstance(start, int) else self._checked(start)
        # Both stay as they are unless a dataset is read from front to back.
        self._order, self._datasets = streamed(
            mixture, self._order, seed, self._samples, process_index, process_count
        )
        self._rows = batch_size // process_count
        self._offset = process_index * self._rows
        self._pad_last, self._threads = pad_last, max(1, threads)
        self._answer = answer
        # A prompt that tells the state cannot be encoded once for all windows.
        self._encode = encode if getattr(encode, "needs_state", False) else None
        self._text = None if self._encode else _encode_all(mixture, encode)
        self._sentences = None
        if sentences is not None:
            self._sentences = np.stack([sentences[text] for text in mixture.instructions])
        self._images = {
            camera: BufferPool((self._rows, mixture.window, *mixture.image_sizes[camera], 3))
            for camera in mixture.cameras
        }
        # One slot for each batch that is in preparation or waits to be taken.
        self._slots = threading.Semaphore(max(1, prefetch))
        self._ready: queue.SimpleQueue[tuple[int, concurrent.futures.Future[Batch] | None]]
        self._ready = queue.SimpleQueue()
        self._closed = threading.Event()
        # Of an object store several batches are on their way while one is decoded; threads that
        # wait for single images there are more than those that decode.
        sources = [d.source for d in mixture.datasets if is_remote(d.source.root)]
        self._is_far = bool(sources) and not isinstance(self._order, StreamedOrder)
        if not all(isinstance(source, Fetching) for source in sources):
            self._threads = AT_ONCE
        self._pool = concurrent.futures.ThreadPoolExecutor(self._threads, "decode")
        self._makers = concurrent.futures.ThreadPoolExecutor(_AHEAD if self._is_far else 1, "batch")
        self._feeder = threading.Thread(target=self._feed, args=(self._samples,), daemon=True)
        self._feeder.start()
        # A thread that the interpreter's end finds inside numpy would abort the process.
        atexit.register(self.close)

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        if self._closed.is_set():
            raise StopIteration
        # `after` is the sample to go on from once this batch is used.
        after, coming = self._ready.get()
        try:
            batch = None if coming is None else coming.result()
        except concurrent.futures.CancelledError:  # closed by another thread
            batch = None
        except BaseException:
            self.close()
            raise
        if batch is None:
            self.close()
            raise StopIteration
        # The batch has left the queue, so that the next one may be prepared.
        self._slots.release()
        self._samples = after
        return batch

    def __len__(self) -> int:
        """Batches of one pass without shuffle."""
        if self._total is None:
            raise TypeError("a shuffled loader has no length")
        full, remainder = divmod(self._total, self._batch_size)
        return full + (remainder > 0 and self._pad_last)

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops the threads; no more batches come."""
        atexit.unregister(self.close)
        if not self._closed.is_set():
            for dataset in self._mixture.datasets:
                if dataset.skips.counts:
                    log.warning("%s", dataset.skips)
        self._closed.set()
        # The feeder may wait for a slot; it has to see that it shall stop.
        self._slots.release()
        self._feeder.join()
        self._makers.shutdown(cancel_futures=True)
        self._ready.put((self._samples, None))  # wakes a consumer in another thread
        self._pool.shutdown(cancel_futures=True)

    def state(self) -> dict[str, Any]:
        """Where to go on after the batch last returned; JSON-serializable."""
        return {"samples": self._samples, **self._identity()}

    def _identity(self) -> dict[str, Any]:
        mixture = self._mixture
        return {
            "seed": self._seed,
            "names": list(mixture.names),
            "sizes": list(mixture.sizes),
            "weights": list(mixture.weights),
            "digest": mixture.digest,
            "content": mixture.content,
        }

    def _checked(self, state: Mapping[str, Any]) -> int:
        """The sample number of a state, if it is one of this mixture and seed."""
        changed = [
            f"{key}: was {state.get(key)!r}, is {value!r}"
            for key, value in self._identity().items()
            if state.get(key) != value and (key != "content" or key in state)  # older ones lack it
        ]
        if changed:
            listing = "\n  ".join(changed)
            raise ValueError(f"the saved position belongs to other data:\n  {listing}")
        return int(state["samples"])

    def _feed(self, start: int) -> None:
        """Runs in its own thread: has batches prepared while there are free slots."""
        while True:
            self._slots.acquire()
            if self._closed.is_set():
                return
            if self._total is not None and self._is_over(start):
                self._ready.put((start, None))
                return
            coming = self._makers.submit(self._assemble, start)
            start += self._batch_size
            self._ready.put((start, coming))

    def _is_over(self, start: int) -> bool:
        total = self._total or 0
        return start >= total if self._pad_last else start + self._batch_size > total

    def _assemble(self, start: int) -> Batch:
        mixture, rows, window = self._mixture, self._rows, self._mixture.window
        numbers = np.arange(rows, dtype=np.uint64) + np.uint64(start + self._offset)
        real = np.ones(rows, bool) if self._total is None else numbers < self._total
        if self._total is not None:
            # Rows beyond the end repeat the last window; `real` masks their actions.
            numbers = np.minimum(numbers, np.uint64(self._total - 1))
        dataset, element = self._order(numbers)
        # Of every row: its trajectory, where its window ends and begins, its instruction.
        trajectory, ends, hidden, codes = np.zeros((4, rows), np.int64)
        width = mixture.datasets[0].actions.shape[1]
        chunk = np.zeros((rows, window, mixture.chunk, width), np.float32)
        mask = np.zeros((rows, window, mixture.chunk), bool)
        proprio = None
        if mixture.proprio:
            proprio = np.zeros((rows, window, mixture.proprio), np.float32)
        for d in np.unique(dataset):
            members, prepared = np.flatnonzero(dataset == d), mixture.datasets[d]
            place = mixture.windows[d].locate(element[members])
            trajectory[members], ends[members], hidden[members] = place
            until = prepared.starts[place.trajectory + 1] - prepared.starts[place.trajectory]
            # Counted as a length: one more than the last frame that may be supervised.
            reach = self._goals(numbers[members], place.end, until) + 1
            frames, mask[members] = sampler.chunks(
                place.end, reach, window, mixture.chunk, place.hidden, mixture.padded_rows
            )
            history, _ = sampler.history(place.end, window, place.hidden)
            chunk[members], states = prepared.numbers(place.trajectory, frames, history)
            if proprio is not None:
                proprio[members] = states
            codes[members] = mixture.language.choose(
                int(d), place.trajectory, numbers[members], self._seed
            )
        frames, visible = sampler.history(ends, window, hidden)
        images, present, sound = self._decode(dataset, trajectory, frames, visible)
        written = self._answers(chunk[:, -1], dataset, sound)
        ids, id_mask = self._written(codes, proprio)
        sentence = None if self._sentences is None else self._sentences[codes]
        return Batch(
            observation=Observation(images, present, ids, id_mask, proprio, sentence),
            # Padding and unsound rows train nothing but keep the shape of the batch.
            actions=Actions(chunk, mask & (real & sound)[:, None, None], written),
            # As two halves: jax cuts a uint64 to 32 bits unless x64 is on.
            sample=np.stack([numbers >> np.uint64(32), numbers], axis=1).astype(np.uint32),
            dataset=dataset.astype(np.int32),
        )

    def _written(
        self, codes: np.ndarray, states: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Prompts of these instructions and, where they say them, of the windows' last states."""
        if self._text is not None:
            return self._text[0][codes], self._text[1][codes]
        assert self._encode is not None
        assert states is not None
        texts = [self._mixture.instructions[code] for code in codes]
        rows = [self._encode(text, s) for text, s in zip(texts, states[:, -1], strict=True)]
        ids, masks = zip(*rows, strict=True)
        return np.stack(ids), np.stack(masks)

    def _answers(
        self, chunks: np.ndarray, dataset: np.ndarray, sound: np.ndarray
    ) -> np.ndarray | None:
        """Texts that say these chunks; rows whose chunk cannot be said are no longer sound."""
        if self._answer is None:
            return None
        rows = np.full((len(chunks), self._answer.length), PADDING, np.int32)
        for i, chunk in enumerate(chunks):
            try:
                rows[i] = self._answer(chunk)
            except DataError as error:
                self._datasets[dataset[i]].skips.add(error)
                sound[i] = False
        return rows

    def _goals(self, numbers: np.ndarray, ends: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Last frame whose action counts: the trajectory's, or a random one after the window."""
        if not self._mixture.random_goal:
            return lengths - 1
        # By the sample's number: the same goal whatever process or thread makes the batch.
        draw = uniform(self._seed, Stream.GOALS, numbers, 1)[:, 0]
        return np.minimum(ends + 1 + (draw * (lengths - 1 - ends)).astype(np.int64), lengths - 1)

    def _decode(
        self,
        dataset: np.ndarray,
        trajectory: np.ndarray,
        frames: np.ndarray,
        wanted: np.ndarray,
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], np.ndarray]:
        """These frames of all cameras, which of them exist, and which rows are sound.

        What is wrong with a row that is not is raised, or counted; its pixels are black.
        """
        images = {camera: pool.take() for camera, pool in self._images.items()}
        present = {camera: wanted.copy() for camera in images}
        sound = np.ones(self._rows, bool)

        def work(part: np.ndarray) -> None:
            for row in part.tolist():
                views = self._datasets[dataset[row]]
                place = int(trajectory[row]), frames[row]
                try:
                    for camera, out in images.items():
                        present[camera][row] &= views.images(camera, *place, out[row])
                    views.skips.drew(sound=True)
                except DataError as error:
                    views.skips.add(error)
                    views.skips.drew(sound=False)
                    sound[row] = False
                    for camera, out in images.items():
                        out[row], present[camera][row] = 0, wanted[row]

        if self._is_far:
            self._fetch(dataset, trajectory, frames)
        parts = np.array_split(np.arange(self._rows), self._threads * _TASKS_PER_THREAD)
        tasks = [self._pool.submit(work, part) for part in parts if len(part)]
        concurrent.futures.wait(tasks)  # all: a failed batch must not be written to any more
        for task in tasks:
            task.result()
        return images, present, sound

    def _fetch(self, dataset: np.ndarray, trajectory: np.ndarray, frames: np.ndarray) -> None:
        """Has all images of a batch that lie in an object store asked for at once."""
        for d in np.unique(dataset):
            views, members = self._datasets[d], np.flatnonzero(dataset == d)
            if isinstance(views.source, Fetching):
                places = [(int(trajectory[row]), frames[row]) for row in members]
                roles = [role for role in self._images if role in views.cameras]
                views.source.fetch([views.span(role, *place) for role in roles for place in places])


def _encode_all(
    mixture: Mixture, encode: Callable[[str], tuple[np.ndarray, np.ndarray]]
) -> tuple[np.ndarray, np.ndarray]:
    """Tokenizes every distinct instruction: ids and masks."""
    ids, masks, problems = [], [], []
    for instruction in mixture.instructions:
        try:
            tokens, mask = encode(instruction)
            ids.append(np.asarray(tokens, np.int32))
            masks.append(np.asarray(mask, bool))
        except TextLengthError as error:
            problems.append(str(error))
    if problems:
        listing = "\n  ".join(problems[:10])
        raise TextLengthError(f"{len(problems)} prompts are too long:\n  {listing}")
    return np.stack(ids), np.stack(masks)
