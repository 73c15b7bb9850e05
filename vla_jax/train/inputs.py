"""What a run reads: windows to train on and to evaluate on, texts beside them, and their tokens."""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from vla_jax.config import Config, ModelConfig
from vla_jax.convert import answers
from vla_jax.convert.sentences import embed as embed_sentences
from vla_jax.data.language.captions import CaptionLoader, CaptionSet
from vla_jax.data.language.fast_text import AnswerWriter
from vla_jax.data.language.prompts import Writer
from vla_jax.data.language.tokenizer import Tokenizer
from vla_jax.data.loader import Loader
from vla_jax.data.mixture import Mixture, open_datasets
from vla_jax.models import vla
from vla_jax.types import Batch


@dataclass(frozen=True)
class Inputs:
    """The data of a run, opened.

    Attributes:
        config: of the run, with what the tokenizers say.
        train: windows to train on.
        held_out: windows to evaluate on.
        texts: about images, trained on beside the actions; None without.
        tokenizer: of the run.
        sentences: instruction -> vector that the features must predict; None without.
        image_size: (height, width) of the model's images.
        answer: what writes the texts that say a chunk; None for models that read none.
    """

    config: Config
    train: Mixture
    held_out: Mixture
    texts: CaptionSet | None
    tokenizer: Tokenizer
    sentences: Mapping[str, Any] | None
    image_size: tuple[int, int]
    answer: AnswerWriter | None = None

    def batches(self, start: Any) -> Loader:
        """Batches to train on, for ever, from a sample number or a loader's position on."""
        return self._load(self.train, start=start)

    @contextlib.contextmanager
    def held_out_batches(self) -> Iterator[Iterator[Batch]]:
        """Batches to evaluate on: all of the split when it is small enough.

        Else the same random sample of `train.eval_batches` batches every time.
        """
        train = self.config.train
        covers_all = self.held_out.num_windows <= train.eval_batches * train.batch_size
        # Padding fills the last batch up to its shape, and counts for nothing: its actions are
        # masked.
        with self._load(self.held_out, shuffle=not covers_all, pad_last=covers_all) as batches:
            yield itertools.islice(batches, train.eval_batches)

    def captions(self, step: int) -> Any:
        """A context with the batches of texts from a step on; Nones where there are no texts."""
        if self.texts is None:
            return contextlib.nullcontext(itertools.repeat(None))
        # The number of the step is all it needs to go on from, so a checkpoint keeps no position of
        # it.
        return CaptionLoader(
            self.texts,
            self.tokenizer,
            self.config.data.cotrain,
            self.image_size,
            start=step,
            ends=vla.ends(self.config.model),
            **self._loader_options(),
        )

    def meta(self) -> dict[str, Any]:
        """What a checkpoint keeps of the data, for a policy to act by."""
        return {
            "statistics": self.train.statistics,
            "action_specs": {
                name: spec.to_json() for name, spec in self.train.action_specs.items()
            },
            "units": {name: units.to_json() for name, units in self.train.units.items()},
            "tokenizer": self.tokenizer.to_json(),
        }

    def position(self, batches: Loader) -> dict[str, Any]:
        """Where the run goes on after the batch it was given last; what a checkpoint keeps."""
        # A resumed run is refused other texts than these, see `check_texts`.
        texts = {"captions": self.texts.identity()} if self.texts else {}
        return {**batches.state(), **texts}

    def _load(self, mixture: Mixture, **options: Any) -> Loader:
        return Loader(
            mixture,
            encode=_writer(self.config.model, self.tokenizer),
            batch_size=self.config.train.batch_size,
            sentences=self.sentences,
            answer=self.answer,
            **self._loader_options(),
            **options,
        )

    def _loader_options(self) -> dict[str, Any]:
        return {
            "seed": self.config.seed,
            "process_index": jax.process_index(),
            "process_count": jax.process_count(),
            "threads": self.config.data.threads,
            "prefetch": self.config.data.prefetch,
        }


def open_inputs(config: Config, model: Any, origin: Any, meta: Mapping[str, Any]) -> Inputs:
    """Open the data of a run.

    Args:
        config: of the run.
        model: of the run, for its image size and its vocabulary.
        origin: a `Start`: the weights a new run begins with bring their tokenizer.
        meta: of the checkpoint a run goes on from, whose statistics and tokenizer stay; {} for a
            new run, which measures its own.

    Raises:
        DataError: a dataset cannot be used.
        ConfigError: the config asks for what is not there.
    """
    cotrain, size = config.data.cotrain, (model.image.size, model.image.size)
    opened = functools.partial(
        open_datasets,
        config.data,
        config.model.structure,
        config.model.action_dim,
        image_size=size,
    )
    train = opened("train", statistics=meta.get("statistics"))
    # Held-out actions are scaled as training's are, for that is how the policy will act.
    held_out = opened("val", statistics=train.statistics)
    texts = CaptionSet(cotrain.path, cotrain.images) if cotrain.path else None
    if meta:
        # Other numbers for the words would make the trained embeddings meaningless.
        tokenizer = Tokenizer.from_json(meta["tokenizer"])
    else:
        prompt = vla.prompt(config.model)
        prompts = [prompt.format(instruction=text.strip()) for text in train.instructions]
        # All words that training will meet, because a tokenizer cannot grow later.
        words = itertools.chain(prompts, texts.words(cotrain.prompt) if texts else ())
        words = itertools.chain(words, answers.words(config.model))
        rows = answers.word_ids(model, origin.fast_code())
        tokenizer = origin.tokenizer() or Tokenizer.build(words, rows)
    # An id beyond the table looks up NaN, which would surface as a run that diverges.
    tokenizer.limit(model.vlm.vocab_size)
    if vla.written(config.model):
        code = answers.with_code(model, tokenizer, origin.fast_code()).fast.code
        fast = dataclasses.replace(config.model.fast, code=code)
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, fast=fast))
    sentences, target = None, config.model.sentence
    if target.dim:
        # Of both splits, so that no window comes without its embedding.
        instructions = (*train.instructions, *held_out.instructions)
        sentences = embed_sentences(target.dir, instructions, target.dim)
    writer = answers.writer(config.model)
    return Inputs(config, train, held_out, texts, tokenizer, sentences, size, writer)


def with_captions(batch: Batch, captions: Any) -> Batch:
    """A batch with the texts that are trained on beside it."""
    return dataclasses.replace(batch, captions=captions)


def without_supervision(batch: Batch) -> Batch:
    """A batch that no loss counts: as in place of one that could not be read."""
    actions = dataclasses.replace(batch.actions, mask=np.zeros_like(batch.actions.mask))
    captions = batch.captions
    if captions is not None:
        captions = dataclasses.replace(captions, target=np.zeros_like(captions.target))
    return dataclasses.replace(batch, actions=actions, captions=captions)


def _writer(config: ModelConfig, tokenizer: Tokenizer) -> Writer:
    return Writer(tokenizer, config.structure.text_len, vla.prompt(config), vla.prompt_form(config))
