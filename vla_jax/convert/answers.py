"""The code of texts that say a chunk: of the FAST tokenizer and of the language's.

It becomes a part of the model's config, `model.fast.code`, when a run starts or a checkpoint is
imported, so that a checkpoint needs no other file.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any

from vla_jax.config import ConfigError, FastConfig, ModelConfig
from vla_jax.data.language.fast_text import CLOSING, OPENING, AnswerWriter, FastText
from vla_jax.data.language.prompts import FORMS
from vla_jax.data.language.tokenizer import Tokenizer
from vla_jax.data.units.fast import FastTokenizer
from vla_jax.models import vla


def words(config: ModelConfig) -> Iterable[str]:
    """Words of the answers that a tokenizer built for the run must know."""
    return (OPENING, CLOSING) if vla.written(config) else ()


def word_ids(model: vla.VLA, stored: Mapping[str, Any]) -> int:
    """How many token ids, from 0, may be words.

    Args:
        model: whose config is complete.
        stored: see `with_code`.
    """
    fast = model.config.fast
    if not vla.written(model.config):
        return model.word_ids
    # FAST tokens take the ids just below `token_end`, so that words are all ids below those.
    return fast.token_end - _tokenizer(fast, stored).size


def with_code(model: vla.VLA, tokenizer: Tokenizer, stored: Mapping[str, Any]) -> ModelConfig:
    """The model's config with the code of its answers.

    Args:
        model: whose config is complete.
        tokenizer: of the language.
        stored: the code of the checkpoint that the weights come from, taken unless
            `model.fast.dir` names another FAST tokenizer; {} = there is none.

    Raises:
        ConfigError: there is no FAST tokenizer, or the vocabulary has no room for it.
    """
    config, fast = model.config, model.config.fast
    if fast.code or not vla.written(config):
        return config
    # A prompt that begins the answer leaves nothing of it to be written.
    begun = FORMS[vla.prompt_form(config)].template.endswith(OPENING)
    try:
        text = FastText.of(_tokenizer(fast, stored), tokenizer, fast.token_end, begun)
    except ValueError as error:
        raise ConfigError(f"model.fast: {error}") from error
    if text.first < 1:
        raise ConfigError(
            f"model.fast: {text.fast.size} FAST tokens below id {text.token_end} leave no room for "
            "words"
        )
    return dataclasses.replace(config, fast=dataclasses.replace(fast, code=text.to_json()))


def writer(config: ModelConfig) -> AnswerWriter | None:
    """What the data pipeline writes answers with; None for models that read none."""
    if not vla.written(config):
        return None
    text = FastText.from_json(config.fast.code)
    is_binary = config.has_gripper and not vla.build(config).gripper_is_number
    return AnswerWriter(text, config.fast.length, is_binary)


def stand_in(model: vla.VLA) -> ModelConfig:
    """The model's config with a code of one byte a token, for programs that are never run."""
    config, fast = model.config, model.config.fast
    if fast.code or not vla.written(config):
        return config
    # Only the shapes count: no text is ever read or written with it.
    vocabulary = {chr(i): i for i in range(64)}
    tokenizer = json.dumps({"model": {"vocab": vocabulary}})
    numbers = {"scale": 10.0, "min_token": -32, "vocab_size": len(vocabulary)}
    code = {"fast": {**numbers, "tokenizer": tokenizer}, "token_end": fast.token_end}
    code |= {"opening": [0], "closing": [0], "stop": 0}
    return dataclasses.replace(config, fast=dataclasses.replace(fast, code=code))


def _tokenizer(fast: FastConfig, stored: Mapping[str, Any]) -> FastTokenizer:
    if fast.dir:
        try:
            return FastTokenizer.from_dir(fast.dir)
        except (OSError, ValueError) as error:
            raise ConfigError(f"model.fast.dir: {error}") from error
    if stored:
        return FastTokenizer.from_json(stored["fast"])
    raise ConfigError(
        "model.fast.dir: name the folder of a FAST tokenizer, the universal one or one that "
        "launch/fit_fast.py has fitted"
    )
